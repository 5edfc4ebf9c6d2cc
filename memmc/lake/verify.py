"""Is every committed shard whole, and does the account balance?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from memmc.errors import IntegrityError
from memmc.lake.files import DataFile, select_rows
from memmc.lake.schemas import INSTANCES, PARTITION_BY, SCHEMAS, SCORES, schema_of
from memmc.lake.shards import lineage_of, named_digest, parse_shard
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.s3 import AbsentError

VERIFY_THREADS = 4
ABSENT = "absent"


@dataclass(frozen=True)
class Damage:
    """One finding.

    Attributes:
        table: the table it is in.
        shard: name relative to the lake's root, or empty when it is the table's account.
        problem: what was found and what was expected.
    """

    table: str
    shard: str
    problem: str


@dataclass(frozen=True)
class Verdict:
    """What a whole check found.

    Attributes:
        tables: version checked, shards, rows and bytes, by table.
        cohorts: objects by outcome, by cohort.
        damages: empty for a whole lake.
    """

    tables: dict[str, dict[str, int]]
    cohorts: dict[str, dict[str, int]]
    damages: list[Damage]


def verify(lake: Lake, advance: Callable[[int, int], None] = lambda done, total: None) -> Verdict:
    """Read every byte of the newest version of every table.

    Args:
        advance: called with the bytes read and those to read.

    Raises:
        StorageError: the place cannot be read; nothing is said of the lake.
    """
    versions = {table: lake.version(table) for table in SCHEMAS if lake.exists(table)}
    shards = [(table, file) for table, version in versions.items() for file in lake.files(table, version)]
    total = sum(file.size for _, file in shards)
    damages: list[Damage] = []
    done = 0
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        problems = pool.map(lambda item: _problem(lake, *item), shards)
        for (table, file), problem in zip(shards, problems, strict=True):
            done += file.size
            advance(done, total)
            if problem:
                damages.append(Damage(table, file.path, problem))
    unreadable = {damage.table for damage in damages}
    cohorts: dict[str, dict[str, int]] = {}
    if INSTANCES in versions and INSTANCES not in unreadable:
        cohorts, problems = _account(lake, versions, scores=SCORES in versions and SCORES not in unreadable)
        damages += problems
    tables = {
        table: {
            "version": version,
            "shards": sum(name == table for name, _ in shards),
            "rows": sum(file.num_rows for name, file in shards if name == table),
            "bytes": sum(file.size for name, file in shards if name == table),
        }
        for table, version in versions.items()
    }
    return Verdict(tables, cohorts, damages)


def _problem(lake: Lake, table: str, file: DataFile) -> str | None:
    """Return what is wrong with a shard; with its replacement, where an erasure has replaced it meanwhile."""
    problem = shard_problem(lake.storage, table, file)
    while problem == ABSENT:
        newest = {lineage_of(other.path): other for other in lake.files(table)}.get(lineage_of(file.path))
        if newest is None:  # no row of it is left
            return None
        if newest.path == file.path:
            break
        file = newest
        problem = shard_problem(lake.storage, table, file)
    return problem


def shard_problem(storage: Storage, table: str, file: DataFile) -> str | None:
    """Return what is wrong with a committed shard, or None: presence, size, digests, page checksums, columns, rows."""
    try:
        data = storage.read(file.path)
    except AbsentError:
        return ABSENT
    if len(data) != file.size:
        return f"{len(data)} bytes, {file.size} were committed"
    digest = named_digest(file.path)
    if digest is None:
        return "its name carries no digest: another tool wrote it"
    if hashlib.sha256(data).hexdigest() != digest:
        return "its SHA-256 is not the one that its name carries"
    try:
        parts = list(parse_shard(file.path, data))
    except IntegrityError:
        return "its pages or its footer do not fit their checksums"
    rows = sum(part.num_rows for part in parts)
    if rows != file.num_rows:
        return f"{rows} rows, {file.num_rows} were committed"
    required = {field.name for field in schema_of(table) if not field.nullable} - set(PARTITION_BY.get(table, ()))
    missing = sorted(required - set(parts[0].column_names))
    return f"no columns {missing}" if missing else None


def _account(lake: Lake, versions: dict[str, int], *, scores: bool) -> tuple[dict[str, dict[str, int]], list[Damage]]:
    """Check that each object has one row, each stored instance stands once, and scores are of stored instances."""
    columns = ["cohort", "object_key", "outcome", "sop_instance_uid"]
    rows = lake.read(INSTANCES, columns, versions[INSTANCES])
    cohorts: dict[str, dict[str, int]] = {}
    damages: list[Damage] = []
    for group in rows.group_by(["cohort", "outcome"]).aggregate([([], "count_all")]).sort_by("cohort").to_pylist():
        cohorts.setdefault(group["cohort"], {})[group["outcome"]] = group["count_all"]
    stored = _keys(select_rows(rows, {"outcome": "stored"}), "sop_instance_uid")
    for what, found in (("object keys", _keys(rows, "object_key")), ("stored instances", stored)):
        for cohort, count in _twice(found).items():
            damages.append(Damage(INSTANCES, "", f"cohort '{cohort}': {count} {what} stand more than once"))
    if scores:
        wanted = ["cohort", "sop_instance_uid", "model_digest", "calibration_id", "not_scored"]
        scored = lake.read(SCORES, wanted, versions[SCORES])
        # A row that says why an instance has no score may be of one that is not stored, and a score may follow it.
        scored = scored.filter(scored["not_scored"].is_null())
        known = set(stored)
        foreign = Counter(key[0] for key in _keys(scored, "sop_instance_uid") if key not in known)
        damages += [
            Damage(SCORES, "", f"cohort '{cohort}': {count} scores are of no stored instance")
            for cohort, count in foreign.items()
        ]
        twice = _twice(_keys(scored, "sop_instance_uid", "model_digest", "calibration_id"))
        damages += [
            Damage(SCORES, "", f"cohort '{cohort}': {count} instances are scored twice by one model and calibration")
            for cohort, count in twice.items()
        ]
    return cohorts, damages


def _keys(rows: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[name].to_pylist() for name in ("cohort", *names)), strict=True))


def _twice(keys: list[tuple[Any, ...]]) -> dict[str, int]:
    """Return, by cohort, how many keys stand more than once."""
    return dict(Counter(str(key[0]) for key, count in Counter(keys).items() if count > 1 and key[1] is not None))
