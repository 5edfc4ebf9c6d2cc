"""Maps: PNG pictures of scored scans with their heat map and regions, made on demand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.errors import DataError, StorageError, UsageError
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_images
from memmc.pipeline.models import open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import MapsResult
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.scoring.maps import decode_map, overlay_png

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
    chosen = sorted(scored) if uids is None else list(dict.fromkeys(uids))
    missing = [uid for uid in chosen if uid not in scored]
    if missing or not chosen:
        raise DataError(
            f"{len(missing)} of {len(chosen)} instances have no score of {opened.ref} in cohort '{cohort}'; "
            f"run `memmc score --cohort {cohort}`"
        )
    progress.stage("maps", len(chosen))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(chosen), _AT_ONCE):
            some = chosen[start : start + _AT_ONCE]
            images = read_images(lake, cohort, some)
            where: dict[str, Any] = {
                "cohort": cohort,
                "calibration_id": calibration["calibration_id"],
                "sop_instance_uid": some,
                "not_scored": None,  # what was refused before it was scored keeps both rows
            }
            columns = ["sop_instance_uid", "anomaly_map", "map_height", "map_width"]
            kept = {row["sop_instance_uid"]: row for row in lake.read("scores", columns, filter=where).to_pylist()}
            for uid, image in zip(some, images, strict=True):
                row = kept[uid]
                anomaly_map = decode_map(row["anomaly_map"], row["map_height"], row["map_width"])
                picture = overlay_png(image, anomaly_map, calibration["map_scale"], side_px)
                regions = scored[uid]["regions"] or []
                (out / f"{uid}.png").write_bytes(framed(picture, regions, side_px / max(anomaly_map.shape)))
            progress.advance(start + len(some))
    except OSError as error:
        raise StorageError(f"pictures cannot be written ({error.strerror}); check --out") from None
    return MapsResult(folder=str(out), cohort=cohort, model=opened.ref, pictures=len(chosen))


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


def framed(png: bytes, regions: Sequence[dict[str, Any]], factor: float) -> bytes:
    """Return the picture with a frame around each region.

    Args:
        png: the picture.
        regions: as in `scores.regions`.
        factor: picture px per map px.
    """
    from PIL import Image, ImageDraw

    with Image.open(io.BytesIO(png)) as picture:
        draw = ImageDraw.Draw(picture)
        for region in regions:
            left, top = region["x_px"] * factor, region["y_px"] * factor
            right, bottom = left + region["width_px"] * factor, top + region["height_px"] * factor
            draw.rectangle((left - 1, top - 1, right, bottom), outline=_BOX_COLOUR, width=2)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
    return buffer.getvalue()
