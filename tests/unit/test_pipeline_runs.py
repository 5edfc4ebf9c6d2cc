"""A run whose driver died is found and gone on with by one process; one at work, ended or of another task is not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from memmc.config import load_config
from memmc.errors import GateRefused, StorageError, UsageError
from memmc.lake.storage import Storage
from memmc.pipeline.runs import _FREE, RunRecord, driver_lives, driving, task_of, to_resume, unfinished

RECORD = RunRecord(run="train-cxr-1", cohort="cxr", dataset_version=3, task="t", tracked="m")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def die(storage: Storage, record: RunRecord, **changes: object) -> RunRecord:
    """Leave the run as a killed driver does."""
    with pytest.raises(KeyboardInterrupt), driving(storage, record, taking_over=False) as mine:
        raise KeyboardInterrupt
    dead = replace(mine, **changes) if changes else replace(mine, pid=2**22 + 1)
    storage.write(f"{dead.folder}/driver-{dead.driver:04d}.json", json.dumps(dead.__dict__).encode())
    return dead


def test_a_dead_drivers_run_is_taken_over_once(storage: Storage) -> None:
    dead = die(storage, RECORD)
    assert to_resume(storage, "cxr", "t", None) == dead
    assert to_resume(storage, "cxr", "other", None) is None
    assert to_resume(storage, "others", "t", None) is None
    with driving(storage, dead, taking_over=True) as mine:
        assert (mine.driver, mine.run, mine.tracked) == (2, dead.run, "m")
        assert to_resume(storage, "cxr", "t", None) is None, "a run at work was taken over"
        with pytest.raises(GateRefused, match="just been taken over"), driving(storage, dead, taking_over=True):
            pass
    assert unfinished(storage, "cxr") == []


def test_a_driver_is_seen_alive_from_the_first(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host may look in the very moment in which the driver's record appears."""
    seen, create = [], Storage.create

    def look(self: Storage, name: str, content: bytes) -> bool:
        made = create(self, name, content)
        (record,) = unfinished(self, "cxr")
        seen.append(driver_lives(self, replace(record, host="another-host")))
        return made

    monkeypatch.setattr(Storage, "create", look)
    with driving(storage, RECORD, taking_over=False):
        pass
    assert seen == [True]


def test_a_named_run_must_be_unfinished_and_alike(storage: Storage) -> None:
    with pytest.raises(UsageError, match="unfinished runs: none"):
        to_resume(storage, "cxr", "t", "train-cxr-1")
    dead = die(storage, RECORD)
    assert to_resume(storage, "cxr", "t", dead.run) == dead
    with pytest.raises(UsageError, match="other images or settings"):
        to_resume(storage, "cxr", "changed", dead.run)
    with driving(storage, dead, taking_over=True), pytest.raises(GateRefused, match=f"process {os.getpid()}"):
        to_resume(storage, "cxr", "t", dead.run)


def test_a_driver_elsewhere_lives_by_its_beats_and_a_reused_pid_is_another_process(storage: Storage) -> None:
    elsewhere = die(storage, RECORD, host="another-host", pid=os.getpid())
    assert driver_lives(storage, elsewhere)
    beat = f"{elsewhere.folder}/beat-0001.json"
    storage.write(beat, json.dumps({"at": time.time() - 100}).encode())
    assert not driver_lives(storage, elsewhere)
    other = subprocess.Popen(["sleep", "60"])
    try:
        here = die(storage, replace(RECORD, run="train-cxr-2"), pid=other.pid, began_at=1.0)
        assert not driver_lives(storage, here)
        assert driver_lives(storage, replace(here, began_at=psutil.Process(other.pid).create_time()))
    finally:
        other.kill()
        other.wait()


def test_a_run_that_failed_is_gone_on_with_by_the_process_that_began_it(storage: Storage) -> None:
    """As Prefect tries a task again; the process is alive, its driver is not."""
    with pytest.raises(StorageError), driving(storage, RECORD, taking_over=False) as mine:
        assert driver_lives(storage, mine)
        raise StorageError("no answer")
    assert to_resume(storage, "cxr", "t", None) == mine
    assert to_resume(storage, "cxr", "t", mine.run) == mine


def test_a_task_is_what_is_learned_not_how_it_is_carried_out() -> None:
    def task(*overrides: str, keys: tuple[str, ...] = ("b", "a"), start: str = "") -> str:
        return task_of(load_config(overrides=overrides), keys, start)

    same = task()
    assert task(keys=("a", "b")) == same
    assert task("train.num_workers=5", "train.min_workers=1", "train.max_failures=9", "train.resume=x") == same
    assert task("score.passes=8") == task("model.recompute=true") == same
    others = [task("train.base_lr=0.1"), task("model.patch_size=16"), task("data.bits=8"), task("train.seed=1")]
    others += [task(keys=("a",)), task(start="digest"), task("train.strategy=fsdp")]
    assert len({same, *others}) == len(others) + 1


def test_a_run_that_was_begun_when_recompute_was_part_of_the_task_is_found() -> None:
    tree = load_config().model_dump(mode="json", include={"data", "model", "train"})
    assert tree["model"]["recompute"] is False
    tree["train"] = {name: value for name, value in tree["train"].items() if name not in {*_FREE, "warm_start"}}
    written = hashlib.sha256(json.dumps([tree, ""], sort_keys=True).encode() + b"a\nb\n").hexdigest()[:16]
    assert task_of(load_config(), ("b", "a")) == written
