"""What evaluation and report both stand on: scores of unseen patients, controls, masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from memmc.config import Config
from memmc.errors import PreprocessMismatch
from memmc.evaluation.boxes import BoxFigures
from memmc.evaluation.controls import ControlResult, FittedControls, evaluate_controls
from memmc.evaluation.metrics import Evaluation, Interval, evaluate_scores
from memmc.evaluation.operating import RatePoint, SensitivityAt, rate_points, sensitivities
from memmc.evaluation.report_data import GroupResult, Localisation
from memmc.evaluation.subgroups import subgroups
from memmc.lake.tables import Lake
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.images import Images, image_batches, read_images, read_masks
from memmc.pipeline.localise import drawn_masks, localise_boxes, localise_masks, not_placed, read_boxes
from memmc.pipeline.models import OpenModel, fit_of
from memmc.pipeline.progress import Progress
from memmc.pipeline.select import (
    newest_calibration,
    normals,
    one_a_patient,
    one_preparation,
    score_rows,
    unmet,
    versions_read,
)
from memmc.scoring.calibration import observed_rate_interval
from memmc.scoring.maps import decode_map
from memmc.scoring.mean_image import FittedMeanImage
from memmc.scoring.scorer import MIN_NORMALS
from memmc.scoring.strata import POOLED, judge_of

_CONTROL_NORMALS = 1000
_AT_ONCE = 256  # images of unmet patients that are held in memory
_SPECIFICITIES = (0.90, 0.95)


@dataclass(frozen=True)
class Assessment:
    """Measured quality, and the rows it was measured on.

    Attributes:
        rows: instances of unseen patients joined to their scores.
        calibration: the calibration row the scores were judged by.
        masks: lesion mask (H, W) by SOP Instance UID, of the abnormal rows that have one with a pixel in it.
        versions: of the tables that rows and labels were read from.
    """

    rows: list[dict[str, Any]]
    calibration: dict[str, Any]
    evaluation: Evaluation
    controls: tuple[ControlResult, ...]
    masks: dict[str, Any]
    localisation: Localisation | None
    groups: tuple[GroupResult, ...] = ()
    sensitivities: tuple[SensitivityAt, ...] = ()
    rates: tuple[RatePoint, ...] = ()
    boxes: BoxFigures | None = None
    versions: Mapping[str, int] = field(default_factory=dict[str, int])


def assess(
    config: Config,
    lake: Lake,
    model: OpenModel,
    cohort: str,
    masks: Path | None,
    progress: Progress,
    boxes: Path | None = None,
) -> Assessment:
    """Score what is not scored yet, then measure.

    Raises:
        MissingClassError: one class is missing among unseen patients.
        DataError: the model is not calibrated; or scores are missing and `operate.window` is closed.
        PreprocessMismatch: the cohort's pixels were prepared otherwise than the model's, or masks cannot be placed.
    """
    if masks is not None and fit_of(config, model) is None:
        raise PreprocessMismatch(not_placed(config, model, "--masks"))
    calibration = newest_calibration(lake, model)
    versions, instances = _scored(config, lake, model, cohort, calibration["calibration_id"], progress)
    scores = score_rows(lake, cohort, model, calibration["calibration_id"])
    rows = [{**row, **scores[row["sop_instance_uid"]]} for row in instances if row["sop_instance_uid"] in scores]
    uids = [row["sop_instance_uid"] for row in rows]
    labels = np.array([row["label"] == "abnormal" for row in rows])
    values = np.array([row["anomaly_score"] for row in rows])
    flagged = np.array([row["is_abnormal"] for row in rows])
    patients = [row["patient_key"] for row in rows]
    settings: dict[str, Any] = {
        "resamplings": config.evaluate.bootstrap,
        "confidence": config.evaluate.confidence,
        "seed": config.evaluate.seed,
    }
    progress.stage("evaluate")
    evaluation = evaluate_scores(labels, values, flagged, patients, **settings)
    raw = scores_without_model(config, lake, model, calibration, cohort, uids)
    controls = evaluate_controls(raw, labels, values, patients, **settings)
    key, calibration_id = held_key(config, home_directory()), calibration["calibration_id"]
    drawn = read_boxes(boxes, key) if boxes else None
    mine, left_out = drawn_masks(rows, read_masks(masks, key, config.data) if masks else {})
    if left_out:
        progress.message(f"{left_out} masks without a stored pixel, or of images not labelled abnormal, are left out")
    maps = read_maps(lake, cohort, model, calibration_id, list(mine)) if mine else []
    found = localise_masks(maps, list(mine.values()), calibration, config.evaluate.seed) if mine else None
    judged, confidence = one_a_patient([row for row in rows if row["label"] == "normal"]), config.evaluate.confidence
    return Assessment(
        rows,
        calibration,
        evaluation,
        controls,
        mine,
        None if found is None else replace(found, num_left_out=left_out),
        groups=subgroups(rows, **settings),
        sensitivities=sensitivities(labels, values, patients, _SPECIFICITIES, **settings),
        rates=rate_points([row["p_value"] for row in judged], _expected(calibration, judged, confidence), confidence),
        boxes=localise_boxes(config, lake, model, cohort, calibration_id, uids, drawn) if drawn is not None else None,
        versions=versions,
    )


def _scored(
    config: Config, lake: Lake, model: OpenModel, cohort: str, calibration_id: str, progress: Progress
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the instances to measure on and the versions of the tables that say so, all of them scored."""
    from memmc.pipeline.score import score_all

    versions, instances = versions_read(lake), unmet(lake, model, cohort)
    model.require({one_preparation_id(instances)})
    known = score_rows(lake, cohort, model, calibration_id, without_score=True)
    if {row["sop_instance_uid"] for row in instances} - known.keys():
        score_all(config, cohort, model.ref, progress=progress)
        # What had not been gated is now; instances that it flags are not measured on.
        versions, instances = versions_read(lake), unmet(lake, model, cohort)
    return versions, instances


def _rates(calibration: dict[str, Any]) -> list[float]:
    """Return the rates whose thresholds the calibration keeps, the chosen one among them."""
    pooled = judge_of(calibration).strata[POOLED]
    kept = {item.rate for item in pooled.thresholds if item.refused is None}
    return sorted(kept | {calibration["false_positive_rate"]})


def _expected(calibration: dict[str, Any], new: list[dict[str, Any]], confidence: float) -> dict[float, Interval]:
    """Return by rate where the flagged share of new normals lies, if they are like the held-out ones, one a patient."""
    judge, strata = judge_of(calibration), [row["stratum"] for row in new]
    return {
        rate: Interval(*observed_rate_interval(judge.fewest_normals(strata, rate), rate, len(new), confidence))
        for rate in _rates(calibration)
    }


def read_maps(lake: Lake, cohort: str, model: OpenModel, calibration_id: str, uids: list[str]) -> list[Any]:
    """Return anomaly maps (H, W) float16, in the order of the UIDs."""
    columns = ("anomaly_map", "map_height", "map_width")
    rows = score_rows(lake, cohort, model, calibration_id, columns, uids=uids)
    chosen = [rows[uid] for uid in uids]
    return [decode_map(row["anomaly_map"], row["map_height"], row["map_width"]) for row in chosen]


def one_preparation_id(rows: list[dict[str, Any]]) -> str:
    """Return the `preprocess_id` all rows share; see `select.one_preparation`."""
    return str(one_preparation(rows)["preprocess_id"])


def scores_without_model(
    config: Config, lake: Lake, model: OpenModel, calibration: dict[str, Any], cohort: str, uids: list[str]
) -> dict[str, Any]:
    """Return the raw scores of all controls, (N,) per name, in the order of the UIDs.

    The images are read some at a time. Too few held-out normals leave the mean image out.
    """
    seed = config.evaluate.seed
    train_NHW = _some_normals(lake, model.cohort, "train", model.dataset_version, seed)
    held_NHW = _some_normals(lake, calibration["cohort"], "calibrate", calibration["dataset_version"], seed)
    controls = FittedControls.fit(train_NHW)
    mean_image = FittedMeanImage.fit(config.score, train_NHW, held_NHW) if len(held_NHW) >= MIN_NORMALS else None
    read: list[str] = []
    parts: list[dict[str, Any]] = []
    for names, images_NHWC in image_batches(lake, cohort, uids, _AT_ONCE):
        grey_NHW = images_NHWC.mean(axis=-1)
        found = controls.scores(grey_NHW)
        parts.append(found if mean_image is None else {**found, "mean_image": mean_image.scores(grey_NHW)})
        read += names
    place = {uid: number for number, uid in enumerate(read)}
    order = [place[uid] for uid in uids]
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def _some_normals(lake: Lake, cohort: str, split: str, version: int, seed: int) -> Images:
    """Return at most 1,000 grey images_NHW of a share's normals, drawn by a seed."""
    uids = sorted(row["sop_instance_uid"] for row in normals(lake, cohort, split, version))
    if len(uids) > _CONTROL_NORMALS:
        draw = np.random.default_rng(seed).choice(len(uids), _CONTROL_NORMALS, replace=False)
        uids = [uids[index] for index in sorted(draw)]
    return read_images(lake, cohort, uids, version).mean(axis=-1)
