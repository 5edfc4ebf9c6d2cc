"""Retention: checkpoints of training runs that nothing will go on from. The models themselves lie in the registry."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from memmc.config import Config
from memmc.errors import IntegrityError
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.results import Result
from memmc.s3 import AbsentError

_TRAINING, _RECORDS = "training", "training/records"
_DAY_S = 86400.0


@dataclass(frozen=True)
class ExpireResult(Result):
    """What was deleted, or would be.

    Attributes:
        runs: training runs without a sign of life for `days`, ended or left behind.
        files: of their checkpoints and records.
    """

    deleted: bool
    runs: list[str]
    files: int
    days: int


@recorded("lake-expire", lambda done: {"runs": len(done.runs), "files": done.files, "days": done.days})
def expire_checkpoints(config: Config, *, dry_run: bool) -> ExpireResult:
    """Delete checkpoints and records of runs whose last sign of life is older than `lake.keep_checkpoints_days`.

    An unfinished run as old is deleted too: it could be gone on with until then. The record goes last, so that a call
    that is interrupted is finished by the next.

    Raises:
        IntegrityError: a run's sign of life is damaged.
    """
    storage = Lake(config.lake.uri).storage
    before = time.time() - config.lake.keep_checkpoints_days * _DAY_S
    files, runs = 0, list[str]()
    for run, record in _silent_since(storage, before):
        names = [*storage.list(f"{_TRAINING}/{run}"), *record]
        for name in () if dry_run else names:
            storage.delete(name)
        files += len(names)
        runs.append(run)
    return ExpireResult(not dry_run, runs, files, config.lake.keep_checkpoints_days)


def _silent_since(storage: Storage, before: float) -> Iterator[tuple[str, list[str]]]:
    """Yield each run whose newest beat is older, with the files of its record, the beats last.

    A run's beats are read when its turn comes: it may have been taken up again while others were deleted.
    """
    folders = {PurePosixPath(name).parent for name in storage.list(_RECORDS)}
    for folder in sorted(folders, key=lambda folder: folder.name):
        names = storage.list(folder.as_posix())
        beats = [name for name in names if PurePosixPath(name).name.startswith("beat-")]
        if beats and max(_beat(storage, folder.name, beat) for beat in beats) < before:
            yield folder.name, [*(name for name in names if name not in beats), *beats]


def _beat(storage: Storage, run: str, name: str) -> float:
    """Return the time of a sign of life, s since 1970; 0 where another call has just deleted it.

    Raises:
        IntegrityError: the file does not say.
    """
    try:
        return float(json.loads(storage.read(name))["at"])
    except AbsentError:
        return 0.0
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(
            f"the sign of life of run {run} is damaged, so its age cannot be told: if it is over, delete the run's "
            "files under training/ and training/records/, then run expire again"
        ) from None
