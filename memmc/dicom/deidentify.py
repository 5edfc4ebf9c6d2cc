"""De-identification by default-deny: what is not listed here does not leave the object.

Three kinds of values pass: keyed pseudonyms (UIDs, patient), numbers, and words
of closed vocabularies. No text is ever copied from an object, so an identifier
typed into an allow-listed attribute cannot pass either. Stricter than the Basic
Application Level Confidentiality Profile (PS3.15 Annex E, code 113100).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from pydicom.dataset import Dataset
from pydicom.uid import UID

from memmc.dicom import vocabulary
from memmc.dicom.read import Instance, decimal, integer, text
from memmc.errors import IdentityKeyError

logger = logging.getLogger(__name__)

Value = str | int | float | bool | None

MIN_KEY_BYTES = 32
_PATH_CONTEXT = b"memmc source_ref 1"
_LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{suffix}" for suffix in ("50", "51", "53", "55", "81"))
_MAYBE_LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{suffix}" for suffix in ("91", "203"))

_NAME = r"[A-Z][A-Z0-9 _.\-]{0,31}"
_UID = r"2\.25\.[0-9]{1,39}"
PATTERNS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "patient_key": r"[0-9a-f]{64}",
        "study_uid": _UID,
        "series_uid": _UID,
        "sop_instance_uid": _UID,
        "modality": r"[A-Z]{2,16}",
        "sop_class_uid": r"1\.2\.840\.10008\.[0-9.]{1,50}",
        "transfer_syntax_uid": r"1\.2\.840\.10008\.[0-9.]{1,50}",
        "photometric_interpretation": _NAME,
        "manufacturer": _NAME,
        "manufacturer_model": r"[A-Z0-9][A-Z0-9 ]{0,31}",
        "view_position": _NAME,
        "body_part": _NAME,
        "laterality": r"[RLUB]",
        "patient_sex": r"[MFO]",
        "acquisition_date": r"[0-9]{8}",
    }.items()
}
"""The only text attributes there are, and all they can look like."""

NUMBERS: Mapping[str, type[int] | type[float]] = {
    "patient_age_years": int,
    "rows": int,
    "columns": int,
    "bits_stored": int,
    "frame_number": int,
    "pixel_spacing_mm": float,
    "height": int,
    "width": int,
    "channels": int,
    "bits": int,
}
ATTRIBUTES: tuple[str, ...] = (*PATTERNS, *NUMBERS, "lossy")
"""Every attribute a converted object has, None where it is not known."""


def load_key(path: str | Path) -> bytes:
    """Read the identity key from a file; see `parse_key`.

    Raises:
        IdentityKeyError: unreadable, or shorter than 32 bytes.
    """
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror
        raise IdentityKeyError(f"identity key cannot be read ({reason}); check deid.key_file") from None
    return parse_key(key)


def parse_key(key: bytes) -> bytes:
    """Return the identity key as it is used.

    A key written as text (hex, base64, a pass phrase) is taken without the
    white space around it, so an editor's last newline does not change it.

    Raises:
        IdentityKeyError: shorter than 32 bytes.
    """
    if all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in key):
        key = key.strip()
    if len(key) < MIN_KEY_BYTES:
        raise IdentityKeyError(
            f"identity key has {len(key)} bytes, expected at least {MIN_KEY_BYTES}; "
            "make one with 'openssl rand -hex 32' and keep it apart from the data"
        )
    return key


def derive_key(master: bytes, purpose: str) -> bytes:
    """Return the 32-byte key for one purpose; knowing it tells nothing about the others or the master."""
    return hmac.digest(master, b"memmc/1/" + purpose.encode(), "sha256")


def key_id(master: bytes) -> str:
    """Return 16 hex digits that name the key and may be shown."""
    return hmac.digest(derive_key(master, "id"), b"", "sha256").hex()[:16]


def _digest(master: bytes, purpose: str, *parts: str) -> bytes:
    """HMAC over the parts, each with its length before it, so that ('ab', 'c') is not ('a', 'bc')."""
    message = b"".join(len(raw).to_bytes(8, "big") + raw for raw in (part.encode("utf-8", "replace") for part in parts))
    return hmac.digest(derive_key(master, purpose), message, "sha256")


def keyed_uid(master: bytes, uid: str) -> str:
    """Return the pseudonym of a UID: 2.25 and 128 bits as an integer (PS3.5 B.2), the same for the same key."""
    digest = hmac.digest(derive_key(master, "uid"), b"uid" + uid.encode("utf-8", "replace"), "sha256")
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def frame_uid(sop_instance_uid: str, frame_number: int) -> str:
    """Return the UID under which one frame of a multi-frame object is filed.

    Args:
        sop_instance_uid: the object's pseudonym; from it alone, so that a frame's UID can be found again.
        frame_number: 1-based.
    """
    digest = hashlib.sha256(f"memmc frame {sop_instance_uid} {frame_number}".encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def object_key(master: bytes, source: str, path: str, size_bytes: int, version: str) -> str:
    """Return 64 hex digits naming one object of a source as it was listed.

    Args:
        master: identity key.
        source: the source's URI.
        path: the object's path below it.
        size_bytes: its size, bytes.
        version: modification time or entity tag; another one makes another object.
    """
    return _digest(master, "object", source, path, str(size_bytes), version).hex()


def content_key(master: bytes, data: bytes | bytearray | memoryview) -> str:
    """Return 64 hex digits naming the bytes of an object; equal for equal bytes."""
    return hmac.digest(derive_key(master, "content"), data, "sha256").hex()


def _path_cipher(master: bytes) -> AESSIV:
    return AESSIV(derive_key(master, "path mac") + derive_key(master, "path cipher"))


def seal_path(master: bytes, path: str) -> str:
    """Encrypt a (non-empty) path for whoever holds the key: AES-SIV (RFC 5297), deterministic, base64url."""
    sealed = _path_cipher(master).encrypt(path.encode("utf-8", "surrogateescape"), [_PATH_CONTEXT])
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


def open_path(master: bytes, token: str) -> str:
    """Undo `seal_path`.

    Raises:
        IdentityKeyError: another key, or a changed token.
    """
    try:
        sealed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        plain = _path_cipher(master).decrypt(sealed, [_PATH_CONTEXT])
    except (InvalidTag, ValueError):
        raise IdentityKeyError("source reference does not open with this identity key; check deid.key_file") from None
    return plain.decode("utf-8", "surrogateescape")


def deidentify(instance: Instance, master: bytes, max_date_shift_days: int) -> dict[str, Value]:
    """Return the allow-listed attributes of an instance.

    Every attribute is read on its own: one that is broken is None and does not
    cost the others.
    """
    dataset = instance.dataset
    patient = patient_key(dataset, master)
    return {
        **dict.fromkeys(ATTRIBUTES),
        "patient_key": patient,
        **{
            name: keyed_uid(master, uid) if (uid := text(dataset, keyword)) else None
            for name, keyword in (
                ("study_uid", "StudyInstanceUID"),
                ("series_uid", "SeriesInstanceUID"),
                ("sop_instance_uid", "SOPInstanceUID"),
            )
        },
        **_words(instance),
        **_numbers(instance),
        "acquisition_date": _shifted_date(dataset, master, patient, max_date_shift_days),
    }


def patient_key(dataset: Dataset, master: bytes) -> str | None:
    """Return the patient's pseudonym, 64 hex digits.

    From Patient ID (0010,0020) and its issuer (0010,0021); where the ID is
    missing, from the study, so that at least a study stays together; None
    without either.
    """
    identifier = text(dataset, "PatientID")
    if identifier is not None:
        return keyed_patient(master, identifier, text(dataset, "IssuerOfPatientID") or "")
    study = text(dataset, "StudyInstanceUID")
    return _digest(master, "patient", "study", study).hex() if study is not None else None


def keyed_patient(master: bytes, identifier: str, issuer: str = "") -> str:
    """Return the pseudonym of a Patient ID and its issuer, as `patient_key` gives it."""
    return _digest(master, "patient", "id", issuer, identifier).hex()


def _words(instance: Instance) -> dict[str, Value]:
    dataset = instance.dataset
    sop_class = text(dataset, "SOPClassUID")
    manufacturer = vocabulary.manufacturer(text(dataset, "Manufacturer"))
    laterality = (text(dataset, "ImageLaterality") or text(dataset, "Laterality") or "").upper()
    sex = (text(dataset, "PatientSex") or "").upper()
    return {
        "modality": vocabulary.modality(text(dataset, "Modality")),
        "sop_class_uid": _standard_uid(sop_class),
        "transfer_syntax_uid": instance.transfer_syntax,
        "photometric_interpretation": vocabulary.photometric(text(dataset, "PhotometricInterpretation")),
        "manufacturer": manufacturer,
        "manufacturer_model": vocabulary.model(manufacturer, text(dataset, "ManufacturerModelName")),
        "view_position": vocabulary.view(text(dataset, "ViewPosition")),
        "body_part": vocabulary.body_part(text(dataset, "BodyPartExamined")),
        "laterality": laterality if laterality in ("R", "L", "U", "B") else None,
        "patient_sex": sex if sex in ("M", "F", "O") else None,
    }


def _standard_uid(uid: str | None) -> str | None:
    """Return a UID of PS3.6 Annex A; one of anybody else's making may name them."""
    return uid if uid is not None and uid.startswith("1.2.840.10008.") and UID(uid).name != uid else None


def _numbers(instance: Instance) -> dict[str, Value]:
    dataset = instance.dataset
    spacing = decimal(dataset, "ImagerPixelSpacing") or decimal(dataset, "PixelSpacing")
    return {
        "patient_age_years": _age_years(dataset),
        "rows": _bounded(dataset, "Rows", 65_535),
        "columns": _bounded(dataset, "Columns", 65_535),
        "bits_stored": _bounded(dataset, "BitsStored", 64),
        "pixel_spacing_mm": round(spacing, 4) if spacing is not None and 0.001 <= spacing <= 100 else None,
        "lossy": _lossy(instance),
    }


def _bounded(dataset: Dataset, keyword: str, high: int) -> int | None:
    value = integer(dataset, keyword)
    return value if value is not None and 0 <= value <= high else None


def _lossy(instance: Instance) -> bool:
    """Lossy Image Compression (0028,2110), or what the transfer syntax alone says."""
    flag = text(instance.dataset, "LossyImageCompression")
    if instance.transfer_syntax in _LOSSY_SYNTAXES or flag == "01":
        return True
    return instance.transfer_syntax in _MAYBE_LOSSY_SYNTAXES and flag != "00"


def _age_years(dataset: Dataset) -> int | None:
    """Patient's Age (0010,1010), else birth to study date; 90 stands for 90 and over (45 CFR 164.514(b)(2)(i)(C))."""
    match = re.fullmatch(r"([0-9]{3})([DWMY])", text(dataset, "PatientAge") or "")
    if match:
        days = int(match[1]) * {"D": 1.0, "W": 7.0, "M": 30.4375, "Y": 365.25}[match[2]]
        years = int(match[1]) if match[2] == "Y" else int(days / 365.25)
    else:
        birth, study = _date(dataset, "PatientBirthDate"), _date(dataset, "StudyDate")
        if birth is None or study is None or study < birth:
            return None
        years = study.year - birth.year - ((study.month, study.day) < (birth.month, birth.day))
    return min(years, 90) if years <= 130 else None


def _date(dataset: Dataset, keyword: str) -> date | None:
    """Return a DA or the date of a DT (PS3.5 6.2), None for anything else."""
    value = text(dataset, keyword) or ""
    match = re.match(r"([0-9]{4})\.?([0-9]{2})\.?([0-9]{2})", value)
    try:
        return date(int(match[1]), int(match[2]), int(match[3])) if match else None
    except ValueError:
        return None


def _shifted_date(dataset: Dataset, master: bytes, patient: str | None, bound_days: int) -> str | None:
    """Return the day of acquisition moved by the patient's own number of days; gaps between a patient's days stay."""
    if patient is None:
        return None
    keywords = ("AcquisitionDate", "AcquisitionDateTime", "ContentDate", "SeriesDate", "StudyDate")
    day = next((found for keyword in keywords if (found := _date(dataset, keyword)) is not None), None)
    if day is None:
        return None
    try:
        return (day + timedelta(days=date_shift_days(master, patient, bound_days))).strftime("%Y%m%d").zfill(8)
    except OverflowError:
        return None


def date_shift_days(master: bytes, patient: str, bound_days: int) -> int:
    """Return the patient's date shift: -bound..bound days, never 0."""
    number = int.from_bytes(_digest(master, "date", patient)[:8], "big") % (2 * bound_days)
    return number - bound_days if number < bound_days else number - bound_days + 1
