"""Canaries: what share of planted lesions the model still finds in recent normal scans."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config, MonitorConfig
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.monitoring.canary import Planted, chance_of_no_fall, plant, sensitivity
from memmc.pipeline.findings import record, recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.observed import Row, one_each, without, without_calibrated
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import kept_from_scores
from memmc.pipeline.rescore import Rescorer, grey_images, with_pixels
from memmc.pipeline.results import Result
from memmc.pipeline.select import newest_calibration

ALARM = "canary_sensitivity"
MIN_SCANS = 5  # fewer say nothing
_ALL, _UNTOUCHED = "all lesions", "no lesion"
_CERTAIN = 0.01


@dataclass(frozen=True)
class CanaryResult(Result):
    """Planted lesions, found or not at the calibrated threshold.

    Attributes:
        num_scans: recent normal scans that the model has not learned from, each with every lesion in turn.
        tested: there were enough of them.
        sensitivity: share found, over all sizes and contrasts; low and high by bootstrapped scans.
        false_positive_rate: share of the same scans flagged without a lesion.
        curve: size, contrast, sensitivity, low, high.
        baseline: sensitivity of the first canaries of this model and calibration, None where these are they.
        p_value: of no fall below the baseline.
        fell: certainly, and by more than `monitor.max_sensitivity_drop`.
    """

    cohort: str
    model: str
    model_digest: str
    calibration_id: str
    run: str
    num_scans: int
    tested: bool
    sensitivity: float = 0.0
    low: float = 0.0
    high: float = 1.0
    false_positive_rate: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    baseline: float | None = None
    p_value: float | None = None
    fell: bool = False


def canaries(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> CanaryResult:
    """Plant lesions into recent normal scans, score them in this process, keep the sensitivity curve.

    Instances and scores of the lake stay as they are; scans with lesions exist in memory alone.

    Args:
        model: the champion when absent.

    Raises:
        DataError: the model is not calibrated.
        PreprocessMismatch: the scans were prepared otherwise than the model's.
    """
    lake, now, rules = Lake(config.lake.uri), now or datetime.now(UTC), config.monitor
    progress = progress or Silent()
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    uids = recent_normals(lake, cohort, opened, rules.canary_scans)
    named: dict[str, Any] = {
        "cohort": cohort,
        "model": opened.ref,
        "model_digest": opened.digest,
        "calibration_id": calibration["calibration_id"],
        "run": f"canary-{cohort}-{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        "num_scans": len(uids),
    }
    if len(uids) < MIN_SCANS:
        return CanaryResult(**named, tested=False)
    found_KN, untouched_N = _find(config, lake, cohort, opened, calibration, uids, progress)
    result = _judge(named, _grid(rules), found_KN, untouched_N, _before(lake, cohort, named), rules)
    _record(lake, result, found_KN, now)
    return result


def recent_normals(lake: Lake, cohort: str, model: OpenModel, most: int) -> list[str]:
    """Return the newest normal scans, one a patient, that the model was neither trained nor calibrated on."""
    columns = ["object_key", "sop_instance_uid", "patient_key", "preprocess_id", "ingested_at"]
    rows = lake.instances_with_labels(columns, None, {"cohort": cohort, "outcome": "stored", "label": "normal"})
    met = {"cohort": model.cohort, "outcome": "stored", "split": ("train", "calibrate")}
    learned = lake.read(INSTANCES, ["object_key"], model.dataset_version, met)["object_key"]
    new = without_calibrated(without(rows, "object_key", learned), lake, model)
    fit = without(new, "sop_instance_uid", kept_from_scores(lake, cohort))
    order = [("ingested_at", "descending"), ("sop_instance_uid", "descending")]
    chosen = one_each(fit).sort_by(order).slice(0, most)
    model.require(set(chosen["preprocess_id"].to_pylist()))
    return chosen["sop_instance_uid"].to_pylist()


def _grid(rules: MonitorConfig) -> list[tuple[float, float]]:
    """Return (size, contrast) of the K lesions that each scan gets in turn."""
    return [(size, contrast) for size in rules.canary_sizes for contrast in rules.canary_contrasts]


def _find(
    config: Config,
    lake: Lake,
    cohort: str,
    model: OpenModel,
    calibration: Mapping[str, Any],
    uids: Sequence[str],
    progress: Progress,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return found_KN, per lesion and scan, and flagged_N without a lesion.

    A scan's lesions lie at one place, and its masks are those of its UID: what differs is the lesion alone.
    """
    rescorer = Rescorer(config, model, calibration)
    rows = rescorer.read(lake, cohort, uids)
    images_NHWC = grey_images(rows)
    seeds = [config.monitor.seed + number for number in range(len(uids))]
    found: list[NDArray[np.bool_]] = []
    grid = _grid(config.monitor)
    progress.stage("canaries", (len(grid) + 1) * len(uids))
    for size, contrast in [(0.0, 0.0), *grid]:
        planted = images_NHWC.copy()
        if size:
            for number, seed in enumerate(seeds):
                for channel in range(planted.shape[3]):
                    planted[number, :, :, channel] = plant(
                        planted[number, :, :, channel], Planted(size, contrast, seed)
                    )
        found.append(_flags(rescorer.score(with_pixels(rows, planted)), uids))
        progress.advance(len(found) * len(uids))
    return np.stack(found[1:]), found[0]


def _flags(scored: Sequence[Row], uids: Sequence[str]) -> NDArray[np.bool_]:
    flagged = {row["sop_instance_uid"]: bool(row["is_abnormal"]) for row in scored}
    return np.array([flagged[uid] for uid in uids])


def _before(lake: Lake, cohort: str, named: Mapping[str, Any]) -> Row | None:
    """Return the first canaries of a model and calibration: those of the first look after its promotion."""
    rows = recorded(lake, cohort, "canary", named["model_digest"])
    known = [row for row in rows if row["name"] == _ALL and row["calibration_id"] == named["calibration_id"]]
    return known[0] if known else None


def _judge(
    named: Mapping[str, Any],
    grid: Sequence[tuple[float, float]],
    found_KN: NDArray[np.bool_],
    untouched_N: NDArray[np.bool_],
    before: Row | None,
    rules: MonitorConfig,
) -> CanaryResult:
    whole = sensitivity(found_KN.mean(0), 0.95, rules.seed)
    curve: list[dict[str, float]] = []
    for (size, contrast), found_N in zip(grid, found_KN, strict=True):
        curve.append({"size": size, "contrast": contrast, **vars(sensitivity(found_N.astype(float), 0.95, rules.seed))})
    chance = None if before is None else chance_of_no_fall(before["values"], found_KN.mean(0))
    fall = 0.0 if before is None else before["value"] - whole.sensitivity
    return CanaryResult(
        **named,
        tested=True,
        **vars(whole),
        false_positive_rate=float(untouched_N.mean()),
        curve=curve,
        baseline=None if before is None else before["value"],
        p_value=chance,
        fell=chance is not None and chance <= _CERTAIN and fall > rules.max_sensitivity_drop,
    )


def _record(lake: Lake, result: CanaryResult, found_KN: NDArray[np.bool_], now: datetime) -> None:
    shared: dict[str, Any] = {
        "model": result.model,
        "model_digest": result.model_digest,
        "calibration_id": result.calibration_id,
        "num_window": result.num_scans,
    }
    whole = {
        "name": _ALL,
        "value": result.sensitivity,
        "low": result.low,
        "high": result.high,
        "p_value": result.p_value,
        "values": found_KN.mean(0).tolist(),
        "alarm": ALARM if result.fell else None,
    }
    points = [
        {
            "name": f"size {point['size']:g} contrast {point['contrast']:g}",
            "value": point["sensitivity"],
            "low": point["low"],
            "high": point["high"],
        }
        for point in result.curve
    ]
    untouched = {"name": _UNTOUCHED, "value": result.false_positive_rate}
    record(lake, result.cohort, result.run, "canary", [whole, *points, untouched], now, **shared)
