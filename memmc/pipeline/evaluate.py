"""Evaluate: quality on labelled patients the model never met, beside controls without a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from memmc.config import Config
from memmc.lake.tables import Lake
from memmc.pipeline.assess import Assessment, assess
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.model_card import add_evaluation
from memmc.pipeline.models import OpenModel, open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import EvaluationResult


@recorded(
    "evaluate",
    lambda done: {
        "model": done.model,
        "calibration_id": done.calibration_id,
        "auroc": done.auroc,
        "normal": done.num_normal,
        "abnormal": done.num_abnormal,
    },
)
def evaluate(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    masks: Path | None = None,
    boxes: Path | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure a model on every labelled instance of a cohort whose patient it was neither trained nor calibrated on.

    Instances that are not scored yet are scored first. The figures are added to the model's card.

    Args:
        masks: CSV of lesion masks (see `memmc.pipeline.images.read_masks`); adds `localisation`.
        boxes: CSV of lesion boxes (see `memmc.pipeline.localise.read_boxes`); adds `boxes`.

    Raises:
        MissingClassError: no normal or no abnormal image of an unseen patient.
        DataError: the model is not calibrated; or scores are missing and `operate.window` is closed.
        ModelError: no such model.
        StorageError: the lake or the model registry cannot be reached.
    """
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    home = home_directory()
    opened = open_model(config, home, model, cohort)
    measured = as_result(assess(config, lake, opened, cohort, masks, progress, boxes), opened, cohort)
    add_evaluation(tracking_of(config, home), opened, measured)
    return measured


def as_result(assessment: Assessment, model: OpenModel, cohort: str) -> EvaluationResult:
    """Return the figures of an assessment."""
    measured = assessment.evaluation
    return EvaluationResult(
        auroc=measured.auroc,
        auroc_low=measured.auroc_interval.low,
        auroc_high=measured.auroc_interval.high,
        average_precision=measured.average_precision,
        controls={control.name: control.auroc for control in assessment.controls},
        num_normal=measured.num_normal,
        num_abnormal=measured.num_abnormal,
        model=model.ref,
        cohort=cohort,
        calibration_id=assessment.calibration["calibration_id"],
        scorer=assessment.calibration["scorer"],
        average_precision_low=measured.average_precision_interval.low,
        average_precision_high=measured.average_precision_interval.high,
        false_positive_rate=measured.false_positive_rate,
        false_positive_rate_low=measured.false_positive_rate_interval.low,
        false_positive_rate_high=measured.false_positive_rate_interval.high,
        chosen_false_positive_rate=assessment.calibration["false_positive_rate"],
        sensitivity=measured.sensitivity,
        pixel_auroc=assessment.localisation.pixel_auroc if assessment.localisation else None,
        localisation=asdict(assessment.localisation) if assessment.localisation else None,
        boxes=asdict(assessment.boxes) if assessment.boxes else None,
        sensitivity_at=[asdict(item) for item in assessment.sensitivities],
        rates=[asdict(item) for item in assessment.rates],
        groups=[asdict(item) for item in assessment.groups],
        tables_read=dict(assessment.versions),
    )
