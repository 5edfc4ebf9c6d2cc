"""From converted shards to one commit: duplicates settled, the account balanced, other runs' commits respected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from memmc.dicom.reasons import OVERLOADED
from memmc.errors import AccountingError, StorageError
from memmc.lake.commit import LostTurnError
from memmc.lake.erasure import ERASED, erased_contents, tombstone
from memmc.lake.schemas import INSTANCES
from memmc.lake.shards import read_shard
from memmc.lake.tables import Lake
from memmc.pipeline.convert_chunk import IngestJob, WrittenShard, write_partition
from memmc.pipeline.vault import withdraw
from memmc.sources.objects import RETRIABLE

ROUNDS = 8  # of settling anew because another ingest of the cohort committed first

Verdict = tuple[str, str] | None  # None: the row stays as it is
_CONFLICT = "META_DUP_UID_CONFLICT"
ALREADY_INGESTED = "already_ingested"
_KNOWN = ("", ALREADY_INGESTED)
_ERASED = ("excluded", ERASED)
_MAY_PASS = RETRIABLE | OVERLOADED


def turn_name(cohort: str) -> str:
    """Return the name under which ingests of a cohort take turns (`Lake.turn`)."""
    return f"ingest {cohort}"


def publish(
    lake: Lake, job: IngestJob, shards: list[WrittenShard], listed: int, metadata: Mapping[str, Any]
) -> tuple[int, list[WrittenShard], list[str]]:
    """Settle, balance and commit.

    Ingests of a cohort commit in turns. What another has accounted for since this one planned is dropped, so that two
    runs over one tree leave each object once; so is an object that failed before and fails alike now, for a reason
    that may pass.

    Args:
        listed: objects that the shards must account for.
        metadata: kept in the commit.

    Returns:
        The table's version; the shards that were committed; of each row that was dropped, why its object has no row of
        this run: the reason that may pass and for which it failed again, or `ALREADY_INGESTED`.

    Raises:
        AccountingError: the account does not balance; nothing was committed.
        StorageError: the place cannot be written, or other ingests won every round.
    """
    dropped: list[str] = []
    for _ in range(ROUNDS):
        turn = lake.turn(INSTANCES, turn_name(job.cohort))
        known = seen_objects(lake, job.cohort)
        dropped += [
            row["reason"] if row["reason"] in _MAY_PASS else ALREADY_INGESTED
            for row in object_rows(job, shards)
            if row["object_key"] in known
        ]
        shards = settle(job, shards, stored_contents(lake, job.cohort), known, erased_contents(lake, job.cohort))
        check_balance(listed - len(dropped), [row["object_key"] for row in object_rows(job, shards)])
        if job.vault is not None:  # before the commit: who is killed in between has stored nothing yet
            withdraw(job.vault, job.run, refused_contents(shards))
        if listed == len(dropped):
            return lake.version(INSTANCES), shards, dropped
        try:
            version = lake.commit(
                INSTANCES,
                [shard.file for shard in shards],
                run_id=job.run,
                metadata=metadata,
                turns={turn_name(job.cohort): turn},
            )
        except LostTurnError:
            continue
        return version, shards, dropped
    raise StorageError(f"other ingests of cohort '{job.cohort}' won {ROUNDS} commits in a row; run ingest again")


def settle(
    job: IngestJob,
    shards: list[WrittenShard],
    stored: Mapping[str, str],
    known: Collection[str] = frozenset(),
    erased: Collection[str] = frozenset(),
) -> list[WrittenShard]:
    """Leave each SOP Instance stored once; the first in listing order wins.

    A copy becomes `duplicate`; the same SOP Instance UID with other bytes is
    `quarantined` as META_DUP_UID_CONFLICT (PS3.3 C.12.1: the UID identifies one
    object). A copy of an erased object leaves a tombstone. Shards that hold none of these stay as they were written.

    Args:
        stored: SOP Instance UID -> content key of what the cohort already holds.
        known: object keys that another run has accounted for; their rows are dropped.
        erased: content keys of erased objects.
    """
    contents = dict(stored)

    def verdict(row: Mapping[str, Any], outcome: str) -> Verdict:
        if row["object_key"] in known:
            return _KNOWN
        if row["content_key"] in erased:
            return _ERASED
        if outcome != "stored":
            return None
        uid, content = row["sop_instance_uid"], row["content_key"]
        if uid not in contents:
            contents[uid] = content
            return None
        return ("duplicate", "same_object") if contents[uid] == content else ("quarantined", _CONFLICT)

    settled: list[WrittenShard] = []
    moved: dict[str, list[dict[str, Any]]] = {"duplicate": [], "quarantined": [], "excluded": []}
    for shard in shards:
        settled.extend(_rewritten(job, shard, verdict, moved))
    settled.extend(write_partition(job.storage, outcome, "none", rows) for outcome, rows in moved.items() if rows)
    return settled


def refused_contents(shards: list[WrittenShard]) -> set[str]:
    """Return the content keys of objects that were ready to be stored and were not: their originals are no one's."""
    reasons = {_CONFLICT, ERASED}
    return {row["content_key"] for shard in shards for row in shard.account if row["reason"] in reasons} - {""}


def _rewritten(
    job: IngestJob,
    shard: WrittenShard,
    verdict: Callable[[Mapping[str, Any], str], Verdict],
    moved: dict[str, list[dict[str, Any]]],
) -> list[WrittenShard]:
    """Return the shard as it is, or written anew without the rows that go elsewhere."""
    outcome = shard.file.partition["outcome"]
    verdicts = [verdict(row, outcome) for row in shard.account]
    if not any(verdicts):
        return [shard]
    rows = read_shard(job.storage, shard.file.path).to_pylist()
    kept: list[dict[str, Any]] = []
    for row, found in zip(rows, verdicts, strict=True):
        if found is None:
            kept.append({**row, **shard.file.partition})
        elif found == _ERASED:
            moved["excluded"].append(tombstone(row))
        elif found != _KNOWN:
            changed = {"outcome": found[0], "split": "none", "reason": found[1], "pixels": None, "preprocess_id": None}
            moved[found[0]].append({**row, **changed})
    job.storage.delete(shard.file.path)
    return [write_partition(job.storage, outcome, shard.file.partition["split"], kept)] if kept else []


def object_rows(job: IngestJob, shards: list[WrittenShard]) -> list[dict[str, Any]]:
    """Return the rows that count in the account, one per object: the second and later frames of an object do not."""
    every_frame = job.policy.select.frames == "each"
    rows = [row for shard in shards for row in shard.account]
    return [row for row in rows if not every_frame or row["frame_number"] in (None, 1)]


def check_balance(listed: int, accounted: list[str]) -> None:
    """Check that every listed object has exactly one row.

    Raises:
        AccountingError: with the counts.
    """
    if len(accounted) != listed or len(set(accounted)) != listed:
        raise AccountingError(
            f"{listed} objects were listed, {len(accounted)} rows came back, {len(set(accounted))} of them distinct; "
            "nothing was committed: run ingest again, and report this if it repeats"
        )


def seen_objects(lake: Lake, cohort: str) -> frozenset[str]:
    """Return the object keys that the cohort's rows account for."""
    if not lake.exists(INSTANCES):
        return frozenset()
    return frozenset(lake.read(INSTANCES, ["object_key"], filter={"cohort": cohort})["object_key"].to_pylist())


def failed_objects(lake: Lake, cohort: str) -> frozenset[str]:
    """Return the object keys of the cohort's rows of failures that may pass."""
    if not lake.exists(INSTANCES):
        return frozenset()
    where = {"cohort": cohort, "outcome": "quarantined", "reason": sorted(_MAY_PASS)}
    return frozenset(lake.read(INSTANCES, ["object_key"], filter=where)["object_key"].to_pylist())


def given_up(lake: Lake, cohort: str, before: datetime) -> frozenset[str]:
    """Return the object keys of what ran out of time or memory before a moment and has done so ever since."""
    if not lake.exists(INSTANCES):
        return frozenset()
    where = {"cohort": cohort, "outcome": "quarantined", "reason": sorted(OVERLOADED)}
    rows = lake.read(INSTANCES, ["object_key", "ingested_at"], filter=where)
    return frozenset(row["object_key"] for row in rows.to_pylist() if row["ingested_at"] < before)


def stored_contents(lake: Lake, cohort: str) -> dict[str, str]:
    """Return SOP Instance UID -> content key of the cohort's stored rows."""
    if not lake.exists(INSTANCES):
        return {}
    table = lake.read(INSTANCES, ["sop_instance_uid", "content_key"], filter={"cohort": cohort, "outcome": "stored"})
    return dict(zip(table["sop_instance_uid"].to_pylist(), table["content_key"].to_pylist(), strict=True))
