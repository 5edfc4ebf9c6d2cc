"""Free what no reader and no writer needs: old shards, the litter of killed writers, unfinished uploads.

A file goes when the newest version does not hold it, no version within the retention did, and it is older than the
retention. A run that is still writing holds a lease (`lease`), which stretches the retention to its beginning, so that
its not yet committed shards stay however long it takes.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime

from memmc import s3
from memmc.lake.refresh import refreshed
from memmc.lake.schemas import SCHEMAS
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake

LEASES = "_leases"
LEASE_REFRESH_S = 600.0


@dataclass(frozen=True)
class Litter:
    """What a vacuum deletes, or would.

    Attributes:
        shards: names relative to the lake's root.
        unfinished: local files of killed writers, relative to the lake's root.
        uploads: multipart uploads never finished, by key.
        hours: the retention that was used, which a running writer may have stretched.
    """

    shards: list[str]
    unfinished: list[str]
    uploads: list[str]
    hours: int


@contextlib.contextmanager
def lease(lake: Lake, run: str) -> Generator[None]:
    """Keep, while the body runs, every file written since from any vacuum; a killed run's lease runs out by itself."""
    name, since = f"{LEASES}/{run}.json", time.time()
    _write_lease(lake.storage, name, since)
    try:
        with refreshed(lambda: _write_lease(lake.storage, name, since), LEASE_REFRESH_S, "lease"):
            yield
    finally:
        lake.storage.delete(name)


def _write_lease(storage: Storage, name: str, since: float) -> None:
    storage.write(name, json.dumps({"since": since, "seen": time.time()}).encode())


def vacuum(lake: Lake, hours: int, *, dry_run: bool = False) -> Litter:
    """Delete what is older than `hours` and that nothing refers to.

    Args:
        hours: retention; versions older than this can no longer be read where a commit since has removed their shards.
        dry_run: list only.

    Raises:
        StorageError: the place cannot be read or written.
    """
    hours = stretched(lake.storage, hours, dry_run=dry_run)
    shards = [
        f"{table}/{path}"
        for table in SCHEMAS
        if lake.exists(table)
        for path in lake.vacuum_table(table, hours, dry_run=dry_run)
    ]
    before = time.time() - hours * 3600
    unfinished = lake.storage.unfinished(before)
    uploads = lake.storage.uploads(datetime.fromtimestamp(before, UTC))
    if not dry_run:
        for name in unfinished:
            lake.storage.delete(name)
        for key, upload in uploads:
            lake.storage.abort_upload(key, upload)
    return Litter(sorted(shards), unfinished, [key for key, _ in uploads], hours)


def stretched(storage: Storage, hours: int, *, dry_run: bool = True) -> int:
    """Return the retention that reaches back to the beginning of every run that still writes.

    Args:
        dry_run: leave leases that have run out where they are.
    """
    now = time.time()
    for name, since, seen in _leases(storage):
        if now - seen < hours * 3600:
            hours = max(hours, math.ceil((now - since) / 3600) + 1)
        elif not dry_run:
            storage.delete(name)
    return hours


def running(storage: Storage) -> int:
    """Return how many runs have kept their lease up lately."""
    return sum(time.time() - seen < 3 * LEASE_REFRESH_S for _, _, seen in _leases(storage))


def _leases(storage: Storage) -> list[tuple[str, float, float]]:
    """Return name, beginning and last refresh (s since 1970) of every lease; an unreadable one has run out."""
    found: list[tuple[str, float, float]] = []
    for name in storage.list(LEASES):
        try:
            held = json.loads(storage.read(name))
            found.append((name, float(held["since"]), float(held["seen"])))
        except s3.AbsentError:  # the run has just ended; what it wrote is committed, or younger than the retention
            continue
        except (ValueError, KeyError, TypeError):
            found.append((name, 0.0, 0.0))
    return found
