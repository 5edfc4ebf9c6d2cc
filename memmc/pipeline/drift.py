"""Drift: is a cohort's stream still what the model was made for? No label is used."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.monitoring.drift import Conformal, Sample, Shift, compare
from memmc.monitoring.pixels import pixel_statistics
from memmc.pipeline.findings import record
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_images
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.observed import NUMBERS, WORDS, Row, baseline_rows, drawn, one_each, window_rows
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import kept_from_scores
from memmc.pipeline.results import Result
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.scoring.strata import POOLED, Stratum, judge_of, stratum_names

ALARM = "drift"
_SHOWN = 12  # tests of a calm window that are kept
_SCORED = 20_000  # patients whose scores are compared, at most
_NEARLY_ALL = 0.9  # of the baseline's others; fewer scores would leave normals that are calmer than any stream

_Scores = tuple[dict[str, NDArray[np.float64]], tuple[int, int]]  # by scanner; how many are flagged, of how many


@dataclass(frozen=True)
class DriftResult(Result):
    """A window of new instances against a model's baseline.

    Attributes:
        run: names the look in the table `monitoring`.
        baseline_version: of `instances`, the model's.
        version: of `instances`, at the look.
        num_baseline: patients whose images are compared with.
        num_window: patients of the window.
        num_scored: of them, those with a score of this model and calibration.
        tested: the window and the baseline had enough patients (`monitor.min_window`).
        drifted: some test says so.
        findings: what has drifted, in words.
        shifts: the tests that say so, then the most surprising others; fields as in `memmc.monitoring.drift.Shift`.
        num_tests: all tests made, which the adjusted p-values take into account.
        left_out: tests that could not be made, and why.
    """

    cohort: str
    model: str
    model_digest: str
    calibration_id: str
    run: str
    since: str | None
    baseline_version: int
    version: int
    num_baseline: int
    num_window: int
    num_scored: int
    tested: bool
    drifted: bool
    num_tests: int = 0
    findings: list[str] = field(default_factory=list[str])
    shifts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list[str])


def drift(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    since: str | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> DriftResult:
    """Compare a window of a cohort with the baseline of a model, and keep what was found.

    The baseline is what the model's cohort held at its dataset version and the model did not learn from. One image a
    patient is compared. Scores are compared where window and baseline have been scored; nothing is scored here.

    Args:
        model: the champion when absent.
        since: a date or a version of `instances`; the last `monitor.window_days` when absent.
        now: end of the window.

    Raises:
        DataError: the model is not calibrated.
        PreprocessMismatch: the window's pixels were prepared otherwise than the model's.
        UsageError: `since` is neither a date nor a version.
    """
    began, rules, now = time.monotonic(), config.monitor, now or datetime.now(UTC)
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    version = lake.version(INSTANCES)
    window = drawn(one_each(window_rows(lake, cohort, opened, since, rules, now)), _SCORED, rules.seed).to_pylist()
    baseline = drawn(one_each(baseline_rows(lake, opened)), _SCORED, rules.seed).to_pylist()
    opened.require({row["preprocess_id"] for row in window})
    tested = min(len(window), len(baseline)) >= rules.min_window
    scored = _scores_of(lake, cohort, opened, calibration, window)
    shifts: list[Shift] = []
    left_out: list[str] = []
    if tested:
        progress.stage("drift", len(window) + len(baseline))
        old, new = (_some(rows, rules.max_images, rules.seed) for rows in (baseline, window))
        columns = tuple(calibration["strata_columns"] or ())
        known, missing = _known_scores(lake, opened, calibration, baseline, rules.seed)
        if missing:
            left_out.append(missing)
            progress.message(missing)
        shifts = compare(
            _sample(lake, opened.cohort, opened, old, columns, *known),
            _sample(lake, cohort, opened, new, columns, *_by_stratum(window, scored, columns)),
            _conformal(calibration, scored),
            rules,
        )
    found = [shift for shift in shifts if shift.drifted]
    result = DriftResult(
        cohort=cohort,
        model=opened.ref,
        model_digest=opened.digest,
        calibration_id=calibration["calibration_id"],
        run=f"drift-{cohort}-{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        since=since,
        baseline_version=opened.dataset_version,
        version=version,
        num_baseline=len(baseline),
        num_window=len(window),
        num_scored=len(scored),
        tested=tested,
        drifted=bool(found),
        num_tests=len(shifts),
        findings=[in_words(shift) for shift in found],
        shifts=[asdict(shift) for shift in [*found, *[item for item in shifts if not item.drifted][:_SHOWN]]],
        seconds=round(time.monotonic() - began, 2),
        left_out=left_out,
    )
    _record(lake, result, shifts, now)
    return result


def _some(rows: list[Row], most: int, seed: int) -> list[Row]:
    """Return at most so many rows, in order: those whose pixels are read."""
    if len(rows) <= most:
        return rows
    return [rows[index] for index in np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]


def in_words(shift: Shift) -> str:
    """Return a finding as a line, without patient data."""
    where = "" if shift.stratum == POOLED else f" of {shift.stratum}"
    return f"{shift.group}: {shift.name}{where} (effect {shift.effect:.2f}, adjusted p {shift.adjusted:.2g})"


def _sample(
    lake: Lake,
    cohort: str,
    model: OpenModel,
    rows: Sequence[Row],
    columns: tuple[str, ...],
    scores: dict[str, NDArray[np.float64]],
    flagged: tuple[int, int],
) -> Sample:
    from memmc.model.artifact import load_model
    from memmc.scoring.embedding import embeddings

    images_NHWC = read_images(lake, cohort, [row["sop_instance_uid"] for row in rows])
    return Sample(
        headers={name: ["absent" if row[name] is None else str(row[name]) for row in rows] for name in WORDS},
        numbers={name: np.array([row[name] for row in rows], np.float64) for name in NUMBERS},
        pixels=pixel_statistics(images_NHWC.mean(-1)),
        embeddings_ND=embeddings(load_model(model.folder), images_NHWC),
        strata=stratum_names({name: [row[name] for row in rows] for name in columns}, len(rows)),
        scores=scores,
        flagged=flagged,
    )


def _scores_of(
    lake: Lake, cohort: str, model: OpenModel, calibration: Mapping[str, Any], rows: Sequence[Row]
) -> dict[str, Row]:
    """Return the score rows of instances that have one, by UID."""
    known = score_rows(lake, cohort, model, calibration["calibration_id"])
    wanted = [row["sop_instance_uid"] for row in rows]
    return {uid: known[uid] for uid in wanted if uid in known}


def _by_stratum(rows: Sequence[Row], scored: Mapping[str, Row], columns: tuple[str, ...]) -> _Scores:
    """Return the scores of instances by scanner, and how many are flagged, of how many."""
    judged = [row for row in rows if row["sop_instance_uid"] in scored]
    names = stratum_names({name: [row[name] for row in judged] for name in columns}, len(judged))
    found: dict[str, list[float]] = {}
    for name, row in zip(names, judged, strict=True):
        found.setdefault(name, []).append(scored[row["sop_instance_uid"]]["anomaly_score"])
    flagged = sum(bool(scored[row["sop_instance_uid"]]["is_abnormal"]) for row in judged)
    return {name: np.array(values, np.float64) for name, values in found.items()}, (flagged, len(judged))


def _known_scores(
    lake: Lake, model: OpenModel, calibration: Mapping[str, Any], rows: Sequence[Row], seed: int
) -> tuple[_Scores, str | None]:
    """Return the scores of a baseline that nothing was fitted on, as many as patients, or why there are none.

    Those of the normals that were calibrated on are the calibration's own, out of fold; the score rows of these
    normals are too good. All others have honest score rows, if they have any: without them the baseline would be
    normals alone. The calibration does not say whose its scores are, so of each stratum as large a share of its
    patients' number is drawn as the baseline has drawn of them.
    """
    judge = judge_of(calibration)
    strata = [Stratum.from_row(item) for item in calibration["strata"] or ()]
    own = strata[1:] or strata or [judge.strata[POOLED]]
    unscorable = kept_from_scores(lake, model.cohort)
    others = [
        row
        for row in rows
        if (row["split"], row["label"]) != ("calibrate", "normal") and row["sop_instance_uid"] not in unscorable
    ]
    scored = _scores_of(lake, model.cohort, model, calibration, others)
    if len(scored) < _NEARLY_ALL * len(others):
        return ({}, (0, 0)), (
            f"scores: {len(others) - len(scored)} of {len(others)} held-out images of the baseline that were not "
            f"calibrated on have no score; run `memmc score --cohort {model.cohort}`"
        )
    rng = np.random.default_rng(seed)
    sizes = [stratum.num_patients or stratum.num_normals for stratum in own]
    share = sum((row["split"], row["label"]) == ("calibrate", "normal") for row in rows) / max(sum(sizes), 1)
    found, (flagged, total) = _by_stratum(others, scored, tuple(calibration["strata_columns"] or ()))
    for stratum, size in zip(own, sizes, strict=True):
        mine = rng.choice(stratum.normal_scores, min(size, round(share * size)), replace=False)
        found[stratum.stratum] = np.concatenate([found.get(stratum.stratum, np.empty(0)), mine])
        flagged += int((mine > judge.threshold(stratum.stratum)).sum())
        total += len(mine)
    return (found, (flagged, total)), None


def _conformal(calibration: Mapping[str, Any], scored: Mapping[str, Row]) -> Conformal:
    judge = judge_of(calibration)
    found: dict[str, list[float]] = {}
    for row in scored.values():
        found.setdefault(row["stratum"] or POOLED, []).append(row["p_value"])
    return Conformal(
        {name: np.array(values, np.float64) for name, values in found.items()},
        {name: len(judge.strata[name].normal_scores) for name in found},
    )


def _record(lake: Lake, result: DriftResult, shifts: Sequence[Shift], now: datetime) -> None:
    """Keep every test, and one row for the window as a whole."""
    shared = {
        "model": result.model,
        "model_digest": result.model_digest,
        "calibration_id": result.calibration_id,
        "baseline_version": result.baseline_version,
        "version": result.version,
    }
    whole = {
        "name": "window",
        "num_baseline": result.num_baseline,
        "num_window": result.num_window,
        "value": max((shift.effect for shift in shifts if shift.drifted), default=0.0),
        "adjusted": shifts[0].adjusted if shifts else None,
        "alarm": ALARM if result.drifted else None,
        "found": "; ".join([*result.findings, *result.left_out]) if result.tested else "too few patients",
    }
    rows = [
        {
            "name": f"{shift.group}: {shift.name}",
            "stratum": shift.stratum,
            "num_baseline": shift.num_baseline,
            "num_window": shift.num_window,
            "value": shift.effect,
            "p_value": shift.p_value,
            "adjusted": shift.adjusted,
            "alarm": ALARM if shift.drifted else None,
        }
        for shift in shifts
    ]
    record(lake, result.cohort, result.run, "drift", [whole, *rows], now, **shared)
