"""Pixels and masks of chosen instances, read in this process."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator
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
    return _scaled(read_pixels(lake, cohort, sop_instance_uids, version))


def image_batches(
    lake: Lake, cohort: str, sop_instance_uids: Iterable[str], at_once: int
) -> Iterator[tuple[list[str], Images]]:
    """Yield UIDs and their images_NHWC in [0, 1], at most so many at once, in the order in which the lake holds them.

    Raises:
        DataError: as `read_images`, at the end.
        IntegrityError: as `read_images`.
    """
    wanted, seen = set(sop_instance_uids), set[str]()
    for names, pixels_NHWC in _pieces(lake, cohort, wanted, None):
        seen.update(names)
        for start in range(0, len(names), at_once):
            yield names[start : start + at_once], _scaled(pixels_NHWC[start : start + at_once])
    _require_all(cohort, wanted, seen)


def read_pixels(
    lake: Lake, cohort: str, sop_instance_uids: Iterable[str], version: int | None = None
) -> npt.NDArray[Any]:
    """Return pixels_NHWC as stored, uint8 or uint16; order and errors as `read_images`."""
    order = list(sop_instance_uids)
    wanted, found = set(order), dict[str, npt.NDArray[Any]]()
    for names, pixels_NHWC in _pieces(lake, cohort, wanted, version):
        found.update(zip(names, pixels_NHWC, strict=True))
    _require_all(cohort, wanted, found.keys())
    return np.stack([found[uid] for uid in order])


def _scaled(pixels_NHWC: npt.NDArray[Any]) -> Images:
    return pixels_NHWC.astype(np.float32) / np.float32(np.iinfo(pixels_NHWC.dtype).max)


def _pieces(
    lake: Lake, cohort: str, wanted: set[str], version: int | None
) -> Iterator[tuple[list[str], npt.NDArray[Any]]]:
    """Yield UIDs and pixels_NHWC of the wanted instances that are there, a row group at a time."""
    columns = ["sop_instance_uid", *PIXEL_COLUMNS]
    where = lake.where("instances", {"cohort": cohort})
    chosen = pc.field("sop_instance_uid").isin(sorted(wanted))
    for file in lake.files("instances", version, {"outcome": "stored", "cohort": cohort}):
        # A look at the names spares the pixels of shards that hold none of these.
        names = read_file(lake.storage, "instances", file, ["sop_instance_uid"])
        if wanted.isdisjoint(names["sop_instance_uid"].to_pylist()):
            continue
        for group in read_rows(lake.storage, "instances", file, columns, where):
            rows = group.filter(chosen)
            if rows.num_rows:
                yield rows["sop_instance_uid"].to_pylist(), pixels_to_array(rows)


def _require_all(cohort: str, wanted: set[str], found: Collection[str]) -> None:
    missing = len(wanted.difference(found))
    if missing:
        raise DataError(f"{missing} of {len(wanted)} instances have no pixels in cohort '{cohort}'")


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
