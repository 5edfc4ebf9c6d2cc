"""Burned-in text: read what stands in the pixels, and tell marks of the technique from anything else.

Text is looked for where edges look like letters (`memmc.dicom.glyphs`), found
and read there by the PP-OCRv6 networks that lie inside the rapidocr wheel, and
compared with `ALLOWED`. What was read is never stored or shown: an object is
held back or not.

Source: PS3.15 E.3.1 Clean Pixel Data Option; PS3.3 C.7.6.1.1.5 Burned In Annotation.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmc.dicom.glyphs import WORK_SIDE, Grey, glyph_mosaic, working_image
from memmc.errors import ConfigError

_SIDE = "L R LT RT LEFT RIGHT LINKS RECHTS GAUCHE DROITE IZQUIERDA DERECHA"
_PROJECTION = "AP PA LAT LATERAL OBL OBLIQUE LPO RPO LAO RAO FRONTAL VIEW CHEST THORAX LUNG LUNGS ABDOMEN RIBS STERNUM"
_POSTURE = (
    "PORTABLE PORT MOBILE BEDSIDE BED SUPINE PRONE ERECT UPRIGHT UP STANDING SITTING SEMI SEMIERECT SEMIUPRIGHT "
    "RECUMBENT DECUB DECUBITUS LIEGEND STEHEND COUCHE DEBOUT SUPINO"
)
_BREATHING = "INSP INSPIRATION INSPIRATORY EXP EXPIRATION EXPIRATORY FULL"
_TECHNIQUE = "GRID NO NONGRID WITH WITHOUT KV KVP MA MAS MS CM MM IN INCH SID SEC ADULT CHILD AM PM"
ALLOWED = frozenset(" ".join((_SIDE, _PROJECTION, _POSTURE, _BREATHING, _TECHNIQUE)).split())
"""Words that may stand in an image: side, projection, posture, breathing, technique."""

_UNIT = r"(?:KVP?|MAS?|MS|CM|MM|IN)"
_NUMBER = r"[0-9]{1,3}(?:[.,][0-9]{1,2})?"
_MEASURE = re.compile(rf"\b{_NUMBER}\s*{_UNIT}\b|\b{_UNIT}\s*[:=]?\s*{_NUMBER}\b")  # exposure and distances
_CLOCK = re.compile(
    r"(?<![0-9:])(?:(?:[01]?[0-9]|2[0-3])?:[0-5][0-9]:[0-5][0-9]|(?:[01]?[0-9]|2[0-3]):[0-5][0-9])(?![0-9:])"
)
"""A time of day, its hour cut off perhaps; of a day that is not named it says nothing of a person."""

_WORD = re.compile(r"[^\W_]+")
_LEAST_CHARACTERS = 3  # letters and digits; fewer are a mark on a cassette, and say nothing of a person
_LEAST_CONFIDENCE = 0.6  # mean over the characters
_SHORT, _SHORT_CONFIDENCE = 4, 0.8  # up to so many characters the networks see letters in catheters and cassette locks
_SURE = 0.97  # below this a technique word may be misread
_LEAST_MISREAD = 6  # letters of a word that may be misread in one place, or cut off; a shorter one is near to a name
_LEAST_ASPECT = 1.3  # width to height of a box; a letter on its own is squarer, and no identifier
_MANY_LINES = 24  # more than any radiograph's marks: a page of text


@dataclass(frozen=True)
class Line:
    """One line of text found in an image.

    Attributes:
        text: as read; an identifier, perhaps: do not keep.
        confidence: 0..1.
    """

    text: str
    confidence: float


def holds_text(image_HW: Grey) -> bool:
    """Tell whether an image, 0 black .. 255 white, shape (H, W), shows text that is not a mark of the technique."""
    for number, line in enumerate(read_lines(working_image(image_HW)), 1):
        if number > _MANY_LINES or is_suspect(line):
            return True
    return False


def read_lines(image_HW: Grey) -> Iterator[Line]:
    """Yield the lines of text in a working image that could be longer than a letter, longest first."""
    canvas_HW = glyph_mosaic(image_HW)
    if canvas_HW is None:
        return
    letters = 0
    for line_HW3 in _find(canvas_HW):
        if line_HW3.shape[1] >= _LEAST_ASPECT * line_HW3.shape[0]:
            yield _read(line_HW3)
        else:
            letters += 1
    if letters >= _LEAST_CHARACTERS:  # text up the side of an image is found letter by letter; turned, as a line
        for line_HW3 in _find(np.rot90(canvas_HW)):
            if line_HW3.shape[1] >= _LEAST_ASPECT * line_HW3.shape[0]:
                yield _read(line_HW3)


def _find(canvas_HW: Grey) -> list[NDArray[np.uint8]]:
    """Return what could be lines of text, longest first, each cut out and laid level."""
    from rapidocr.utils.process_img import get_rotate_crop_image

    canvas_HW3 = np.repeat(canvas_HW[..., None], 3, axis=2)
    boxes_N42 = _engine()(canvas_HW3, use_det=True, use_cls=False, use_rec=False).boxes
    lines = [get_rotate_crop_image(canvas_HW3, box_42) for box_42 in (boxes_N42 if boxes_N42 is not None else ())]
    return sorted(lines, key=lambda line_HW3: line_HW3.shape[1], reverse=True)


def _read(line_HW3: NDArray[np.uint8]) -> Line:
    # The switches are given at every call: rapidocr keeps the last ones.
    found = _engine()(line_HW3, use_det=False, use_cls=True, use_rec=True)
    return Line(found.txts[0], float(found.scores[0])) if found.txts else Line("", 0.0)


def is_suspect(line: Line) -> bool:
    """Tell whether a line is legible and says more than `ALLOWED` does."""
    text = unicodedata.normalize("NFKC", line.text).upper()
    words = _WORD.findall(_CLOCK.sub(" ", _MEASURE.sub(" ", text)))
    others = [word for word in words if not _is_mark(word, line.confidence >= _SURE)]
    weight = sum(_weight(character) for word in others for character in word)
    least = _SHORT_CONFIDENCE if weight <= _SHORT else _LEAST_CONFIDENCE
    return weight >= _LEAST_CHARACTERS and line.confidence >= least


def _is_mark(word: str, sure: bool) -> bool:
    if word in ALLOWED:
        return True
    if len(word) < _LEAST_MISREAD:
        return False
    return any(word in allowed or (not sure and _is_misread(word, allowed)) for allowed in ALLOWED)


def _is_misread(word: str, allowed: str) -> bool:
    """Tell whether one letter replaced, added or left out makes a long enough allowed word of another."""
    if len(allowed) < _LEAST_MISREAD or abs(len(word) - len(allowed)) > 1:
        return False
    short, long = sorted((word, allowed), key=len)
    same = next((i for i, letter in enumerate(short) if letter != long[i]), len(short))
    return short[same + (len(short) == len(long)) :] == long[same + 1 :]


def _weight(character: str) -> int:
    """Ideographs count double: two of them are a name."""
    return 2 if unicodedata.east_asian_width(character) == "W" else int(character.isalnum())


def text_reading_available() -> bool:
    """Tell whether the packages that read text are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))


def preload() -> None:
    """Load the networks and read one line, so that a process with limits need not open files later.

    Raises:
        ConfigError: the packages are not installed.
    """
    if not text_reading_available():
        raise ConfigError("deid.text = 'ocr' needs the packages rapidocr and onnxruntime; install them or set 'class'")
    image_HW = np.zeros((64, 128), dtype=np.uint8)
    image_HW[24:40:4, 16:112] = 255
    list(read_lines(image_HW))
    _read(np.repeat(image_HW[..., None], 3, axis=2))


@functools.cache
def _engine() -> Any:
    """Return rapidocr on one thread, without growing memory pools, silent, on the networks of its own wheel."""
    import cv2
    from rapidocr import RapidOCR

    cv2.setNumThreads(1)
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": 0.0,
            "Global.use_preprocess_img": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.limit_type": "max",
            "Det.limit_side_len": 2 * WORK_SIDE,
            "Det.box_thresh": 0.3,
            "Det.max_candidates": 4 * _MANY_LINES,
            "Rec.rec_batch_num": 1,
            "Rec.rec_img_shape": [3, 48, 160],  # the least width a line is padded to
        }
    )
