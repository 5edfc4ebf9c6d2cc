"""What a scoring run has to do: which shards hold instances without a score, and which get a row that says why not."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memmc.errors import DataError, UsageError
from memmc.lake.files import DataFile, Filter, read_file, select_rows
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.quality import kept_from_scores
from memmc.pipeline.score_ledger import ScoreLedger
from memmc.pipeline.select import one_preparation

_KINDS = ["preprocess_id", "height", "width", "channels", "bits"]
_KEYS = ["object_key", "sop_instance_uid"]
_NAMED = ("sop_instance_uid", "patient_key", "study_uid")
_UNSCORABLE = ("excluded", "quarantined")


@dataclass(frozen=True)
class Unit:
    """A shard of `instances` and the object keys in it that are to be scored."""

    file: DataFile
    keys: pa.Array


@dataclass(frozen=True)
class ScorePlan:
    """The work of one run.

    Attributes:
        version: of `instances`.
        preparation: what the pixels share (`select.one_preparation`).
        stored: instances with pixels that fall under `since`.
        scored: those of them that have a score.
        units: those that have none and are wanted, by shard.
        not_scored: rows that say why an instance gets no score: KEY_COLUMNS and `not_scored`.
    """

    version: int
    preparation: dict[str, Any]
    stored: int
    scored: int
    units: tuple[Unit, ...]
    not_scored: pa.Table

    @property
    def to_score(self) -> int:
        """Instances that the run scores."""
        return sum(len(unit.keys) for unit in self.units)


def plan_scores(
    lake: Lake,
    cohort: str,
    ledger: ScoreLedger,
    since: str | None = None,
    limit: int | None = None,
    only: Collection[str] | None = None,
) -> ScorePlan:
    """Return what is to be done for a cohort.

    Args:
        only: SOP Instance UIDs of a view's share of the cohort; None for all of it.
        ledger: what has been done.
        since: only instances ingested at or after a date (``2026-01-31``, UTC, or a whole ISO 8601 time), or after a
            version of `instances` (a number).
        limit: at most so many instances are scored.

    Raises:
        DataError: nothing is stored in the cohort, or its pixels were prepared in several ways.
        UsageError: `since` is neither a date nor a version.
    """
    version = lake.version(INSTANCES)
    moment, older = since_limits(lake, cohort, since)
    flagged = kept_from_scores(lake, cohort)
    done, held = ledger.known(), pa.array(sorted(flagged), pa.string())
    columns = [*_KEYS, *_KINDS, "ingested_at"]
    units: list[Unit] = []
    kinds: set[tuple[Any, ...]] = set()
    stored = scored = 0
    left = limit
    where: Filter = {"cohort": cohort, "outcome": "stored", **({} if only is None else {"sop_instance_uid": only})}
    for file in lake.files(INSTANCES, version, where):
        rows = newer(
            select_rows(read_file(lake.storage, INSTANCES, file, list(dict.fromkeys([*columns, *where]))), where),
            moment,
            older,
        )
        kinds |= {tuple(row.values()) for row in rows.select(_KINDS).group_by(_KINDS).aggregate([]).to_pylist()}
        stored += rows.num_rows
        missing = rows.filter(_not_in(rows["sop_instance_uid"], done))
        scored += rows.num_rows - missing.num_rows
        wanted = missing.filter(_not_in(missing["sop_instance_uid"], held))
        wanted = wanted if left is None else wanted.slice(0, left)
        left = None if left is None else left - wanted.num_rows
        if wanted.num_rows:
            units.append(Unit(file, wanted["object_key"].combine_chunks()))
    if not kinds:
        raise DataError(
            f"cohort '{cohort}' has no stored images{' since then' if since else ''}; "
            f"run `memmc ingest SOURCE --cohort {cohort}`"
        )
    preparation = one_preparation([dict(zip(_KINDS, kind, strict=True)) for kind in kinds])
    reasons = _reasons(lake, cohort, version, ledger, flagged, moment, older)
    if only is not None:
        reasons = reasons.filter(pc.call_function("is_in", [reasons["sop_instance_uid"]], _set(only)))
    return ScorePlan(version, preparation, stored, scored, tuple(units), reasons)


def _reasons(
    lake: Lake,
    cohort: str,
    version: int,
    ledger: ScoreLedger,
    flagged: dict[str, str],
    moment: datetime | None,
    older: pa.Array | None,
) -> pa.Table:
    """Return one row per instance that gets no score and has no row yet.

    The reason of what ingest kept out is ingest's; that of a flagged image is the first of its flags. A copy, or an
    object that carries the UID of a stored one, is no instance of its own.
    """
    columns = ["object_key", "sop_instance_uid", "patient_key", "study_uid", "reason", "ingested_at"]
    kept_out = lake.read(INSTANCES, columns, version, {"cohort": cohort, "outcome": _UNSCORABLE})
    kept_out = kept_out.filter(pc.call_function("is_valid", [kept_out["sop_instance_uid"]]))
    parts = [kept_out]
    if kept_out.num_rows:
        stored = lake.read(INSTANCES, ["sop_instance_uid"], version, {"cohort": cohort, "outcome": "stored"})
        parts = [kept_out.filter(_not_in(kept_out["sop_instance_uid"], stored["sop_instance_uid"].combine_chunks()))]
    if flagged:
        where: Filter = {"cohort": cohort, "outcome": "stored", "sop_instance_uid": list(flagged)}
        parts.append(lake.read(INSTANCES, columns, version, where))
    rows = newer(pa.concat_tables(parts), moment, older)
    rows = rows.filter(_not_in(rows["sop_instance_uid"], ledger.known(without_score=True)))
    found: dict[str, dict[str, Any]] = {}
    for row in rows.to_pylist():
        uid = row["sop_instance_uid"]
        found.setdefault(uid, {**{name: row[name] for name in _NAMED}, "not_scored": row["reason"] or flagged[uid]})
    schema = pa.schema([(name, pa.string()) for name in (*_NAMED, "not_scored")])
    return pa.Table.from_pylist(list(found.values()), schema=schema)


def since_limits(lake: Lake, cohort: str, since: str | None) -> tuple[datetime | None, pa.Array | None]:
    """Return the earliest time, or the object keys that are too old, of a `since` as in `plan_scores`.

    Raises:
        UsageError: it is neither a date nor a version.
    """
    if since is None:
        return None, None
    if re.fullmatch(r"[0-9]{1,7}", since):
        return None, lake.read(INSTANCES, ["object_key"], int(since), {"cohort": cohort})["object_key"].combine_chunks()
    try:
        moment = datetime.fromisoformat(since)
    except ValueError:
        raise UsageError("--since: expected a date (2026-01-31), an ISO 8601 time, or a table version") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC), None


def newer(rows: pa.Table, moment: datetime | None, older: pa.Array | None) -> pa.Table:
    """Return the rows within the limits of `since_limits`; they need `object_key` and `ingested_at`."""
    if older is not None:
        return rows.filter(_not_in(rows["object_key"], older))
    if moment is not None:
        limit = pa.scalar(moment, pa.timestamp("us", tz="UTC"))
        return rows.filter(pc.call_function("greater_equal", [rows["ingested_at"], limit]))
    return rows


def _set(uids: Collection[str]) -> pc.SetLookupOptions:
    return pc.SetLookupOptions(value_set=pa.array(list(uids), pa.string()))


def _not_in(column: Any, values: pa.Array) -> Any:
    return pc.call_function("invert", [pc.call_function("is_in", [column], pc.SetLookupOptions(value_set=values))])
