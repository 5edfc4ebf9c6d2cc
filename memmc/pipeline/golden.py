"""The golden set: fixed instances scored anew, held against the scores that the lake keeps of them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from memmc.config import Config
from memmc.lake.tables import Lake
from memmc.pipeline.findings import record
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.observed import baseline_rows, one_each, with_only
from memmc.pipeline.rescore import Rescorer
from memmc.pipeline.results import Result
from memmc.pipeline.select import newest_calibration, score_rows

ALARM = "golden_set"


@dataclass(frozen=True)
class GoldenResult(Result):
    """Fixed instances scored anew.

    Attributes:
        num_scans: compared; 0 before the model's own cohort has been scored.
        largest: difference, as a share of the kept score or, where that is smaller, of the median normal score.
        verdicts: that changed.
        moved: `largest` is beyond `monitor.golden_tolerance`: no score of this process should be written back.
    """

    cohort: str
    model: str
    model_digest: str
    calibration_id: str
    run: str
    num_scans: int
    largest: float
    tolerance: float
    verdicts: int
    moved: bool


def golden(config: Config, cohort: str, model: str | None = None, *, now: datetime | None = None) -> GoldenResult:
    """Score the golden set of a model and compare; keep what was found under the cohort's name.

    The set is the first held-out instances, by keyed UID, of the version that the model was trained on, as far as they
    have a score; it stays the same for a model unless one of them is erased.

    Args:
        model: the champion when absent.

    Raises:
        DataError: the model is not calibrated.
    """
    lake, now = Lake(config.lake.uri), now or datetime.now(UTC)
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    kept = score_rows(lake, opened.cohort, opened, calibration["calibration_id"])
    uids = golden_set(lake, opened, set(kept), config.monitor.golden_scans)
    differences, verdicts = np.zeros(0), 0
    if uids:
        rescorer = Rescorer(config, opened, calibration)
        scored = rescorer.score(rescorer.read(lake, opened.cohort, uids))
        pairs = [(row, kept[row["sop_instance_uid"]]) for row in scored]
        scale = float(np.median(calibration["normal_scores"]))
        new, old = (np.array([pair[side]["anomaly_score"] for pair in pairs], np.float64) for side in (0, 1))
        differences = np.abs(new - old) / np.maximum(np.abs(old), abs(scale))
        verdicts = sum(row["is_abnormal"] != before["is_abnormal"] for row, before in pairs)
    largest = float(np.nan_to_num(differences, nan=np.inf).max(initial=0.0))
    result = GoldenResult(
        cohort=cohort,
        model=opened.ref,
        model_digest=opened.digest,
        calibration_id=calibration["calibration_id"],
        run=f"golden-{cohort}-{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        num_scans=len(uids),
        largest=largest,
        tolerance=config.monitor.golden_tolerance,
        verdicts=verdicts,
        moved=largest > config.monitor.golden_tolerance,
    )
    row = {
        "name": "golden set",
        "model": result.model,
        "model_digest": result.model_digest,
        "calibration_id": result.calibration_id,
        "num_window": result.num_scans,
        "value": result.largest,
        "alarm": ALARM if result.moved else None,
    }
    record(lake, cohort, result.run, "golden", [row], now)
    return result


def golden_set(lake: Lake, model: OpenModel, scored: set[str], most: int) -> list[str]:
    """Return the SOP Instance UIDs of the golden set, in order: those of the test share before the calibrated ones."""
    rows = with_only(one_each(baseline_rows(lake, model)), "sop_instance_uid", scored)
    chosen = rows.sort_by([("split", "descending"), ("sop_instance_uid", "ascending")]).slice(0, most)
    return chosen["sop_instance_uid"].to_pylist()
