"""The radiographs that quality is measured on, prepared as `memmc ingest` prepares them; for the other benchmarks."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from memmc.config import Config, SplitConfig
from memmc.dicom.resample import WHITE, resample
from memmc.lake.splits import split_of

LABELS = "labels.csv"


@dataclass(frozen=True)
class Images:
    """N images.

    Attributes:
        pixels_NHWC: as the lake stores them.
        names: made up, one per image; they seed the masks of a score.
        patients: one per image.
    """

    pixels_NHWC: NDArray[np.unsignedinteger]
    names: list[str]
    patients: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Sequence[int]) -> Images:
        return Images(
            self.pixels_NHWC[list(rows)], [self.names[row] for row in rows], [self.patients[row] for row in rows]
        )

    def grey(self) -> NDArray[np.float32]:
        """Return (N, H, W) in [0, 1]."""
        return (self.pixels_NHWC[..., 0] / np.float32(np.iinfo(self.pixels_NHWC.dtype).max)).astype(np.float32)

    def table(self) -> pa.Table:
        """Return what a training feed reads."""
        count, height, width, channels = self.pixels_NHWC.shape
        values = {"height": height, "width": width, "channels": channels, "bits": 8 * self.pixels_NHWC.itemsize}
        columns = {name: pa.repeat(pa.scalar(value, pa.int32()), count) for name, value in values.items()}
        pixels = pa.array([image.tobytes() for image in self.pixels_NHWC], pa.binary())
        return pa.table({"sop_instance_uid": pa.array(self.names), "pixels": pixels, **columns})


@dataclass(frozen=True)
class QualitySet:
    """Normals to learn from, normals of other patients to calibrate on, and labelled images of yet others.

    Attributes:
        abnormal_N: of the test images.
    """

    name: str
    train: Images
    held: Images
    test: Images
    abnormal_N: NDArray[np.bool_]

    def __str__(self) -> str:
        found = f"{len(self.train)} to train on, {len(self.held)} held out, "
        return f"{self.name}: {found}{int((~self.abnormal_N).sum())} + {int(self.abnormal_N.sum())} to test on"


def read_set(folder: Path, config: Config, limit: int | None = None) -> QualitySet | None:
    """Read a folder with `labels.csv` (file, split, label, patient): `train` holds normals alone, `val` is tested on.

    The training normals' patients are shared out by the project's own hash: those of its calibration share are held
    out, the others are trained on. An image of an unknown patient is one of its own.

    Args:
        limit: most images of the training normals and of each class of `val`, for a try.

    Returns:
        None, said on the terminal, where there is no such folder.
    """
    if not (folder / LABELS).is_file():
        print(f"{folder.name}: skipped, there is no {LABELS} in {folder}")
        return None
    with (folder / LABELS).open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["file"])
    normals = [row for row in rows if row["split"] == "train"][:limit]
    tested = [row for row in rows if row["split"] == "val" and row["label"] == "normal"][:limit]
    num_normal = len(tested)
    tested += [row for row in rows if row["split"] == "val" and row["label"] != "normal"][:limit]
    if not num_normal or num_normal == len(tested) or any(row["label"] != "normal" for row in normals):
        raise SystemExit(f"{folder.name}: expected normals alone in train, and both classes in val")
    learnt, test = _read(folder, normals, config), _read(folder, tested, config)
    if set(learnt.patients) & set(test.patients):
        raise SystemExit(f"{folder.name}: a patient stands in train and in val")
    held = [split_of(patient, SplitConfig()) == "calibrate" for patient in learnt.patients]
    return QualitySet(
        folder.name,
        learnt.take([row for row, out in enumerate(held) if not out]),
        learnt.take([row for row, out in enumerate(held) if out]),
        test,
        np.arange(len(test)) >= num_normal,
    )


def _read(folder: Path, rows: list[dict[str, str]], config: Config) -> Images:
    side, dtype = config.data.image_size, np.uint8 if config.data.bits == 8 else np.uint16
    top = 2**config.data.bits - 1
    pixels_NHWC = np.empty((len(rows), side, side, 1), dtype)
    for row, image_HW in zip(rows, pixels_NHWC[..., 0], strict=True):
        with Image.open(folder / row["file"]) as file:
            levels_HW = np.asarray(file.convert("L"), np.float64) * (WHITE // 255)
        square = resample(_stripes(levels_HW), *levels_HW.shape, config.data)
        image_HW[:] = np.rint(square / WHITE * top)
    names = [f"{folder.name}/{row['file']}" for row in rows]
    return Images(pixels_NHWC, names, [row["patient"] or row["file"] for row in rows])


def _stripes(levels_HW: NDArray[np.float64]) -> Callable[[int, int], NDArray[np.float64]]:
    return lambda top, bottom: levels_HW[top:bottom]
