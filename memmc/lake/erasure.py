"""Take the rows of one patient or study out of the tables, and out of every file of them.

The shards that hold such rows are written anew without them, under names of the same lineage, and one commit a table
swaps old for new; then the old files are deleted. What stays of an object in `instances` is a tombstone: the keys by
which a later ingest knows that it was seen, and nothing of the patient (infra/adr/0008).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from memmc.errors import IntegrityError, StorageError
from memmc.lake.commit import LostTurnError
from memmc.lake.files import DataFile, again_when_absent, read_file, write_rows
from memmc.lake.schemas import INSTANCES, schema_of
from memmc.lake.shards import ShardFile, lineage_of, read_shard, write_shard
from memmc.lake.tables import Lake
from memmc.s3 import AbsentError

ERASED = "erased"
"""Reason of the `excluded` row that stays in place of an erased object."""

TURN = "erase"
"""Name of the turn that an erasure takes in the table of scores, once the subject's instances are gone (`fence`)."""

ROUNDS = 8  # of looking again because another writer committed meanwhile
_NAMING = ("cohort", "patient_key", "study_uid", "sop_instance_uid")
_KEPT = ("cohort", "object_key", "content_key", "frame_number", "ingest_run", "ingested_at")


@dataclass(frozen=True)
class Subject:
    """Whose rows go.

    Attributes:
        column: where `value` stands.
        value: the pseudonym.
        uids: SOP Instance UIDs that are the subject's alone; they find its rows in tables without the column.
        cohort: the only cohort to look in; all when None.
    """

    column: Literal["patient_key", "study_uid"]
    value: str
    uids: frozenset[str] = frozenset()
    cohort: str | None = None

    def mask(self, rows: pa.Table) -> pa.ChunkedArray:
        """Return which rows are the subject's."""
        uids = pc.SetLookupOptions(value_set=pa.array(sorted(self.uids), pa.string()))
        mask = pc.call_function("is_in", [rows["sop_instance_uid"]], uids)
        if self.column in rows.column_names:
            named = pc.call_function("equal", [rows[self.column], self.value])
            mask = pc.call_function("coalesce", [named, mask])  # where the column is null, the UID decides
        if self.cohort is not None:
            mask = pc.call_function("and", [mask, pc.call_function("equal", [rows["cohort"], self.cohort])])
        return mask


def is_of_patients(table: str) -> bool:
    """Return whether a table's rows are of instances, and so of patients."""
    return "sop_instance_uid" in schema_of(table).names


def find_subject(lake: Lake, column: Literal["patient_key", "study_uid"], value: str, cohort: str | None) -> Subject:
    """Return the subject with the UIDs of its instances."""
    rows = lake.read(INSTANCES, [*_NAMING, "outcome"], filter={"cohort": cohort} if cohort else None)
    mask = Subject(column, value, cohort=cohort).mask(rows)
    own, others = rows.filter(mask), rows.filter(pc.call_function("invert", [mask]))
    stored = others.filter(pc.call_function("equal", [others["outcome"], "stored"]))
    uids = set(own["sop_instance_uid"].to_pylist()) - set(stored["sop_instance_uid"].to_pylist()) - {None}
    return Subject(column, value, frozenset(uids), cohort)


def count_rows(lake: Lake, table: str, subject: Subject) -> int:
    """Return how many rows of the newest version are the subject's."""
    return again_when_absent(lambda: sum(_count(lake, table, subject, file) for file in _files(lake, table, subject)))


def erase_rows(
    lake: Lake, table: str, subject: Subject, run: str, turn_name: Callable[[str], str]
) -> tuple[int, set[str]]:
    """Commit a version of a table without the subject's rows.

    Args:
        run: name of the erasure, kept in the commit.
        turn_name: cohort -> the turn (`Lake.turn`) that writers of the cohort's instances take.

    Returns:
        The number of rows erased, and the names of the shards that held them, which are no longer part of the table.

    Raises:
        StorageError: the place cannot be written, or other writers won every round.
    """
    erased, removed = 0, set[str]()
    for number in range(1, ROUNDS + 1):
        names = {f"erase {table}"}  # of two who rewrite one shard, the second would put back what the first took out
        if table == INSTANCES:
            names |= {turn_name(cohort) for cohort in _cohorts(lake, table, subject)}
        turns = {name: lake.turn(table, name) for name in names}  # read before what the commit rests on
        try:
            holding = [file for file in _files(lake, table, subject) if _count(lake, table, subject, file)]
            shards, gone = _without(lake, table, subject, holding)
        except AbsentError:  # another erasure has just deleted what it replaced
            continue
        if not holding:
            return erased, removed
        try:
            lake.commit(table, shards, f"{run}-{table}", {"erasure": run}, step=number, turns=turns, remove=holding)
        except LostTurnError:
            _discard(lake, shards)
            continue
        erased += gone
        removed |= {file.path for file in holding}
    raise StorageError(f"table '{table}': other writers committed in each of {ROUNDS} rounds; run erase again")


def fence(lake: Lake, table: str, run: str) -> None:
    """Make every commit to a table that holds `TURN`, and was prepared before this, look again at what is erased."""
    with contextlib.suppress(LostTurnError):  # another erasure has just done the same
        lake.commit(table, [], f"{run}-fence", {"erasure": run}, turns={TURN: lake.turn(table, TURN)})


def purge(lake: Lake, table: str, subject: Subject, removed: Iterable[str], hours: int) -> tuple[int, int]:
    """Delete every file that is no longer, or never was, part of the table and holds rows of the subject.

    Args:
        removed: shards that an erasure has just taken out of the table.
        hours: age below which a shard that never was part of the table may be a running writer's and stays.

    Returns:
        How many files were deleted, and how many stay because a running writer may yet commit them.
    """

    def listed(hours: int, *, uncommitted: bool) -> set[str]:
        found = lake.vacuum_table(table, hours, dry_run=True, uncommitted=uncommitted)
        return {f"{table}/{path}" for path in found}

    once_committed = set(removed) | listed(0, uncommitted=False)
    free = once_committed | listed(hours, uncommitted=True)
    deleted = waiting = 0
    for path in sorted(free | listed(0, uncommitted=True)):
        if not _may_hold(lake, table, subject, path):
            continue
        if path in free:
            lake.storage.delete(path)
            deleted += 1
        else:
            waiting += 1
    return deleted, waiting


def tombstone(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stays in `instances` of an erased object's row."""
    fixed = {"outcome": "excluded", "split": "none", "reason": ERASED}
    nothing = {"source_ref": "", "size_bytes": 0, "label": "unknown"}
    return {**{name: row[name] for name in _KEPT}, **fixed, **nothing}


def erased_contents(lake: Lake, cohort: str) -> frozenset[str]:
    """Return the content keys of the cohort's erased objects: a copy of one, wherever it lies, stays out."""
    if not lake.exists(INSTANCES):
        return frozenset()
    where = {"cohort": cohort, "outcome": "excluded", "reason": ERASED}
    return frozenset(lake.read(INSTANCES, ["content_key"], filter=where)["content_key"].to_pylist()) - {""}


def _naming(table: str) -> list[str]:
    return [name for name in _NAMING if name in schema_of(table).names]


def _files(lake: Lake, table: str, subject: Subject) -> list[DataFile]:
    return lake.files(table, None, {"cohort": subject.cohort} if subject.cohort else None)


def _count(lake: Lake, table: str, subject: Subject, file: DataFile) -> int:
    return pc.call_function("sum", [subject.mask(read_file(lake.storage, table, file, _naming(table)))]).as_py() or 0


def _cohorts(lake: Lake, table: str, subject: Subject) -> set[str]:
    where = {"cohort": subject.cohort} if subject.cohort else None
    return set(lake.read(table, ["cohort"], filter=where)["cohort"].to_pylist())


def _without(lake: Lake, table: str, subject: Subject, holding: list[DataFile]) -> tuple[list[ShardFile], int]:
    """Write the shards anew without the subject's rows, and the tombstones; return them and the number of rows gone.

    Raises:
        AbsentError: a shard is gone; nothing that was written is left.
    """
    shards: list[ShardFile] = []
    stones: list[dict[str, Any]] = []
    gone = 0
    try:
        for file in holding:
            mask = subject.mask(read_file(lake.storage, table, file, _naming(table)))
            kept = read_shard(lake.storage, file.path).filter(pc.call_function("invert", [mask]))
            shards.append(write_shard(lake.storage, table, kept, file.partition, lineage_of(file.path)))
            gone += file.num_rows - kept.num_rows
            if table == INSTANCES:
                rows = read_file(lake.storage, table, file, _KEPT).filter(mask)
                stones += [tombstone(row) for row in rows.to_pylist()]
    except AbsentError:
        _discard(lake, shards)
        raise
    if stones:
        shards += write_rows(lake.storage, table, pa.Table.from_pylist(stones))
    return shards, gone


def _discard(lake: Lake, shards: list[ShardFile]) -> None:
    """Delete what was written and will not be committed: it may hold rows that another erasure takes out."""
    for shard in shards:
        lake.storage.delete(shard.path)


def _may_hold(lake: Lake, table: str, subject: Subject, path: str) -> bool:
    """Return whether a file holds rows of the subject; one that cannot be read may."""
    try:
        return _count(lake, table, subject, DataFile(path, 0, 0, {})) > 0
    except AbsentError:
        return False
    except IntegrityError:
        return True
