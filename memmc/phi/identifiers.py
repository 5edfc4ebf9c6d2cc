"""The values to search for: out of a list, or out of the headers of the original objects."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from memmc.dicom import vocabulary
from memmc.dicom.read import silenced
from memmc.errors import UsageError

LEAST_CHARACTERS = 4
LEAST_DIGITS = 5

_KIND_COLUMN = "kind"  # of a table of identifiers: what a value is, not a value
_TEXT_VRS = frozenset(("AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"))
_STANDARD_ROOT = "1.2.840.10008."
_NOT_IDENTIFYING_TEXT = (
    "Manufacturer ManufacturerModelName SoftwareVersions CodeValue CodeMeaning CodingSchemeDesignator "
    "CodingSchemeVersion ContextIdentifier MappingResource LossyImageCompressionMethod ImplementationVersionName "
    "ImplementationClassUID ContextUID MappingResourceUID CodingSchemeUID WindowCenterWidthExplanation LUTExplanation"
)
_NOT_IDENTIFYING = frozenset(_NOT_IDENTIFYING_TEXT.split())
_COMMON_WORD_TEXT = (
    "AND AP DX EXAM IMAGE LAT OF PORTABLE RADIOGRAPH RIGHT LEFT SERIES STUDY THE VIEW VIEWS X XR XRAY RAY"
)
_COMMON_WORDS = frozenset(_COMMON_WORD_TEXT.split())


@dataclass(frozen=True)
class Identifiers:
    """Distinct values, in the order they were met. Holds patient data: never log it.

    Attributes:
        values: to search for.
        short: distinct values left out since they occur by chance: under 4 characters, or numbers under 5 digits.
        generic: distinct values left out since every word of theirs is one of the closed vocabularies.
        unread: objects whose header could not be read.
    """

    values: tuple[str, ...]
    short: int = 0
    generic: int = 0
    unread: int = 0

    def __repr__(self) -> str:
        return f"Identifiers({len(self.values)} values)"


def from_file(path: Path) -> Identifiers:
    """Read a list: ``.csv`` with a header, every cell but those of a column ``kind``; else one value a line.

    Raises:
        UsageError: the file cannot be read as UTF-8 text, or holds nothing to search for.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"the list of identifiers cannot be read ({error.strerror}); check --identifiers") from None
    except UnicodeDecodeError:
        raise UsageError("the list of identifiers is not UTF-8 text; convert it first") from None
    found = chosen(_cells(text) if path.suffix.lower() == ".csv" else text.splitlines())
    if not found.values:
        raise UsageError(
            f"the list of identifiers holds no value of {LEAST_CHARACTERS} characters or {LEAST_DIGITS} digits or more"
        )
    return found


def _cells(text: str) -> Iterator[str]:
    rows = csv.reader(text.splitlines())
    header = [name.strip().lower() for name in next(rows, [])]
    for row in rows:
        yield from (cell for number, cell in enumerate(row) if header[number : number + 1] != [_KIND_COLUMN])


def from_dicom(folder: Path) -> Identifiers:
    """Collect what identifies from the headers of all objects under a folder, at every nesting.

    Names, texts, application entities and UIDs of anybody's making but the standard's; of the dates those of birth,
    since the others stand in every log of the same day.

    Raises:
        UsageError: no such folder, or no object in it.
    """
    if not folder.is_dir():
        raise UsageError("--dicom names no folder; give the folder of the original objects")
    values: dict[str, None] = {}
    read = unread = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        try:
            with silenced():
                dataset = pydicom.dcmread(path, stop_before_pixels=True, force=False)
                values.update(dict.fromkeys(identifying(dataset)))
                read += 1
        except Exception:  # noqa: BLE001 - one unreadable header must not cost the others; its text quotes values
            unread += 1
    if not read:
        raise UsageError("--dicom: no readable DICOM object in this folder")
    specific = [value for value in values if not _generic(value)]
    found = chosen(specific)
    return Identifiers(found.values, found.short, len(values) - len(specific), unread)


def identifying(dataset: Dataset) -> Iterator[str]:
    """Yield the identifying values of a header, its file meta information and all its sequences."""
    for part in (getattr(dataset, "file_meta", None), dataset):
        for element in part.iterall() if part is not None else ():
            if element.keyword not in _NOT_IDENTIFYING:
                yield from (value for value in _values(element) if value)


def _values(element: DataElement) -> Iterator[str]:
    parts = element.value if isinstance(element.value, MultiValue | list) else [element.value]
    if element.VR in _TEXT_VRS:
        yield from (str(part).strip() for part in parts if part)
    elif element.VR == "UI":
        yield from (str(part) for part in parts if part and not str(part).startswith(_STANDARD_ROOT))
    elif element.VR == "DA" and "Birth" in element.keyword:
        yield from (str(part) for part in parts if part)
    elif element.VR == "UN" and isinstance(element.value, bytes) and len(element.value) <= 256:
        text = element.value.rstrip(b"\0 ").decode("utf-8", "replace")
        if text.isprintable() and "�" not in text:
            yield text


def _generic(value: str) -> bool:
    """Say whether a text holds nothing but words that ingest itself may write."""
    words = re.sub(r"[^A-Z0-9]+", " ", value.upper()).split()
    return all(
        word in _COMMON_WORDS
        or vocabulary.body_part(word) not in (None, vocabulary.OTHER)
        or vocabulary.view(word) not in (None, vocabulary.OTHER)
        or vocabulary.modality(word) not in (None, vocabulary.OTHER)
        or vocabulary.manufacturer(word) not in (None, vocabulary.OTHER)
        for word in words
    )


def chosen(values: Iterable[str]) -> Identifiers:
    """Leave out the empty and, counted, the short."""
    distinct = dict.fromkeys(stripped for value in values if (stripped := value.strip().strip("\0").strip()))
    long = [value for value in distinct if _long_enough(value)]
    return Identifiers(tuple(long), short=len(distinct) - len(long))


def _long_enough(value: str) -> bool:
    return len(value) >= LEAST_CHARACTERS and not (value.isdigit() and len(value) < LEAST_DIGITS)


def joined(several: Iterable[Identifiers]) -> Identifiers:
    """Return the distinct values of all."""
    lists = list(several)
    return Identifiers(
        tuple(dict.fromkeys(value for one in lists for value in one.values)),
        sum(one.short for one in lists),
        sum(one.generic for one in lists),
        sum(one.unread for one in lists),
    )
