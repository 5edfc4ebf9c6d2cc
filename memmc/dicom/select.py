"""Which instances are in scope: named rules in a fixed order, the first that objects gives the reason.

In scope is an image of an accepted modality and view, meant for viewing, whose
pixels are not likely to carry burned-in text. Each rule says which attributes
it reads, so that `explain` can show them: in the closed vocabularies of
`memmc.dicom.vocabulary` only, never as the object spells them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import UID

from memmc.config import SelectConfig
from memmc.dicom import vocabulary
from memmc.dicom.read import Instance, integer, sequence, text, texts
from memmc.dicom.reasons import Rejected
from memmc.dicom.sop_classes import IMAGE_CLASSES, SECONDARY_CAPTURE, ULTRASOUND

_MAX_FRAMES = 10_000
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_UNKNOWN = "UNKNOWN"  # what a list of accepted terms calls an object that says nothing
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


@dataclass(frozen=True)
class Rule:
    """One condition of the scope.

    Attributes:
        name: what it is called in explanations and documents.
        check: returns the reason code where the instance fails, else None.
        setting: the configuration field it follows, empty where it follows none.
        shown: what it reads, by keyword, in words that name nobody.
    """

    name: str
    check: Callable[[Instance, SelectConfig], str | None]
    setting: str
    shown: Callable[[Dataset], Mapping[str, str]]

    @property
    def states(self) -> str:
        """What has to hold."""
        return (self.check.__doc__ or "").strip()


@dataclass(frozen=True)
class Verdict:
    """A rule's answer for one instance; `reason` is None where it passed."""

    rule: Rule
    reason: str | None
    values: Mapping[str, str]


def select(instance: Instance, config: SelectConfig) -> None:
    """Let an instance in scope pass.

    Raises:
        Rejected: the first failing rule's META_*, SELECT_*, DEID_* or PIX_FLOAT_UNSUPPORTED code.
    """
    for rule in RULES:
        reason = rule.check(instance, config)
        if reason is not None:
            raise Rejected(reason)


def explain(instance: Instance, config: SelectConfig) -> list[Verdict]:
    """Return every rule's answer in the order that `select` asks them, also after the first that fails."""
    return [Verdict(rule, rule.check(instance, config), rule.shown(instance.dataset)) for rule in RULES]


def _sop_class(instance: Instance, config: SelectConfig) -> str | None:
    """SOP Class UID (0008,0016) names a class of images."""
    sop_class = text(instance.dataset, "SOPClassUID")
    if sop_class is None:
        return "META_MISSING_TYPE1"
    return None if sop_class in IMAGE_CLASSES else "META_SOP_CLASS_UNSUPPORTED"


def _modality(instance: Instance, config: SelectConfig) -> str | None:
    """Modality (0008,0060) is one of the accepted ones."""
    found = text(instance.dataset, "Modality")
    if found is None and instance.pixels is None:  # a header cut short, not an image that says nothing
        return "META_MISSING_TYPE1"
    return None if (found or _UNKNOWN) in config.modalities else "META_MODALITY_OUT_OF_SCOPE"


def _frames(instance: Instance, config: SelectConfig) -> str | None:
    """Number of Frames (0028,0008) is absent, empty or 1, or several are accepted."""
    if "NumberOfFrames" not in instance.dataset:
        return None
    frames = integer(instance.dataset, "NumberOfFrames")
    if frames is None:
        return None if text(instance.dataset, "NumberOfFrames") is None else "META_DIMENSIONS"
    if not 1 <= frames <= _MAX_FRAMES:
        return "META_DIMENSIONS"
    return "META_MULTIFRAME_UNSUPPORTED" if frames > 1 and config.frames == "refuse" else None


def _uids(instance: Instance, config: SelectConfig) -> str | None:
    """Study, Series and SOP Instance UID are there and are UIDs (PS3.5 section 9.1)."""
    for keyword in _UID_KEYWORDS:
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
    """No Secondary Capture (PS3.3 A.8), unless accepted."""
    return "SELECT_SECONDARY_CAPTURE" if _is_capture(instance.dataset) and not config.secondary_capture else None


def _captured_page(instance: Instance, config: SelectConfig) -> str | None:
    """No screen save, page or ultrasound, which carry text as a rule (PS3.15 E.1.1), unless it says it carries none."""
    dataset = instance.dataset
    if config.burned_in_annotation == "accept" or text(dataset, "BurnedInAnnotation") == "NO":
        return None
    is_page = (
        text(dataset, "SOPClassUID") in SECONDARY_CAPTURE | ULTRASOUND
        or text(dataset, "ConversionType") in _CAPTURED_PAGES
        or any("SCREEN" in value for value in texts(dataset, "ImageType")[2:])
    )
    return "DEID_BURNED_IN_FLAG" if is_page else None


def _derived(instance: Instance, config: SelectConfig) -> str | None:
    r"""Image Type (0008,0008) is not DERIVED\SECONDARY, unless accepted; DERIVED\PRIMARY marks lossy originals."""
    if config.derived or _is_capture(instance.dataset):
        return None
    return "SELECT_DERIVED" if texts(instance.dataset, "ImageType")[:2] == ["DERIVED", "SECONDARY"] else None


def _for_processing(instance: Instance, config: SelectConfig) -> str | None:
    """Presentation Intent Type (0008,0068) is not FOR PROCESSING."""
    return "SELECT_FOR_PROCESSING" if text(instance.dataset, "PresentationIntentType") == "FOR PROCESSING" else None


def _lateral(instance: Instance, config: SelectConfig) -> str | None:
    """View Position (0018,5101) and View Code Sequence (0054,0220) name no lateral projection, unless accepted."""
    if config.lateral_views:
        return None
    position = (text(instance.dataset, "ViewPosition") or "").upper()
    is_lateral = position in _LATERAL_VIEWS or _LATERAL_CODES.intersection(_view_codes(instance.dataset))
    return "SELECT_LATERAL_VIEW" if is_lateral else None


def _view(instance: Instance, config: SelectConfig) -> str | None:
    """View Position (0018,5101) is one of the accepted ones."""
    found = vocabulary.view(text(instance.dataset, "ViewPosition")) or _UNKNOWN
    return None if not config.views or found in config.views else "SELECT_VIEW"


def _body_part(instance: Instance, config: SelectConfig) -> str | None:
    """Body Part Examined (0018,0015) is one of the accepted ones."""
    found = vocabulary.body_part(text(instance.dataset, "BodyPartExamined")) or _UNKNOWN
    return None if not config.body_parts or found in config.body_parts else "SELECT_BODY_PART"


def _manufacturer(instance: Instance, config: SelectConfig) -> str | None:
    """Manufacturer (0008,0070) is one of the accepted ones."""
    found = vocabulary.manufacturer(text(instance.dataset, "Manufacturer")) or _UNKNOWN
    return None if not config.manufacturers or found in config.manufacturers else "SELECT_MANUFACTURER"


def _size(instance: Instance, config: SelectConfig) -> str | None:
    """Rows (0028,0010) and Columns (0028,0011) are large enough; absent ones are for the pixel module to judge."""
    sides = (integer(instance.dataset, keyword) for keyword in ("Rows", "Columns"))
    return "SELECT_SIZE" if any(side is not None and 0 < side < config.min_side_px for side in sides) else None


def _is_capture(dataset: Dataset) -> bool:
    return text(dataset, "SOPClassUID") in SECONDARY_CAPTURE


def _view_codes(dataset: Dataset) -> list[str | None]:
    return [text(item, "CodeValue") for item in sequence(dataset, "ViewCodeSequence")[:1]]


_UID_KEYWORDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_ABSENT = "absent"


def _numbers(*keywords: str) -> Callable[[Dataset], Mapping[str, str]]:
    def shown(dataset: Dataset) -> Mapping[str, str]:
        found = {keyword: integer(dataset, keyword) for keyword in keywords}
        return {name: _ABSENT if value is None else str(value) for name, value in found.items()}

    return shown


def _terms(**words: Callable[[str | None], str | None]) -> Callable[[Dataset], Mapping[str, str]]:
    def shown(dataset: Dataset) -> Mapping[str, str]:
        return {keyword: word(text(dataset, keyword)) or _ABSENT for keyword, word in words.items()}

    return shown


def _shown_class(dataset: Dataset) -> Mapping[str, str]:
    sop_class = text(dataset, "SOPClassUID")
    name = UID(sop_class).name if sop_class and sop_class.startswith("1.2.840.10008.") else vocabulary.OTHER
    return {"SOPClassUID": _ABSENT if sop_class is None else vocabulary.OTHER if name == sop_class else name}


def _shown_uids(dataset: Dataset) -> Mapping[str, str]:
    found = {keyword: text(dataset, keyword) for keyword in _UID_KEYWORDS}
    return {
        name: _ABSENT if uid is None else "valid" if len(uid) <= 64 and _UID.fullmatch(uid) else "not a UID"
        for name, uid in found.items()
    }


def _shown_type(dataset: Dataset) -> Mapping[str, str]:
    return {
        "ImageType": "\\".join(vocabulary.image_type(value) or "-" for value in texts(dataset, "ImageType")) or _ABSENT
    }


def _shown_page(dataset: Dataset) -> Mapping[str, str]:
    flags = _terms(BurnedInAnnotation=vocabulary.yes_no, ConversionType=vocabulary.conversion_type)
    return {**_shown_class(dataset), **_shown_type(dataset), **flags(dataset)}


def _shown_view(dataset: Dataset) -> Mapping[str, str]:
    codes = _view_codes(dataset)
    meaning = "lateral" if _LATERAL_CODES.intersection(codes) else vocabulary.OTHER if codes else _ABSENT
    return {**_terms(ViewPosition=vocabulary.view)(dataset), "ViewCodeSequence": meaning}


RULES: tuple[Rule, ...] = (
    Rule("sop_class", _sop_class, "", _shown_class),
    Rule("modality", _modality, "modalities", _terms(Modality=vocabulary.modality)),
    Rule("frames", _frames, "frames", _numbers("NumberOfFrames")),
    Rule("uids", _uids, "", _shown_uids),
    Rule("pixels", _pixels, "", lambda dataset: {}),
    Rule("burned_in", _flagged, "burned_in_annotation", _terms(BurnedInAnnotation=vocabulary.yes_no)),
    Rule("secondary_capture", _secondary_capture, "secondary_capture", _shown_class),
    Rule("captured_page", _captured_page, "burned_in_annotation", _shown_page),
    Rule("derived", _derived, "derived", _shown_type),
    Rule("for_processing", _for_processing, "", _terms(PresentationIntentType=vocabulary.intent)),
    Rule("lateral", _lateral, "lateral_views", _shown_view),
    Rule("view", _view, "views", _terms(ViewPosition=vocabulary.view)),
    Rule("body_part", _body_part, "body_parts", _terms(BodyPartExamined=vocabulary.body_part)),
    Rule("manufacturer", _manufacturer, "manufacturers", _terms(Manufacturer=vocabulary.manufacturer)),
    Rule("size", _size, "min_side_px", _numbers("Rows", "Columns")),
)
"""The rules in the order they are asked."""
