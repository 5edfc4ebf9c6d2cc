"""What is logged waits in a file until the store has it: in order, whoever dies when."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
import time
from pathlib import Path

import pytest

from memmc.errors import StorageError
from memmc.registry import delivery
from memmc.registry.delivery import Delivery, RefusedError
from memmc.registry.spool import ENTRIES, Spool, left_behind


class Store:
    """Takes entries when it is up; `refuses` names runs that it will never take."""

    def __init__(self) -> None:
        self.up = True
        self.refuses: set[str] = set()
        self.taken: list[tuple[str, object]] = []
        self.files: list[dict[str, str]] = []
        self.asked = 0

    def __call__(self, entry, files: Path) -> None:
        self.asked += 1
        if not self.up:
            raise StorageError("the store is down")
        if entry["run"] in self.refuses:
            raise RefusedError("no such run")
        if "file" in entry:
            self.files.append({path.name: path.read_text() for path in files.iterdir()})
        found = entry["values"] if "values" in entry else [entry["value"]]
        self.taken += [(entry["run"], value) for value in found]


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 0.02)
    return Store()


def values(run, numbers):
    return [(run, number) for number in numbers]


def put(sending, run, numbers):
    for number in numbers:
        sending.put({"run": run, "count": 1, "value": number})


def test_an_outage_loses_nothing_keeps_the_order_and_holds_nobody_up(tmp_path, store, caplog):
    sending = Delivery(tmp_path, store)
    put(sending, "r", range(10))
    assert sending.flush(20)
    store.up = False
    began = time.monotonic()
    put(sending, "r", range(10, 200))
    assert time.monotonic() - began < 5
    assert not sending.flush(0.2) and sending.waiting == 190
    store.up = True
    assert sending.flush(20)
    assert store.taken == values("r", range(200))
    assert (sending.waiting, sending.lost, list(tmp_path.iterdir())) == (0, 0, [])
    assert len([record for record in caplog.records if "sent when it answers" in record.message]) == 1


def test_an_outage_is_made_up_for_in_few_calls(tmp_path, store):
    """Values of one run that follow each other go together, up to what a call may hold, and never past an artifact."""
    store.up = False
    sending = Delivery(tmp_path, store)
    for number in range(2000):
        sending.put({"run": "r", "count": 1, "values": [number]})
    sending.put({"run": "r", "count": 1, "value": "end"})
    for number in range(3):
        sending.put({"run": "s", "count": 2, "values": [number, number]})
    store.up, store.asked = True, 0
    assert sending.flush(20)
    assert store.taken[:2001] == [*values("r", range(2000)), ("r", "end")]
    assert store.taken[2001:] == [("s", number) for number in (0, 0, 1, 1, 2, 2)]
    assert store.asked <= 3 + 1 + 1 + 1  # one may be asked once more, as the store was down


def test_artifacts_are_as_they_were_when_logged(tmp_path, store):
    store.up = False
    sending = Delivery(tmp_path / "spool", store)
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / name).write_text(f"first {name}")
    sending.put({"run": "r", "count": 1, "value": 0}, tmp_path / "folder")
    sending.put({"run": "r", "count": 1, "value": 1}, tmp_path / "folder" / "a")
    (tmp_path / "folder" / "a").write_text("second")
    store.up = True
    assert sending.flush(20)
    assert store.files == [{"a": "first a", "b": "first b"}, {"a": "first a"}]
    assert not list((tmp_path / "spool").iterdir())


def test_a_run_that_is_gone_does_not_hold_up_others(tmp_path, store, caplog):
    store.refuses = {"deleted"}
    sending = Delivery(tmp_path, store)
    for number in range(3):
        put(sending, "deleted", [number])
        put(sending, "r", [number])
    assert sending.flush(20)
    assert (store.taken, sending.lost) == (values("r", range(3)), 3)
    assert "values of run deleted are dropped" in caplog.text


def test_a_disk_that_is_full_is_said_and_ends_nothing(tmp_path, store, caplog):
    sending = Delivery(tmp_path / "file" / "spool", store)
    (tmp_path / "file").write_text("in the way")
    put(sending, "r", range(2))
    assert (sending.lost, sending.waiting) == (2, 0)
    assert "are lost" in caplog.text


def log_and_hang(folder, ready) -> None:
    store = Store()
    store.up = False
    sending = Delivery(folder, store)
    put(sending, "r", range(50))
    ready.set()
    time.sleep(60)


def test_a_killed_process_is_followed_by_one_that_sends(tmp_path, store):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=log_and_hang, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    sending = Delivery(tmp_path, store)
    assert sending.replay() == 0 and store.taken == []  # its process is at work, and sends itself
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (folder,) = left_behind(tmp_path)
    assert folder.name.startswith("r-")
    with (folder / ENTRIES).open("ab") as file:
        file.write(b'{"run": "r", "cou')  # a line that the kill cut
    store.up = False
    with pytest.raises(StorageError):
        sending.replay()
    store.up = True
    assert sending.replay() == 50
    assert store.taken == values("r", range(50)) and left_behind(tmp_path) == []


def test_what_was_sent_before_the_kill_is_not_sent_again(tmp_path, store):
    spool = Spool.begin(tmp_path, "r")
    for number in range(5):
        spool.append({"run": "r", "count": 1, "value": number})
    for _ in range(2):
        entry, end = spool.next() or pytest.fail("nothing waits")
        spool.delivered(entry, end)
    assert spool.waiting == 3
    spool._file.close()
    assert Delivery(tmp_path, store).replay() == 3
    assert store.taken == values("r", [2, 3, 4])


def test_one_of_several_processes_sends(tmp_path, store):
    spool = Spool.begin(tmp_path, "r")
    spool.append({"run": "r", "count": 1, "value": 0})
    spool._file.close()
    gate = threading.Barrier(4)

    def replay() -> None:
        gate.wait()
        Delivery(tmp_path, store).replay()

    threads = [threading.Thread(target=replay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.taken == values("r", [0])


def test_lines_are_json_with_the_run(tmp_path, store):
    store.up = False
    sending = Delivery(tmp_path, store)
    put(sending, "run-7", [1])
    (folder,) = left_behind(tmp_path)
    assert json.loads((folder / ENTRIES).read_text()) == {"run": "run-7", "count": 1, "value": 1}
    store.up = True
    assert sending.flush(20)
