"""Maps: PNG pictures of scored scans with their heat map and regions, made on demand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config
from memmc.errors import DataError, StorageError, UsageError
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_images
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import MapsResult
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.scoring.maps import decode_map, overlay, png

Picture = NDArray[np.uint8]

SIDE_PX = 512
_AT_ONCE = 64
_BOX_COLOUR = (90, 200, 255)


@recorded("maps", lambda done: {"model": done.model, "pictures": done.pictures})
def maps(
    config: Config,
    cohort: str,
    out: Path,
    model: str | None = None,
    *,
    uids: Sequence[str] | None = None,
    side_px: int = SIDE_PX,
    progress: Progress | None = None,
) -> MapsResult:
    """Write one PNG for each scored instance, named by its pseudonymous SOP Instance UID.

    Colours run from 0 to the calibration's `map_scale`, the same for every scan; regions are framed.

    Args:
        out: folder, made when absent.
        uids: pseudonymous SOP Instance UIDs; all scored instances when absent.
        side_px: longer side of a picture.

    Raises:
        DataError: a UID has no score of the model's newest calibration in this cohort.
        StorageError: the folder cannot be written.
    """
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model, cohort)
    calibration = newest_calibration(lake, opened)
    scored = score_rows(lake, cohort, opened, calibration["calibration_id"], ("regions",))
    chosen = wanted(scored, uids, opened, cohort)
    progress.stage("maps", len(chosen))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(chosen), _AT_ONCE):
            some = chosen[start : start + _AT_ONCE]
            for uid, picture in drawn(lake, cohort, some, scored, calibration, side_px).items():
                (out / f"{uid}.png").write_bytes(png(picture))
            progress.advance(start + len(some))
    except OSError as error:
        raise StorageError(f"pictures cannot be written ({error.strerror}); check --out") from None
    return MapsResult(folder=str(out), cohort=cohort, model=opened.ref, pictures=len(chosen))


def wanted(scored: Collection[str], uids: Sequence[str] | None, model: OpenModel, cohort: str) -> list[str]:
    """Return the instances that are asked for, each once: all that are scored, in their order, where none is named.

    Raises:
        DataError: there is none, or one has no score.
    """
    chosen = sorted(scored) if uids is None else list(dict.fromkeys(uids))
    missing = sum(uid not in scored for uid in chosen)
    if missing or not chosen:
        raise DataError(
            f"{missing} of {len(chosen)} instances have no score of {model.ref} in cohort '{cohort}'; "
            f"run `memmc score --cohort {cohort}`"
        )
    return chosen


def drawn(
    lake: Lake,
    cohort: str,
    uids: Sequence[str],
    scored: Mapping[str, Mapping[str, Any]],
    calibration: Mapping[str, Any],
    side_px: int,
) -> dict[str, Picture]:
    """Return the picture of each instance: its heat map on it, its regions framed.

    Args:
        scored: their rows of `scores` with regions, of that calibration.
        side_px: longer side of a picture.
    """
    images = read_images(lake, cohort, uids)
    where: dict[str, Any] = {
        "cohort": cohort,
        "calibration_id": calibration["calibration_id"],
        "sop_instance_uid": list(uids),
        "not_scored": None,  # what was refused before it was scored keeps both rows
    }
    columns = ["sop_instance_uid", "anomaly_map", "map_height", "map_width"]
    kept = {row["sop_instance_uid"]: row for row in lake.read("scores", columns, filter=where).to_pylist()}
    pictures: dict[str, Picture] = {}
    for uid, image in zip(uids, images, strict=True):
        row = kept[uid]
        anomaly_map = decode_map(row["anomaly_map"], row["map_height"], row["map_width"])
        picture = overlay(image, anomaly_map, calibration["map_scale"], side_px)
        pictures[uid] = framed(picture, scored[uid]["regions"] or [], side_px / max(anomaly_map.shape))
    return pictures


def read_uids(file: Path) -> list[str]:
    """Return the UIDs of a text file, one a line; empty lines are passed over.

    Raises:
        UsageError: the file cannot be read or names none.
    """
    try:
        uids = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--uids cannot be read ({type(error).__name__}); expected one UID a line") from None
    if not uids:
        raise UsageError("--uids names no instance; expected one UID a line")
    return uids


def framed(picture_HW3: Picture, regions: Sequence[dict[str, Any]], factor: float) -> Picture:
    """Return the picture with a frame around each region.

    Args:
        regions: as in `scores.regions`.
        factor: picture px per map px.
    """
    from PIL import Image, ImageDraw

    page = Image.fromarray(picture_HW3, mode="RGB")
    draw = ImageDraw.Draw(page)
    for region in regions:
        left, top = region["x_px"] * factor, region["y_px"] * factor
        right, bottom = left + region["width_px"] * factor, top + region["height_px"] * factor
        draw.rectangle((left - 1, top - 1, right, bottom), outline=_BOX_COLOUR, width=2)
    return np.asarray(page)
