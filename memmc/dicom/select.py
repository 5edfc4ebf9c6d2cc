"""Which instances are in scope: named rules in a fixed order, the first that objects gives the reason.

In scope is a single-frame, two-dimensional image of an accepted modality, meant
for viewing, whose pixels are not likely to carry burned-in text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pydicom.dataset import Dataset

from memmc.config import SelectConfig
from memmc.dicom.read import Instance, integer, text
from memmc.dicom.reasons import Rejected

_STORAGE = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE = _STORAGE + "7"
_ULTRASOUND = _STORAGE + "6.1"
IMAGE_CLASSES: frozenset[str] = frozenset(
    _STORAGE + suffix
    for suffix in (
        "1",  # Computed Radiography
        "1.1",  # Digital X-Ray, for presentation
        "1.1.1",  # Digital X-Ray, for processing
        "1.2",  # Digital Mammography, for presentation
        "1.2.1",
        "1.3",  # Intra-oral, for presentation
        "1.3.1",
        "2",  # CT
        "4",  # MR
        "6.1",  # Ultrasound
        "7",  # Secondary Capture
        "12.1",  # X-Ray Angiographic
        "12.2",  # X-Ray Radiofluoroscopic
        "20",  # Nuclear Medicine
        "77.1.4",  # VL Photographic
        "77.1.5.1",  # Ophthalmic Photography 8 bit
        "77.1.5.2",
        "128",  # Positron Emission Tomography
        "481.1",  # RT Image
    )
)
"""Storage SOP classes that can hold one two-dimensional frame: PS3.4 Table B.5-1."""

_MAX_FRAMES = 10_000
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_LATERAL_VIEWS = frozenset(("LL", "RL", "LLAT", "RLAT", "L LAT", "R LAT", "LAT", "LATERAL"))
_LATERAL_CODES = frozenset(  # (0054,0220) View Code Sequence, PS3.16 CID 4010
    (
        "399067008",  # lateral projection
        "399173006",  # left lateral projection
        "399198007",  # right lateral projection
        "R-10236",
        "R-10228",
        "R-10232",
    )
)
_CAPTURED_PAGES = frozenset(("WSD", "SD", "SI", "DRW"))  # (0008,0064): workstation, scanned or drawn pages


def select(instance: Instance, config: SelectConfig) -> None:
    """Let an instance in scope pass.

    Raises:
        Rejected: the first rule's META_*, SELECT_*, DEID_* or PIX_FLOAT_UNSUPPORTED code.
    """
    for rule in _RULES:
        reason = rule(instance, config)
        if reason is not None:
            raise Rejected(reason)


def _sop_class(instance: Instance, config: SelectConfig) -> str | None:
    """SOP Class UID (0008,0016) names a single-frame image class."""
    sop_class = text(instance.dataset, "SOPClassUID")
    if sop_class is None:
        return "META_MISSING_TYPE1"
    return None if sop_class in IMAGE_CLASSES else "META_SOP_CLASS_UNSUPPORTED"


def _modality(instance: Instance, config: SelectConfig) -> str | None:
    """Modality (0008,0060) is one of `select.modalities`."""
    modality = text(instance.dataset, "Modality")
    if modality is None:
        return "META_MISSING_TYPE1"
    return None if modality in config.modalities else "META_MODALITY_OUT_OF_SCOPE"


def _frames(instance: Instance, config: SelectConfig) -> str | None:
    """Number of Frames (0028,0008) is absent, empty or 1."""
    if "NumberOfFrames" not in instance.dataset:
        return None
    frames = integer(instance.dataset, "NumberOfFrames")
    if frames is None:
        return None if text(instance.dataset, "NumberOfFrames") is None else "META_DIMENSIONS"
    if not 1 <= frames <= _MAX_FRAMES:
        return "META_DIMENSIONS"
    return "META_MULTIFRAME_UNSUPPORTED" if frames > 1 else None


def _uids(instance: Instance, config: SelectConfig) -> str | None:
    """Study, Series and SOP Instance UIDs are there and are UIDs (PS3.5 section 9.1)."""
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        uid = text(instance.dataset, keyword)
        if uid is None:
            return "META_MISSING_TYPE1"
        if len(uid) > 64 or not _UID.fullmatch(uid):
            return "META_UID_INVALID"
    return None


def _pixels(instance: Instance, config: SelectConfig) -> str | None:
    """Pixel Data (7FE0,0010) is there."""
    if instance.pixels is None:
        return "PIX_FLOAT_UNSUPPORTED" if instance.float_pixels else "META_NO_PIXELS"
    return None


def _flagged(instance: Instance, config: SelectConfig) -> str | None:
    """Burned In Annotation (0028,0301) does not say YES, nor anything but NO."""
    flag = text(instance.dataset, "BurnedInAnnotation")
    return None if flag in (None, "NO") or config.burned_in_annotation == "accept" else "DEID_BURNED_IN_FLAG"


def _secondary_capture(instance: Instance, config: SelectConfig) -> str | None:
    """Secondary Capture (PS3.3 A.8) only where it was asked for."""
    is_secondary = text(instance.dataset, "SOPClassUID") == SECONDARY_CAPTURE
    return "SELECT_SECONDARY_CAPTURE" if is_secondary and not config.secondary_capture else None


def _captured_page(instance: Instance, config: SelectConfig) -> str | None:
    """Screen saves, pages and ultrasound carry text as a rule (PS3.15 E.1.1, option 113101): only a NO helps."""
    dataset = instance.dataset
    if config.burned_in_annotation == "accept" or text(dataset, "BurnedInAnnotation") == "NO":
        return None
    is_page = (
        text(dataset, "SOPClassUID") in (SECONDARY_CAPTURE, _ULTRASOUND)
        or text(dataset, "ConversionType") in _CAPTURED_PAGES
        or any("SCREEN" in value for value in _image_type(dataset)[2:])
    )
    return "DEID_BURNED_IN_FLAG" if is_page else None


def _derived(instance: Instance, config: SelectConfig) -> str | None:
    """Image Type (0008,0008) is not DERIVED\\SECONDARY; DERIVED\\PRIMARY is how lossy originals are marked."""
    is_secondary = text(instance.dataset, "SOPClassUID") == SECONDARY_CAPTURE
    derived = _image_type(instance.dataset)[:2] == ["DERIVED", "SECONDARY"]
    return "SELECT_DERIVED" if derived and not is_secondary else None


def _for_processing(instance: Instance, config: SelectConfig) -> str | None:
    """Presentation Intent Type (0008,0068) is not FOR PROCESSING."""
    return "SELECT_FOR_PROCESSING" if text(instance.dataset, "PresentationIntentType") == "FOR PROCESSING" else None


def _lateral(instance: Instance, config: SelectConfig) -> str | None:
    """View Position (0018,5101) and View Code Sequence (0054,0220) name no lateral projection."""
    if config.lateral_views:
        return None
    position = (text(instance.dataset, "ViewPosition") or "").upper()
    codes = [text(item, "CodeValue") for item in sequence(instance.dataset, "ViewCodeSequence")[:1]]
    return "SELECT_LATERAL_VIEW" if position in _LATERAL_VIEWS or _LATERAL_CODES.intersection(codes) else None


def sequence(dataset: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence, none where it is absent or not one."""
    try:
        items = dataset.get(keyword)
        return [item for item in items if isinstance(item, Dataset)] if items else []
    except (ValueError, TypeError, AttributeError, NotImplementedError, OSError):
        return []


def _image_type(dataset: Dataset) -> list[str]:
    try:
        value = dataset.get("ImageType") or []
    except (ValueError, TypeError, NotImplementedError):
        return []
    return [value.strip()] if isinstance(value, str) else [str(part).strip() for part in value]


_RULES: tuple[Callable[[Instance, SelectConfig], str | None], ...] = (
    _sop_class,
    _modality,
    _frames,
    _uids,
    _pixels,
    _flagged,
    _secondary_capture,
    _captured_page,
    _derived,
    _for_processing,
    _lateral,
)
