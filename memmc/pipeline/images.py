"""Pixels and masks of chosen instances, read in this process."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from memmc.config import DataConfig
from memmc.dicom.deidentify import keyed_uid
from memmc.dicom.pixels import fit_mask
from memmc.errors import DataError, UsageError
from memmc.lake.files import read_file
from memmc.lake.stream import PIXEL_COLUMNS, pixels_to_array, read_rows
from memmc.lake.tables import Lake

Images = npt.NDArray[np.float32]


def read_images(lake: Lake, cohort: str, sop_instance_uids: Iterable[str], version: int | None = None) -> Images:
    """Return images_NHWC in [0, 1], in the order of the UIDs.

    Raises:
        DataError: an instance has no stored pixels in this cohort and version.
        IntegrityError: a shard's bytes are not those that were written.
    """
    pixels_NHWC = read_pixels(lake, cohort, sop_instance_uids, version)
    return pixels_NHWC.astype(np.float32) / np.float32(np.iinfo(pixels_NHWC.dtype).max)


def read_pixels(
    lake: Lake, cohort: str, sop_instance_uids: Iterable[str], version: int | None = None
) -> npt.NDArray[Any]:
    """Return pixels_NHWC as stored, uint8 or uint16; order and errors as `read_images`."""
    order = list(sop_instance_uids)
    wanted = set(order)
    found: dict[str, npt.NDArray[Any]] = {}
    columns = ["sop_instance_uid", *PIXEL_COLUMNS]
    where = lake.where("instances", {"cohort": cohort})
    for file in lake.files("instances", version, {"outcome": "stored", "cohort": cohort}):
        # A look at the names spares the pixels of shards that hold none of these.
        names = read_file(lake.storage, "instances", file, ["sop_instance_uid"])
        if wanted.isdisjoint(names["sop_instance_uid"].to_pylist()):
            continue
        for rows in read_rows(lake.storage, "instances", file, columns, where):
            chosen = rows.filter(pc.field("sop_instance_uid").isin(sorted(wanted)))
            if chosen.num_rows:
                found.update(zip(chosen["sop_instance_uid"].to_pylist(), pixels_to_array(chosen), strict=True))
    if wanted - found.keys():
        raise DataError(f"{len(wanted - found.keys())} of {len(wanted)} instances have no pixels in cohort '{cohort}'")
    return np.stack([found[uid] for uid in order])


def read_masks(file: Path, key: bytes | None, data: DataConfig) -> dict[str, npt.NDArray[np.bool_]]:
    """Return lesion masks (H, W) by keyed SOP Instance UID, brought to the geometry of stored pixels.

    Args:
        file: CSV with the columns `sop_instance_uid` and `path` (PNG, relative to the CSV; not black = abnormal).
        key: the identity key, under which the file's UIDs are looked up.
        data: how pixels were fitted to the stored size.

    Raises:
        UsageError: no key, unreadable file, or a column missing.
    """
    from PIL import Image

    if key is None:
        raise UsageError(
            "masks name SOPInstanceUIDs, which only the holder of the identity key can look up; set deid.key_file"
        )
    try:
        with file.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        pairs = [(keyed_uid(key, row["sop_instance_uid"]), row["path"]) for row in rows]
    except (OSError, KeyError, csv.Error) as error:
        raise UsageError(
            f"mask table cannot be read ({type(error).__name__}); expected columns sop_instance_uid, path"
        ) from None
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    for number, (uid, path) in enumerate(pairs, start=2):
        try:
            with Image.open(file.parent / path) as image:
                masks[uid] = fit_mask(np.asarray(image.convert("L")) > 0, data)
        except OSError as error:  # its text holds the path, which may name the instance
            raise UsageError(f"mask table, line {number}: picture cannot be read ({type(error).__name__})") from None
    return masks
