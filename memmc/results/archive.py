"""An archive that takes results: what is asked of it, and what it may answer.

Nothing here or behind it logs or raises what an archive knows of a patient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from pydicom.dataset import Dataset

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


class Archive(Protocol):
    """Where results go."""

    @property
    def place(self) -> str:
        """Its URI, or the folder."""
        ...

    def check(self) -> str:
        """Ask whether the archive answers, and return what it is in words.

        Raises:
            StorageError: it does not, or refuses.
        """
        ...

    def study(self, study_uid: str) -> Dataset | None:
        """Return `HEADER` of a study, as Unicode; None where the archive has no such study.

        Raises:
            StorageError: the archive does not answer, or refuses.
        """
        ...

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """Return the SOP Instance UIDs of a series; none where there is no such series.

        Raises:
            StorageError: the archive does not answer, or refuses.
        """
        ...

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """Store objects of one study; return why, by SOP Instance UID, for those it would not store.

        Raises:
            StorageError: the archive does not answer, or refuses whatever it is sent.
        """
        ...

    def close(self) -> None:
        """End the connection."""
        ...


def header_among(answers: Iterable[Dataset], study_uid: str) -> Dataset | None:
    """Return `HEADER` of a study from an archive's answers, texts as Unicode, in whatever character set they came.

    Answers about other studies are passed over: an archive that does not know a key of a search may leave it out.
    """
    for answer in answers:
        answer.decode()
        if str(answer.get("StudyInstanceUID", "")).strip() != study_uid:
            continue
        header = Dataset()
        for keyword in HEADER:
            value = answer.get(keyword)
            setattr(header, keyword, "" if value is None else str(value).strip())
        return header
    return None
