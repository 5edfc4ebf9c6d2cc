"""Compare: two models on the studies of one cohort, before one takes the other's place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memmc.config import Config
from memmc.errors import DataError
from memmc.evaluation.comparison import AurocDifference, StudyChange, changes, compare_auroc
from memmc.lake.tables import Lake
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.quality import flags_of
from memmc.pipeline.results import Result
from memmc.pipeline.select import copies, met_patients, newest_calibration, scored_instances
from memmc.scoring.studies import study_rows, why_no_verdict


@dataclass(frozen=True)
class CompareResult(Result):
    """What changes for the studies of a cohort.

    Attributes:
        model_a, model_b: "name/version".
        num_studies: on which both models have a verdict.
        num_flagged: abnormal under the second model only.
        num_cleared: abnormal under the first model only.
        flagged_a, flagged_b: abnormal under each, of all that it judged.
        quality: AUROC on labelled studies of patients that neither model met, if both classes are there.
        studies: on which both have a verdict (`evaluation.comparison.StudyChange`), those that change side first.
        unjudged: why a model has no verdict on any study; None where both have.
    """

    model_a: str
    model_b: str
    cohort: str
    num_studies: int
    num_flagged: int
    num_cleared: int
    flagged_a: int
    flagged_b: int
    quality: dict[str, Any] | None
    studies: list[dict[str, Any]]
    unjudged: str | None = None


def compare(
    config: Config, model_a: str, model_b: str, cohort: str, *, progress: Progress | None = None
) -> CompareResult:
    """Return which studies of a cohort change side from the first model to the second, and by how much.

    Instances that a model has not scored yet are scored first.

    Raises:
        DataError: nothing stored in the cohort, a model is not calibrated, its calibration knows no studies, or scores
            are missing and `operate.window` is closed.
        ModelError: no such model.
    """
    from memmc.pipeline.score import score_all

    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    models = [open_model(config, home_directory(), reference) for reference in (model_a, model_b)]
    studies: list[list[dict[str, Any]]] = []
    patients: dict[str, str] = {}
    for model in models:
        score_all(config, cohort, model.ref, progress=progress)
        rows, owners = _studies(config, lake, model, cohort)
        studies.append(rows)
        patients |= owners
    found = changes(studies[0], studies[1])
    unjudged = "; ".join(why for model in models if (why := _unjudged(lake, model))) or None
    if unjudged:
        progress.message(f"no study can change side: {unjudged}")
    known = _known(lake, models, cohort)
    unseen = [
        [row for row in rows if patients[row["study_uid"]] not in known and row["study_uid"] not in known]
        for rows in studies
    ]
    settings = config.evaluate
    quality = compare_auroc(
        unseen[0],
        unseen[1],
        patients,
        resamplings=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    return _result(models, cohort, found, studies, quality, unjudged)


def _unjudged(lake: Lake, model: OpenModel) -> str | None:
    calibration = newest_calibration(lake, model)
    why = why_no_verdict(calibration["study_p_values"], calibration["false_positive_rate"])
    return f"{model.ref} was calibrated on {why}" if why else None


def _known(lake: Lake, models: list[OpenModel], cohort: str) -> set[str]:
    """Return what a model may have learned from: patients, and studies that hold a copy of another patient's image."""
    where = {"cohort": cohort, "outcome": "stored", "sop_instance_uid": tuple(copies(flags_of(lake, cohort)))}
    rows = lake.read("instances", ["sop_instance_uid", "study_uid"], filter=where).to_pylist()
    studies = {row["study_uid"] or row["sop_instance_uid"] for row in rows}
    return studies.union(*(met_patients(lake, model) for model in models))


def _studies(config: Config, lake: Lake, model: OpenModel, cohort: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a model's study rows by its newest calibration, and the patient of each study."""
    calibration = newest_calibration(lake, model)
    if not calibration["study_p_values"]:
        raise DataError(f"the calibration of {model.ref} knows no studies; run `memmc calibrate --model {model.ref}`")
    rows = scored_instances(config, lake, cohort, model.ref)
    mine = [row for row in rows if row["calibration_id"] == calibration["calibration_id"]]
    owners = {row["study_uid"] or row["sop_instance_uid"]: row["patient_key"] for row in mine}
    return study_rows(mine, calibration["study_p_values"], calibration["false_positive_rate"]), owners


def _result(
    models: list[OpenModel],
    cohort: str,
    found: list[StudyChange],
    studies: list[list[dict[str, Any]]],
    quality: AurocDifference | None,
    unjudged: str | None,
) -> CompareResult:
    return CompareResult(
        model_a=models[0].ref,
        model_b=models[1].ref,
        cohort=cohort,
        num_studies=len(found),
        num_flagged=sum(item.change == "flagged" for item in found),
        num_cleared=sum(item.change == "cleared" for item in found),
        flagged_a=sum(bool(row["is_abnormal"]) for row in studies[0]),
        flagged_b=sum(bool(row["is_abnormal"]) for row in studies[1]),
        quality=asdict(quality) if quality else None,
        studies=[asdict(item) for item in found],
        unjudged=unjudged,
    )
