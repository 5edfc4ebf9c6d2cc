"""Burned-in text holds an object back; marks of side and technique, and anatomy, do not."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from dicom_instances import dataset, encoded, policy
from PIL import Image, ImageDraw, ImageFont

from memmc.dicom.convert import Converted, convert
from memmc.dicom.glyphs import BLOCK, glyph_blocks, glyph_mosaic
from memmc.dicom.sandbox import Sandbox
from memmc.dicom.text import Line, is_suspect
from memmc.phantom.radiograph import simulate

SIDE = 512


@pytest.fixture(scope="module")
def radiograph() -> np.ndarray:
    return simulate(1, 0, None, SIDE).image_HW


def written(radiograph: np.ndarray, text: str, height: int = 20, angle: int = 0, grey: int = 4095) -> np.ndarray:
    """Text across the middle of a radiograph."""
    stencil = Image.new("L", (SIDE, SIDE))
    font = ImageFont.load_default(height)
    ImageDraw.Draw(stencil).text((SIDE // 2, SIDE // 2), text, fill=255, font=font, anchor="mm")
    share = np.asarray(stencil.rotate(angle)) / 255
    return np.rint(radiograph * (1 - share) + grey * share).astype(np.int64)


def result(pixels: np.ndarray, text: str = "ocr", **attributes: object) -> Converted:
    return convert(encoded(dataset(pixels, **attributes)), policy(f"deid.text={text}"))


@pytest.mark.parametrize(
    ("text", "height", "angle", "grey"),
    [
        ("DOE, JANE  MRN0001", 20, 0, 4095),
        ("1957-03-12", 14, 0, 4095),
        ("GARCIA LOPEZ", 28, 90, 4095),
        ("GARCIA LOPEZ", 20, 180, 0),
        ("ACC7782828", 40, 270, 4095),
    ],
)
def test_a_name_or_number_is_held_back(radiograph: np.ndarray, text: str, height: int, angle: int, grey: int) -> None:
    pixels = written(radiograph, text, height, angle, grey)
    held = result(pixels, BurnedInAnnotation="NO")
    assert (held.outcome, held.reason, held.pixels) == ("quarantined", "DEID_TEXT_DETECTED", None)
    assert result(pixels, "class", BurnedInAnnotation="NO").outcome == "stored"  # it was the reading that held it


@pytest.mark.parametrize("text", ["", "L", "R", "PORTABLE", "AP SUPINE", "80 KV  2.5 MAS"])
def test_anatomy_and_technique_pass(radiograph: np.ndarray, text: str) -> None:
    assert result(written(radiograph, text, 24)).outcome == "stored"


def test_photometric_interpretation_does_not_hide_text(radiograph: np.ndarray) -> None:
    pixels = 4095 - written(radiograph, "GARCIA LOPEZ")
    assert result(pixels, PhotometricInterpretation="MONOCHROME1").reason == "DEID_TEXT_DETECTED"


def test_the_sandbox_reads_as_well(radiograph: np.ndarray) -> None:
    named, clean = (encoded(dataset(pixels)) for pixels in (written(radiograph, "GARCIA LOPEZ"), radiograph))
    with Sandbox(policy("deid.text=ocr")) as box:
        reasons = [box.convert(data).reason for data in (named, clean, named)]
    assert reasons == ["DEID_TEXT_DETECTED", None, "DEID_TEXT_DETECTED"]


@pytest.mark.parametrize(
    ("text", "confidence", "suspect"),
    [
        ("PORTABLE", 1.0, False),
        ("PORTARLE", 0.8, False),  # misread
        ("PORTARLE", 1.0, True),  # not misread: somebody's name
        ("PORTALE", 0.8, False),
        ("PORTABLEE", 0.8, False),
        ("PORTARIE", 0.8, True),  # two letters of eight are another word
        ("CHESTER", 0.9, True),  # names, near to CHEST, PORT, STERNUM, LINKS
        ("PORTER", 0.9, True),
        ("STERNER", 0.9, True),
        ("HINKSS", 0.9, True),
        ("RTABLE", 1.0, False),  # cut off
        ("AP-PORTABLE", 1.0, False),
        ("KV:80", 1.0, False),
        ("120 kVp", 1.0, False),
        ("PORTABLE DOE", 1.0, True),
        ("12.04.1961", 0.9, True),
        ("08:36:30", 1.0, False),
        (":59:54", 1.0, False),  # cut off
        ("7:05", 1.0, False),
        ("12.04.1961 08:36", 0.9, True),
        ("08:36:99", 1.0, True),
        ("4711:36:30", 1.0, True),
        ("JD 08:36:30 X", 1.0, True),
        ("RJ", 1.0, False),
        ("LEE", 0.9, True),
        ("LEE", 0.7, False),
        ("DOE JANE", 0.7, True),
        ("DOE JANE", 0.4, False),
        ("王伟", 0.9, True),
        ("", 1.0, False),
    ],
)
def test_what_may_stand_in_an_image(text: str, confidence: float, suspect: bool) -> None:
    assert is_suspect(Line(text, confidence)) is suspect


def test_only_what_could_be_text_is_read(radiograph: np.ndarray) -> None:
    grey = (radiograph >> 4).astype(np.uint8)
    assert glyph_mosaic(np.full((300, 500), 90, dtype=np.uint8)) is None
    before = glyph_blocks(grey)
    pixels = (written(radiograph, "GARCIA LOPEZ", 20) >> 4).astype(np.uint8)
    changed = (pixels != grey).reshape(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK).any(axis=(1, 3))
    assert glyph_blocks(pixels)[changed].all()
    assert before.mean() < 0.05
    mosaic = glyph_mosaic(pixels)
    assert mosaic is not None and mosaic.size < grey.size / 5


def test_nothing_is_downloaded() -> None:
    program = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from memmc.dicom.text import preload\n"
        "preload()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
