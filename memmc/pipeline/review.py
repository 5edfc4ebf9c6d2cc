"""Review: new normals that the champion finds odd wait for a person, and are not learned until one has accepted them.

Whoever labels an export normal labels some that are not; learned, such images become what normal looks like. The
screen costs true normals too, about the share `retrain.screen_p_value`, until somebody has looked.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from memmc.config import Config
from memmc.errors import DataError, UsageError
from memmc.lake.schemas import LABELS, REVIEWS, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline.audit import actor, note
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.models import OpenModel, open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import flags_of
from memmc.pipeline.results import Result
from memmc.pipeline.select import newest_calibration, newest_reviews, score_rows
from memmc.registry.promotion import champion_of
from memmc.scoring.calibration import smallest_rate
from memmc.scoring.strata import POOLED, judge_of

Row = dict[str, Any]
State = Literal["accepted", "rejected"]
NewLabel = Literal["unknown", "abnormal"]
_SOURCE = "review"


@dataclass(frozen=True)
class ScreenResult(Result):
    """What the champion thinks of new normals.

    Attributes:
        model: the champion; None where there is none yet, who would know nothing.
        screened: normals with a score that it neither learned nor was calibrated on.
        suspects: found now.
        waiting: suspects in all.
        limit: p-value at or below which a normal is suspect; higher in a stratum whose own normals are too few for it.
    """

    cohort: str
    model: str | None
    screened: int
    suspects: int
    waiting: int
    limit: float


@dataclass(frozen=True)
class ReviewResult(Result):
    """Instances under review, the least normal first, or those that were judged now."""

    cohort: str
    counts: dict[str, int]
    instances: list[dict[str, Any]]


def screen(config: Config, cohort: str, *, progress: Progress | None = None) -> ScreenResult:
    """Let the champion score the cohort's normals that it has not learned; keep those it finds odd as suspects.

    What a person has judged is not suspected again.

    Raises:
        DataError: nothing stored, the champion is not calibrated, or scores are missing and `operate.window` is closed.
        PreprocessMismatch: the cohort's pixels were prepared otherwise than the champion's.
    """
    from memmc.pipeline.score import score_all

    check_cohort(cohort)
    progress = progress or Silent()
    lake, home = Lake(config.lake.uri), home_directory()
    found = champion_of(tracking_of(config, home), f"memmc-{cohort}")
    if found is None:
        return ScreenResult(cohort, None, 0, 0, 0, config.retrain.screen_p_value)
    champion = open_model(config, home, found.ref)
    calibration = newest_calibration(lake, champion)
    limit = max(config.retrain.screen_p_value, smallest_rate(calibration["num_normals"]))
    score_all(config, cohort, champion.ref, progress=progress)
    progress.stage("screen")
    known = newest_reviews(lake, cohort)
    scores = score_rows(lake, cohort, champion, calibration["calibration_id"])
    rows = [
        {**row, **scores[row["sop_instance_uid"]]}
        for row in _new_normals(lake, cohort, champion)
        if row["sop_instance_uid"] in scores
    ]
    odd = suspects(rows, limit, _num_normals(calibration))
    new = [row for row in odd if row["sop_instance_uid"] not in known]
    if new:
        fixed = {"state": "suspect", "model": champion.ref, "model_digest": champion.digest}
        fixed |= {"calibration_id": calibration["calibration_id"]}
        _append(lake, [{**row, **fixed} for row in new], cohort)
    waiting = sum(row["state"] == "suspect" for row in known.values()) + len(new)
    return ScreenResult(cohort, champion.ref, len(rows), len(new), waiting, limit)


def suspects(scored: Sequence[Row], limit: float, num_normals: Mapping[str, int]) -> list[Row]:
    """Return the rows whose p-value is at most the limit, or the smallest that their stratum's normals can give.

    Args:
        scored: rows with `p_value` and `stratum`.
        limit: for strata whose normals carry it.
        num_normals: behind the p-values of a stratum.
    """
    least = {name: max(limit, smallest_rate(count)) for name, count in num_normals.items()}
    return [row for row in scored if row["p_value"] <= least.get(row["stratum"] or POOLED, limit) + 1e-12]


def _num_normals(calibration: Mapping[str, Any]) -> dict[str, int]:
    return {name: len(stratum.normal_scores) for name, stratum in judge_of(calibration).strata.items()}


def reviews(config: Config, cohort: str, *, every: bool = False) -> ReviewResult:
    """Return the instances that wait for a person; with `every` those that were judged too."""
    check_cohort(cohort)
    rows = newest_reviews(Lake(config.lake.uri), cohort).values()
    shown = [row for row in rows if every or row["state"] == "suspect"]
    return _result(cohort, rows, sorted(shown, key=lambda row: (row["p_value"] is None, row["p_value"] or 0.0)))


def settle(
    config: Config, cohort: str, uids: Sequence[str], state: State, *, label: NewLabel = "unknown"
) -> ReviewResult:
    """Accept instances as normal, or reject them: a rejected one is not normal any more, in whichever share it lies.

    An instance that is not under review can be rejected too: whoever finds a normal that is none says so here.

    Args:
        uids: pseudonymous SOP Instance UIDs.
        label: of rejected instances.

    Raises:
        UsageError: no UID.
        DataError: a UID is not a stored instance of the cohort, or is to be accepted and not under review.
    """
    check_cohort(cohort)
    lake, wanted = Lake(config.lake.uri), set(uids)
    if not wanted:
        raise UsageError("name at least one sop_instance_uid; `memmc review list` shows those that wait")
    where = {"cohort": cohort, "outcome": "stored"}
    columns = ["cohort", "sop_instance_uid", "patient_key"]
    stored = lake.read("instances", columns, None, where).to_pylist()
    known = newest_reviews(lake, cohort)
    rows = [row for row in stored if row["sop_instance_uid"] in wanted]
    _require(cohort, wanted, {row["sop_instance_uid"] for row in rows}, set(known) if state == "accepted" else None)
    before = {row["sop_instance_uid"]: known.get(row["sop_instance_uid"], {}) for row in rows}
    kept = ("p_value", "model", "model_digest", "calibration_id")
    done = [
        {
            **{name: before[row["sop_instance_uid"]].get(name) for name in kept},
            **row,
            "state": state,
            "reviewer": actor(),
        }
        for row in rows
    ]
    if state == "rejected":
        _relabel(lake, rows, label, cohort)
    _append(lake, done, cohort)
    note(config, "review", cohort=cohort, state=state, instances=len(done))
    return _result(cohort, newest_reviews(lake, cohort).values(), done)


def _require(cohort: str, wanted: set[str], stored: set[str], reviewed: set[str] | None) -> None:
    if wanted - stored:
        raise DataError(
            f"{len(wanted - stored)} of {len(wanted)} UIDs are not stored in cohort '{cohort}'; give the pseudonyms "
            "that `memmc review list` shows"
        )
    if reviewed is not None and wanted - reviewed:
        raise DataError(
            f"{len(wanted - reviewed)} of {len(wanted)} instances are not under review; nothing was written"
        )


def _new_normals(lake: Lake, cohort: str, champion: OpenModel) -> list[Row]:
    """Return the normals that the champion neither learned nor was calibrated on; of patients it has met too."""
    where: dict[str, Any] = {"cohort": cohort, "outcome": "stored", "label": "normal"}
    rows = lake.instances_with_labels(["cohort", "sop_instance_uid", "patient_key"], None, where).to_pylist()
    met = {**where, "cohort": champion.cohort, "split": ("train", "calibrate")}
    old = lake.instances_with_labels(["sop_instance_uid"], champion.dataset_version, met)["sop_instance_uid"]
    left_out = set(old.to_pylist()) | flags_of(lake, cohort).keys()
    return [row for row in rows if row["sop_instance_uid"] not in left_out]


def _append(lake: Lake, rows: Sequence[Row], cohort: str) -> None:
    now, names = datetime.now(UTC), SCHEMAS[REVIEWS].names
    whole = [{**row, "reviewed_at": now} for row in rows]
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in whole], schema=SCHEMAS[REVIEWS])
    lake.append(REVIEWS, table, f"review-{cohort}-{uuid.uuid4().hex[:12]}", {"cohort": cohort})


def _relabel(lake: Lake, rows: Sequence[Row], label: NewLabel, cohort: str) -> None:
    now = datetime.now(UTC)
    opinions = [
        {
            "cohort": row["cohort"],
            "sop_instance_uid": row["sop_instance_uid"],
            "label": label,
            "source": _SOURCE,
            "labelled_at": now,
        }
        for row in rows
    ]
    table = pa.Table.from_pylist(opinions, schema=SCHEMAS[LABELS])
    lake.append(LABELS, table, f"review-label-{cohort}-{uuid.uuid4().hex[:12]}", {"cohort": cohort})


def _result(cohort: str, rows: Collection[Row], shown: Sequence[Row]) -> ReviewResult:
    names = ("sop_instance_uid", "state", "p_value", "model", "reviewer")
    return ReviewResult(
        cohort,
        dict(sorted(Counter(row["state"] for row in rows).items())),
        [{name: row.get(name) for name in names} for row in shown],
    )
