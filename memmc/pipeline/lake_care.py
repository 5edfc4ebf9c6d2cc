"""Looking after a lake: check it, list its commits, free what nothing refers to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from memmc.config import Config
from memmc.errors import DataError
from memmc.lake.schemas import SCHEMAS, schema_of
from memmc.lake.tables import Lake
from memmc.lake.vacuum import vacuum
from memmc.lake.verify import Damage, verify
from memmc.pipeline.audit import recorded
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result


@dataclass(frozen=True)
class VerifyResult(Result):
    """A whole check of the newest version of every table; see `memmc.lake.verify.Verdict`."""

    whole: bool
    tables: dict[str, dict[str, int]]
    cohorts: dict[str, dict[str, int]]
    damages: list[Damage]


@dataclass(frozen=True)
class HistoryResult(Result):
    """Commits, newest first; see `memmc.lake.log.commits`."""

    commits: list[dict[str, Any]]


@dataclass(frozen=True)
class VacuumResult(Result):
    """What was deleted, or would be; see `memmc.lake.vacuum.Litter`."""

    deleted: bool
    shards: list[str]
    unfinished: list[str]
    uploads: int
    hours: int


def verify_lake(config: Config, progress: Progress | None = None) -> VerifyResult:
    """Read every byte of the lake and balance its account.

    Raises:
        DataError: the lake has no tables.
    """
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    _require_tables(lake)
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.stage("verify", total)
            begun = True
        progress.advance(done)

    verdict = verify(lake, advance)
    return VerifyResult(not verdict.damages, verdict.tables, verdict.cohorts, verdict.damages)


def history_of(config: Config, table: str | None, limit: int) -> HistoryResult:
    """Return the newest commits of a table, or of all.

    Raises:
        DataError: no such table, or the lake has no tables.
    """
    lake = Lake(config.lake.uri)
    tables = _require_tables(lake)
    if table is not None:
        schema_of(table)
        tables = [table]
    commits = [
        {"table": name, **commit, "timestamp": _iso(commit["timestamp"])}
        for name in tables
        for commit in lake.history(name, limit)
    ]
    commits.sort(key=lambda commit: (commit["timestamp"], commit["version"]), reverse=True)
    return HistoryResult(commits[:limit])


@recorded("lake-vacuum", lambda done: {"shards": len(done.shards), "uploads": done.uploads, "hours": done.hours})
def vacuum_lake(config: Config, *, dry_run: bool) -> VacuumResult:
    """Delete what no version within `lake.vacuum_hours` refers to and that no running writer may still commit."""
    lake = Lake(config.lake.uri)
    _require_tables(lake)
    litter = vacuum(lake, config.lake.vacuum_hours, dry_run=dry_run)
    return VacuumResult(not dry_run, litter.shards, litter.unfinished, len(litter.uploads), litter.hours)


def _require_tables(lake: Lake) -> list[str]:
    tables = [table for table in SCHEMAS if lake.exists(table)]
    if not tables:
        raise DataError("there is no lake here yet; check --lake, or ingest first")
    return tables


def _iso(milliseconds: int | None) -> str:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat(timespec="seconds")
