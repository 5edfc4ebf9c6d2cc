"""A lock in the storage: one holder at a time, and none that was killed keeps it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from memmc.lake import lock
from memmc.lake.lock import locked
from memmc.lake.storage import Storage


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 0.3)
    monkeypatch.setattr(lock, "REFRESH_S", 0.05)
    monkeypatch.setattr(lock, "_LOOK_S", 0.01)


def test_one_at_a_time_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 5.0)  # a disk may take its time, too
    storage, inside, most = Storage.open(tmp_path), list[int](), list[int]()

    def hold(seconds: float) -> None:
        with locked(storage, "_lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(seconds)
            inside.pop()

    threads = [threading.Thread(target=hold, args=(seconds,)) for seconds in (0.5, 0.02, 0.02, 0.02)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert len(storage.list("_lock")) == 1


def test_a_killed_holder_is_followed(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    storage.write("_lock/000000000007", b"killed")
    storage.write("_lock/notes.txt", b"of somebody else")
    begun = time.monotonic()
    with locked(storage, "_lock"):
        assert storage.list("_lock") == ["_lock/000000000008", "_lock/notes.txt"]
    assert time.monotonic() - begun > 0.3


def test_an_error_gives_it_back(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with pytest.raises(KeyError), locked(storage, "_lock"):
        raise KeyError
    begun = time.monotonic()
    with locked(storage, "_lock"):
        assert time.monotonic() - begun < 0.3
