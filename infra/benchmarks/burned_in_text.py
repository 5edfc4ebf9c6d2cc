"""What the search for burned-in text catches, what it holds back wrongly, and what it costs.

    python infra/benchmarks/burned_in_text.py [--data ../shared/data] [--each 24]

Three parts: the hospital of 48 objects, 7 of them with a patient's name in the
pixels and half of those saying (0028,0301) Burned In Annotation NO; 700 chest
X-rays without (the val folders of cxr-adult and cxr-kermany); names and dates
drawn onto simulated radiographs at several heights, contrasts and directions.
The first two need the data folder, and are skipped by name without it. Ends
with 1 where a promise is missed.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from memmc.config import load_config
from memmc.dicom.convert import Converted, ConvertPolicy
from memmc.dicom.sandbox import Sandbox
from memmc.dicom.text import holds_text, preload
from memmc.phantom.radiograph import simulate

MOST_WRONG = 0.02  # share of clean images held back
LEAST_RECALL = 0.98  # of text at least 14 px high, at least half the grey range apart from what it stands on
HEIGHTS_PX = (10, 14, 20, 28, 40)
CONTRASTS = (1.0, 0.5, 0.25, 0.12)  # of the grey range
ANGLES = (0, 90, 180, 270, 12)  # degrees
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf")
TEXTS = (
    "DOE, JOHN MRN482913",
    "SCHMIDT ANNA 1957-03-12",
    "O BRIEN^MARY",
    "GARCIA LOPEZ",
    "12.04.1961",
    "NGUYEN VAN",
    "ACC7782828",
    "KOWALSKI JAN",
)
PIXELS_ALONE = (  # nothing but the pixels may hold an object back
    "select.modalities=CR,DX,OT",
    "select.secondary_capture=true",
    "select.burned_in_annotation=accept",
)

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Drawing:
    """How text is drawn: height of the letters' em in px, contrast as a share of the grey range, degrees."""

    height_px: int
    contrast: float
    angle: int


def draw(background_HW: Grey, text: str, how: Drawing, rng: np.random.Generator) -> Grey:
    """Return the background with text at a random place, lighter than its surroundings where there is room for it."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(folder / FONTS[rng.integers(len(FONTS))]), how.height_px)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    stencil = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(stencil).text((2 - left, 2 - top), text, fill=255, font=font)
    turned = stencil.rotate(how.angle, expand=True, resample=Image.Resampling.BILINEAR)
    mask_HW = np.asarray(turned, dtype=np.float32) / 255
    height, width = mask_HW.shape
    y = int(rng.integers(0, background_HW.shape[0] - height))
    x = int(rng.integers(0, background_HW.shape[1] - width))
    image_HW = background_HW.copy()
    place_HW = image_HW[y : y + height, x : x + width]
    level = float(np.median(place_HW))
    lighter = level + 255 * how.contrast <= 255 or level < 128
    target = min(level + 255 * how.contrast, 255.0) if lighter else max(level - 255 * how.contrast, 0.0)
    place_HW[:] = np.clip(place_HW + mask_HW * (target - level), 0, 255)
    return image_HW


def planted(each: int, side: int) -> bool:
    """Print recall by height, contrast and angle; tell whether the promise holds."""
    preload()
    rng = np.random.default_rng(0)
    backgrounds = [(simulate(seed, 0, None, side).image_HW >> 4).astype(np.uint8) for seed in range(6)]
    wrong = sum(holds_text(image_HW) for image_HW in backgrounds)
    print(
        f"\nText drawn on simulated radiographs of {side} px, {each} a cell; {wrong} of {len(backgrounds)} held without"
    )
    print("contrast angle  " + "  ".join(f"{height:>4} px" for height in HEIGHTS_PX))
    found = total = 0
    for contrast in CONTRASTS:
        for angle in ANGLES:
            cells: list[str] = []
            for height in HEIGHTS_PX:
                hits = 0
                for number in range(each):
                    text, background_HW = TEXTS[number % len(TEXTS)], backgrounds[number % len(backgrounds)]
                    hits += holds_text(draw(background_HW, text, Drawing(height, contrast, angle), rng))
                cells.append(f"{hits / each:7.2f}")
                if height >= 14 and contrast >= 0.5 and angle % 90 == 0:
                    found, total = found + hits, total + each
            print(f"{contrast:8.2f} {angle:5d}  " + "  ".join(cells), flush=True)
    print(f"recall at 14 px and more, contrast 0.5 and more, right angles: {found}/{total} = {found / total:.3f}")
    return found >= LEAST_RECALL * total and not wrong


def hospital(folder: Path) -> bool:
    """Print what becomes of the hospital's objects; tell whether every burned-in one is caught, and no other."""
    with (folder / "expected.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    burned = [row for row in rows if row["burned_in"] == "1"]
    good = True
    for title, settings in (("as shipped", ()), ("by the pixels alone", PIXELS_ALONE)):
        with Sandbox(policy("ocr", *settings)) as sandbox:
            results = {row["dicom"]: sandbox.convert((folder / row["dicom"]).read_bytes()) for row in rows}
        caught = sum(results[row["dicom"]].outcome != "stored" for row in burned)
        read = sum(results[row["dicom"]].reason == "DEID_TEXT_DETECTED" for row in burned)
        others = [results[row["dicom"]] for row in rows if row["burned_in"] != "1"]
        wrong = sum(result.reason == "DEID_TEXT_DETECTED" for result in others)
        print(f"hospital, {title}: {caught}/{len(burned)} burned-in kept out, {read} of them read; {wrong} others held")
        good &= caught == len(burned) and (not settings or read == len(burned))
    return good


def clean(data: Path) -> bool:
    """Print how many clean images are held, and the cost; tell whether few enough are."""
    files = sorted((data / "cxr-adult" / "val").rglob("*.jpg")) + sorted((data / "cxr-kermany" / "val").rglob("*.jp*g"))
    objects = [(path.stem, as_dicom(path)) for path in files]
    plain, plain_s = converted((data for _, data in objects), "class")
    read, read_s = converted((data for _, data in objects), "ocr")
    held = [name for (name, _), result in zip(objects, read, strict=True) if result.reason == "DEID_TEXT_DETECTED"]
    stored = sum(result.outcome == "stored" for result in plain)
    print(
        f"\nclean: {len(held)} of {len(objects)} held ({len(held) / len(objects):.2%}); {stored} stored without reading"
    )
    print(f"224 px: {read_s * 1e3:.1f} ms an image, {plain_s * 1e3:.1f} without: {read_s / plain_s:.1f} times")
    return len(held) <= MOST_WRONG * len(objects) and stored == len(objects)


def real_size(data: Path) -> None:
    """Print the cost on full-size radiographs (many with marks, a few with more)."""
    files = sorted((data / "cxr-hires").rglob("*.jp*g"))
    objects = [as_dicom(path, side=2048) for path in files]
    _, plain_s = converted(objects, "class")
    read, read_s = converted(objects, "ocr")
    held = sum(result.reason == "DEID_TEXT_DETECTED" for result in read)
    print(
        f"2048 px: {read_s * 1e3:.1f} ms an image, {plain_s * 1e3:.1f} without: {read_s / plain_s:.1f} times; "
        f"{held} of {len(files)} held (films with initials or numbers are among them)"
    )


def policy(text: str, *settings: str) -> ConvertPolicy:
    config = load_config(overrides=[f"deid.text={text}", *settings])
    return ConvertPolicy.from_config(config, bytes(32))


def converted(objects: Iterable[bytes], text: str) -> tuple[list[Converted], float]:
    """Return the results and the seconds an object took, the start of the process not counted."""
    with Sandbox(policy(text)) as sandbox:
        sandbox.convert(b"")
        start = time.perf_counter()
        results = [sandbox.convert(data) for data in objects]
        return results, (time.perf_counter() - start) / len(results)


def as_dicom(path: Path, side: int | None = None) -> bytes:
    """Return an image file as an uncompressed CR, brought to `side` px where that is given."""
    image = Image.open(path).convert("L")
    if side:
        scale = side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.Modality, ds.PatientID, ds.BurnedInAnnotation = "CR", path.stem, "NO"
    ds.Rows, ds.Columns, ds.SamplesPerPixel = image.height, image.width, 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.add_new("PixelData", "OW", (np.asarray(image).astype("<u2") * 16).tobytes())
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real images")
    parser.add_argument("--each", type=int, default=24, help="drawn images a cell; 0 leaves them out")
    parser.add_argument("--side", type=int, default=1024, help="side of the simulated radiographs, px")
    options = parser.parse_args()
    kept: dict[str, bool] = {}
    if (options.data / "dicom-hospital").is_dir():
        kept["every burned-in object of the hospital caught"] = hospital(options.data / "dicom-hospital")
        kept["at most 2 % of clean images held"] = clean(options.data)
        real_size(options.data)
    else:
        print(f"skipped: real images, no folder {options.data}; see --data")
    if options.each:
        kept["at least 98 % of plain text found"] = planted(options.each, options.side)
    print()
    for promise, holds in kept.items():
        print("kept  " if holds else "MISSED", promise)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
