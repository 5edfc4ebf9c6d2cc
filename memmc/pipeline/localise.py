"""Localise: heat maps and their regions against lesion masks and boxes, beside controls without a model."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from memmc.config import Config
from memmc.dicom.deidentify import keyed_uid
from memmc.dicom.geometry import Box, Geometry
from memmc.errors import DataError, UsageError
from memmc.evaluation.boxes import BoxFigures, BoxImage, box_figures
from memmc.evaluation.localisation import pixel_figures
from memmc.evaluation.report_data import Localisation
from memmc.lake.tables import Lake
from memmc.pipeline.models import OpenModel, fit_of
from memmc.pipeline.select import score_rows

BOX_COLUMNS = ("x", "y", "width", "height")


def not_placed(config: Config, model: OpenModel, option: str) -> str:
    """Return why what is drawn on original images cannot be placed on the model's; see `models.fit_of`."""
    return (
        f"{option} are placed by the settings data.*, which give {config.preprocess_id} here and gave "
        f"{model.preprocess_id} when the pixels were made; call with those"
    )


def drawn_masks(rows: Sequence[Mapping[str, Any]], masks: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the masks of abnormal rows with a pixel in them, by SOP Instance UID, and how many others rows have.

    A table may hold an empty mask for every normal image, and a lesion may cover less than half a stored pixel: no map
    can agree with either. A mask of an image labelled normal contradicts its label.
    """
    of_rows = {row["sop_instance_uid"]: row["label"] for row in rows if row["sop_instance_uid"] in masks}
    found = {uid: masks[uid] for uid, label in of_rows.items() if label == "abnormal" and masks[uid].any()}
    return found, len(of_rows) - len(found)


def localise_masks(maps: list[Any], masks: list[Any], calibration: dict[str, Any], seed: int) -> Localisation:
    """Compare anomaly maps with lesion masks, over the images that have one.

    Raises:
        DataError: the calibration is of a version that set no level for maps.
    """
    if calibration["map_level"] is None:
        raise DataError("the calibration holds no level for maps; run `memmc calibrate` again")
    figures = pixel_figures(maps, masks, calibration["map_level"], seed)
    model = figures.pop("model")
    controls = {name: asdict(item) for name, item in figures.items()}
    return Localisation(len(masks), model.pixel_auroc, model.aupro, model.dice, controls)


def read_boxes(file: Path, key: bytes | None) -> dict[str, list[Box]]:
    """Return lesion boxes, px of the original image, by keyed SOP Instance UID.

    Args:
        file: CSV with the columns `sop_instance_uid`, `x`, `y` (left and top edge), `width` and `height`.
        key: the identity key, under which the file's UIDs are looked up.

    Raises:
        UsageError: no key, unreadable file, a column missing, or a value that is no box.
    """
    if key is None:
        raise UsageError(
            "boxes name SOPInstanceUIDs, which only the holder of the identity key can look up; set deid.key_file"
        )
    boxes: dict[str, list[Box]] = {}
    number = 1
    try:
        with file.open(newline="") as handle:
            for number, row in enumerate(csv.DictReader(handle), start=2):  # noqa: B007 - the error tells it
                box = Box(*(float(row[name]) for name in BOX_COLUMNS))
                if not (box.width_px > 0 and box.height_px > 0 and np.isfinite([box.x_px, box.y_px]).all()):
                    raise ValueError("no extent")
                boxes.setdefault(keyed_uid(key, row["sop_instance_uid"]), []).append(box)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(
            f"box table, line {number}: cannot be read ({type(error).__name__}); expected columns sop_instance_uid, "
            f"{', '.join(BOX_COLUMNS)} in px of the original image"
        ) from None
    return boxes


def localise_boxes(
    config: Config,
    lake: Lake,
    model: OpenModel,
    cohort: str,
    calibration_id: str,
    uids: list[str],
    boxes: dict[str, list[Box]],
) -> BoxFigures:
    """Compare the regions of these instances with boxes; an instance without a box counts as free of lesions.

    Raises:
        UsageError: `data.*` is not what the pixels were made with, so boxes cannot be placed.
        DataError: scores without regions, or no instance with a box.
    """
    fit = fit_of(config, model)
    if fit is None:
        raise UsageError(not_placed(config, model, "--boxes"))
    columns = ["sop_instance_uid", "rows", "columns", "height"]
    where = {"cohort": cohort, "outcome": "stored"}
    sizes = {row["sop_instance_uid"]: row for row in lake.read("instances", columns, filter=where).to_pylist()}
    scores = score_rows(lake, cohort, model, calibration_id, ("regions",), uids=uids)
    images: list[BoxImage] = []
    for uid in uids:
        size, regions = sizes[uid], scores[uid]["regions"]
        if regions is None:
            raise DataError("scores without regions, from before they were kept; run `memmc calibrate`, then score")
        geometry = Geometry(size["rows"], size["columns"], size["height"], fit)
        truth = [geometry.to_stored(box) for box in boxes.get(uid, [])]
        images.append(
            BoxImage(
                _array([[box.x_px, box.y_px, box.width_px, box.height_px] for box in truth]),
                _array([[item[f"{name}_px"] for name in BOX_COLUMNS] for item in regions]),
                np.array([item["peak"] for item in regions], dtype=np.float64),
                size["height"],
            )
        )
    return box_figures(images, config.evaluate.seed)


def _array(boxes: list[list[float]]) -> Any:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
