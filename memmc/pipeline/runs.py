"""Training runs that have begun and not ended, so that a driver that was killed is followed by one that goes on.

Under ``training/records/<cohort>/<run>/`` each driver of a run writes one file: ``driver-<n>.json``, made only if it is
not there yet, so that of two drivers one takes over; it beats in ``beat-<n>.json``; ``ended.json`` closes the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import psutil

from memmc.config import Config
from memmc.errors import GateRefused, UsageError
from memmc.lake.refresh import refreshed
from memmc.lake.storage import Storage

_FOLDER = "training/records"
_BEAT_S = 20.0
_DEAD_AFTER_S = 90.0
# What a run may be resumed with in another way: how it is carried out, not what is learned.
_FREE = {"num_workers", "min_workers", "use_gpu", "checkpoint_seconds", "max_failures", "hung_seconds", "resume"}
_AT_WORK: set[str] = set()  # folders of the runs that this process drives


@dataclass(frozen=True)
class RunRecord:
    """A run, and the driver it has or had.

    Attributes:
        run: name of the run, and of its folder of checkpoints.
        cohort: whose normals it learns.
        dataset_version: of the instances table.
        task: hash of everything that decides what is learned: images, recipe, preparation, start.
        tracked: id of the MLflow run.
        driver: number of the driver, from 1.
        host: of the driver.
        pid: of the driver.
        began_at: of the driver's process, s since 1970; tells it from a later process of the same number.
    """

    run: str
    cohort: str
    dataset_version: int
    task: str
    tracked: str = ""
    driver: int = 1
    host: str = ""
    pid: int = 0
    began_at: float = 0.0

    @property
    def folder(self) -> str:
        """Where the record lies in the lake."""
        return f"{_FOLDER}/{self.cohort}/{self.run}"


def task_of(config: Config, keys: Iterable[str], start: str = "") -> str:
    """Return 16 hex digits naming what a run learns.

    Args:
        config: `data`, `model` and `train` count, but for settings of how a run is carried out.
        keys: `object_key`s of the images.
        start: digest of the model it starts from; empty for random weights.
    """
    tree = config.model_dump(mode="json", include={"data", "model", "train"})
    tree["train"] = {name: value for name, value in tree["train"].items() if name not in {*_FREE, "warm_start"}}
    tree["model"]["recompute"] = False  # free too; its default stays in, as in the records of earlier versions
    digest = hashlib.sha256(json.dumps([tree, start], sort_keys=True).encode())
    for key in sorted(keys):
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()[:16]


def unfinished(storage: Storage, cohort: str) -> list[RunRecord]:
    """Return the runs of a cohort that have not ended, each with its last driver; newest first."""
    drivers: dict[str, str] = {}
    ended: set[str] = set()
    for name in storage.list(f"{_FOLDER}/{cohort}"):
        path = PurePosixPath(name)
        if path.name == "ended.json":
            ended.add(path.parent.name)
        elif path.name.startswith("driver-"):
            drivers[path.parent.name] = max(drivers.get(path.parent.name, ""), name)
    found = [RunRecord(**json.loads(storage.read(name))) for run, name in drivers.items() if run not in ended]
    return sorted(found, key=lambda record: (record.began_at, record.run), reverse=True)


def to_resume(storage: Storage, cohort: str, task: str, wanted: str | None) -> RunRecord | None:
    """Return the run to go on with: the one that is named, else the newest of the same task; None to begin anew.

    Raises:
        UsageError: the named run is not there, has ended, or learns something else.
        GateRefused: its driver is at work.
    """
    open_runs = unfinished(storage, cohort)
    if wanted is None:
        return next((r for r in open_runs if r.task == task and not driver_lives(storage, r)), None)
    record = next((r for r in open_runs if r.run == wanted), None)
    if record is None:
        listed = ", ".join(r.run for r in open_runs) or "none"
        raise UsageError(f"run '{wanted}' of cohort '{cohort}' is not there or has ended; unfinished runs: {listed}")
    if record.task != task:
        raise UsageError(f"run {wanted} was begun with other images or settings; give it those, or leave out --resume")
    if driver_lives(storage, record):
        raise GateRefused(f"run {wanted} is in progress (process {record.pid}); end that process first, or wait")
    return record


def driver_lives(storage: Storage, record: RunRecord) -> bool:
    """Say whether a run's driver is at work: by its process on this host, by its beats from elsewhere.

    A process lives on after a driver of its own has failed; what it drives is known here.
    """
    if record.host == socket.gethostname():
        if record.pid == os.getpid():
            return record.folder in _AT_WORK
        try:
            return abs(psutil.Process(record.pid).create_time() - record.began_at) < 1.0
        except psutil.NoSuchProcess:
            return False
    beat = f"{record.folder}/beat-{record.driver:04d}.json"
    if not storage.exists(beat):
        return False
    return time.time() - float(json.loads(storage.read(beat))["at"]) < _DEAD_AFTER_S


@contextmanager
def driving(storage: Storage, record: RunRecord, *, taking_over: bool) -> Generator[RunRecord]:
    """Be the driver of a run within the block; the run has ended when the block ends without an error.

    Raises:
        GateRefused: another driver was faster in taking the run over.
    """
    me = psutil.Process(os.getpid())
    number = record.driver + 1 if taking_over else 1
    mine = replace(record, driver=number, host=socket.gethostname(), pid=me.pid, began_at=me.create_time())

    def beat() -> None:
        storage.write(f"{mine.folder}/beat-{number:04d}.json", _document({"at": time.time()}))

    beat()  # before the driver is seen: one without a beat counts as dead
    if not storage.create(f"{mine.folder}/driver-{number:04d}.json", _document(asdict(mine))):
        raise GateRefused(f"run {record.run} has just been taken over by another process; see that one")
    _AT_WORK.add(mine.folder)
    try:
        with refreshed(beat, _BEAT_S, "driver-beat"):
            yield mine
            storage.write(f"{mine.folder}/ended.json", _document({"driver": number}))
    finally:
        _AT_WORK.discard(mine.folder)


def _document(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
