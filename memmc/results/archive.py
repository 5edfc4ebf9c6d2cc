"""An archive that takes results: what is asked of it, and what it may answer.

Nothing here or behind it logs or raises what an archive knows of a patient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from memmc.errors import StorageError

HEADER: Final = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)
"""Attributes of patient and study (PS3.3 C.7.1.1, C.7.2.1) that a result repeats as the archive has them."""

OBJECT_REFUSED: Final = "OBJECT_REFUSED"
"""Reason of an object that an archive would not store."""

DUPLICATE_SOP_INSTANCE: Final = 0x0111
"""Status of an object that the archive had already (PS3.7 C.5.9): it is where it should be."""


class NoAnswerError(StorageError):
    """An archive is gone, silent, busy or full; another call may fare better."""


class Taker(Protocol):
    """What takes results: an archive or a folder."""

    @property
    def place(self) -> str:
        """Its URI or path."""
        ...

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """Return the SOP Instance UIDs of a series; none where there is no such series.

        Raises:
            StorageError: it does not answer, or refuses.
        """
        ...

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """Store objects of one study; return why, by SOP Instance UID, for those it would not store.

        Raises:
            NoAnswerError: it does not answer, is busy or full.
            StorageError: it refuses whatever it is sent.
        """
        ...


class Archive(Taker, Protocol):
    """Where images are, and results go."""

    def check(self) -> str:
        """Ask whether the archive answers, and return what it is in words.

        Raises:
            StorageError: it does not, or refuses.
        """
        ...

    def headers(self, study_uid: str) -> list[Dataset]:
        """Return `HEADER` of a study, as Unicode; of several where the archive has them under one UID, or of none.

        Raises:
            StorageError: the archive does not answer, or refuses.
        """
        ...

    def close(self) -> None:
        """End the connection."""
        ...


def headers_among(answers: Iterable[Dataset], study_uid: str) -> list[Dataset]:
    """Return `HEADER` of a study from an archive's answers, whose texts are Unicode.

    Answers about other studies are passed over: an archive that does not know a key of a search may leave it out.
    """
    return [_header(answer) for answer in answers if text_of(answer, "StudyInstanceUID") == study_uid]


def _header(answer: Dataset) -> Dataset:
    header = Dataset()
    for keyword in HEADER:
        setattr(header, keyword, text_of(answer, keyword))
    return header


def text_of(answer: Dataset, keyword: str) -> str:
    """Return an attribute's values as one text, as DICOM writes them: a backslash between two; empty where absent."""
    value = answer.get(keyword)
    values = value if isinstance(value, MultiValue) else ["" if value is None else value]
    return "\\".join(str(each).strip() for each in values)
