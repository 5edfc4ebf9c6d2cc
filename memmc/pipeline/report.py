"""Report: everything a reader wants of one model and one cohort, on one page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.errors import DataError, IntegrityError, MissingClassError
from memmc.evaluation.report import render_report
from memmc.evaluation.report_data import (
    CalibrationFacts,
    Case,
    IngestCount,
    Provenance,
    Reason,
    ReportData,
    StratumFacts,
    TrainingCurve,
    select_cases,
)
from memmc.lake.tables import Lake
from memmc.pipeline.assess import Assessment, assess, read_maps
from memmc.pipeline.audit import recorded
from memmc.pipeline.evaluate import as_result
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_images
from memmc.pipeline.memory_health import memory_health
from memmc.pipeline.models import OpenModel, open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import EvaluationResult, ReportResult
from memmc.pipeline.select import newest_calibration, score_rows, versions_read
from memmc.pipeline.why import Explainer
from memmc.scoring.strata import POOLED, judge_of

_EXPLAINED, _PARTS = 3, 2
_PLACES = {"lake", "source", "deid", "tracking"}  # sections that a page does not show
_GALLERIES = ("most_abnormal", "calmest_normals", "typical_normals", "missed_abnormals", "flagged_normals")


def report(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    out: str | None = None,
    masks: Path | None = None,
    boxes: Path | None = None,
    progress: Progress | None = None,
) -> ReportResult:
    """Write the report of a model on a cohort; figures of quality only where there are labels.

    Args:
        out: the HTML file; `reports/<cohort>-<model>.html` in the lake when absent.

    Raises:
        DataError: the cohort has neither scores nor labelled images, or those that are labelled cannot be measured.
    """
    return report_and_evaluation(config, cohort, model, out=out, masks=masks, boxes=boxes, progress=progress)[0]


@recorded("report", lambda done: {"model": done[0].model, "measured": done[1] is not None})
def report_and_evaluation(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    out: str | None = None,
    masks: Path | None = None,
    boxes: Path | None = None,
    progress: Progress | None = None,
) -> tuple[ReportResult, EvaluationResult | None]:
    """Write the report, and return the evaluation it stands on; None where nothing is labelled."""
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    try:
        assessment = assess(config, lake, opened, cohort, masks, progress, boxes)
    except MissingClassError:
        assessment = None
    data = _gather(config, lake, opened, cohort, assessment)
    data = replace(data, reasons=_reasons(config, lake, opened, cohort, data.most_abnormal, progress))
    progress.stage("report")
    name = f"reports/{cohort}-{opened.ref.replace('/', '-v')}.html"
    page = render_report(data)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(page, encoding="utf-8")
    else:
        lake.storage.write(name, page.encode())
    where = out or lake.storage.join(name)
    evaluation = as_result(assessment, opened, cohort) if assessment else None
    return ReportResult(report=where, model=opened.ref, cohort=cohort), evaluation


def _gather(config: Config, lake: Lake, model: OpenModel, cohort: str, assessment: Assessment | None) -> ReportData:
    versions, calibration = versions_read(lake), newest_calibration(lake, model)
    known = score_rows(lake, cohort, model, calibration["calibration_id"], without_score=True)
    scores = {uid: row for uid, row in known.items() if row["not_scored"] is None}
    reasons = [row["not_scored"] for row in known.values() if row["not_scored"] is not None]
    if not scores:
        raise DataError(f"cohort '{cohort}' has no scores of {model.ref}; run `memmc score --cohort {cohort}`")
    rows = assessment.rows if assessment else [{**row, "label": "unknown"} for row in scores.values()]
    return ReportData(
        title=f"Anomaly report: cohort {cohort}",
        cohort=cohort,
        created_at=datetime.now(UTC),
        provenance=_provenance(config, model, assessment.versions if assessment else versions),
        calibration=_facts(calibration),
        scores=_array([row["anomaly_score"] for row in scores.values()]),
        num_flagged=sum(row["is_abnormal"] for row in scores.values()),
        num_patients=len({row["patient_key"] for row in scores.values()}),
        evaluation=assessment.evaluation if assessment else None,
        controls=assessment.controls if assessment else (),
        localisation=assessment.localisation if assessment else None,
        boxes=assessment.boxes if assessment else None,
        groups=assessment.groups if assessment else (),
        sensitivities=assessment.sensitivities if assessment else (),
        rates=assessment.rates if assessment else (),
        not_scored=dict(Counter(reasons).most_common()),
        reasons=(),
        **_galleries(lake, model, cohort, calibration["calibration_id"], rows, assessment),
        ingest=_account(lake, cohort),
        memory=memory_health(config, lake, model, cohort, assessment.rows if assessment else ()),
        training=_curve(config, model),
    )


def _facts(calibration: Mapping[str, Any]) -> CalibrationFacts:
    judge = judge_of(calibration)
    own = [stratum for name, stratum in sorted(judge.strata.items()) if name != POOLED]
    return CalibrationFacts(
        calibration_id=calibration["calibration_id"],
        scorer=calibration["scorer"],
        false_positive_rate=calibration["false_positive_rate"],
        threshold=calibration["threshold"],
        num_normals=calibration["num_normals"],
        map_scale=calibration["map_scale"],
        strata=tuple(StratumFacts(item.stratum, judge.threshold(item.stratum), item.num_normals) for item in own),
    )


def _galleries(
    lake: Lake,
    model: OpenModel,
    cohort: str,
    calibration_id: str,
    rows: list[dict[str, Any]],
    assessment: Assessment | None,
) -> dict[str, tuple[Case, ...]]:
    chosen = select_cases(
        [row["label"] for row in rows], [row["anomaly_score"] for row in rows], [row["is_abnormal"] for row in rows]
    )
    numbers = sorted({number for gallery in _GALLERIES for number in getattr(chosen, gallery)})
    uids = [rows[number]["sop_instance_uid"] for number in numbers]
    if not uids:
        return {}
    images = read_images(lake, cohort, uids)
    maps = read_maps(lake, cohort, model, calibration_id, uids)
    masks = assessment.masks if assessment else {}
    cases = {
        number: Case(
            case_id=rows[number]["sop_instance_uid"],
            image=image.mean(axis=-1),
            anomaly_map=anomaly_map,
            anomaly_score=rows[number]["anomaly_score"],
            p_value=rows[number]["p_value"],
            is_abnormal=rows[number]["is_abnormal"],
            label=rows[number]["label"],
            mask=masks.get(rows[number]["sop_instance_uid"]),
            score_spread=rows[number]["score_spread"],
        )
        for number, image, anomaly_map in zip(numbers, images, maps, strict=True)
    }
    return {gallery: tuple(cases[number] for number in getattr(chosen, gallery)) for gallery in _GALLERIES}


def _reasons(
    config: Config, lake: Lake, model: OpenModel, cohort: str, cases: tuple[Case, ...], progress: Progress
) -> tuple[Reason, ...]:
    """Explain the highest of the flagged; nothing where the training normals are no longer there to compare with."""
    flagged = [case for case in cases if case.is_abnormal][:_EXPLAINED]
    if not flagged:
        return ()
    try:
        explainer = Explainer.open(config, lake, model, progress)
    except IntegrityError:
        raise
    except DataError:
        return ()
    reasons: list[Reason] = []
    for case in flagged:
        found = explainer.explain(cohort, case.case_id)
        result, picture = found.result, explainer.picture(found)
        largest = sorted(result.scales, key=lambda item: -item["share"])[:_PARTS]
        region = None if result.region is None else result.region["p_value"]
        parts = tuple((item["part"], item["share"]) for item in largest)
        nearest = result.nearest[0]["similarity"]
        reasons.append(Reason(case.case_id, picture, case.p_value, region, parts, nearest))
    return tuple(reasons)


def _account(lake: Lake, cohort: str) -> tuple[IngestCount, ...]:
    table = lake.read("instances", ["outcome", "reason"], filter={"cohort": cohort})
    counts = Counter(zip(table["outcome"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return tuple(IngestCount(outcome, reason, count) for (outcome, reason), count in sorted(counts.items(), key=str))


def _provenance(config: Config, model: OpenModel, versions: Mapping[str, int]) -> Provenance:
    info = model.info
    return Provenance(
        model=model.ref,
        model_digest=model.digest,
        dataset_version=model.dataset_version,
        preprocess_id=model.preprocess_id,
        config_id=str(info["config_id"]),
        seeds={"train": int(info["seed"]), "evaluate": config.evaluate.seed},
        durations_s={"train": float(info.get("train_seconds", 0.0))},
        versions=dict(info.get("versions", {})),
        config_text=json.dumps(config.model_dump(mode="json", exclude=_PLACES), indent=2),
        tables_read=versions,
    )


def _curve(config: Config, model: OpenModel) -> TrainingCurve | None:
    history = tracking_of(config, home_directory()).metric_history(model.run_id, "loss")
    return TrainingCurve(steps=[step for step, _ in history], losses=[loss for _, loss in history]) if history else None


def _array(values: list[float]) -> Any:
    import numpy as np

    return np.array(values, dtype=np.float64)
