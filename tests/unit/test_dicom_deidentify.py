"""Nothing identifying passes, and pseudonyms hold what they promise."""

from __future__ import annotations

import pickle
from datetime import date
from pathlib import Path

import pytest
from dicom_instances import KEY, dataset, encoded, policy
from hypothesis import example, given
from hypothesis import strategies as st

from memmc.dicom import vocabulary
from memmc.dicom.convert import convert
from memmc.dicom.deidentify import (
    ATTRIBUTES,
    PATTERNS,
    Value,
    content_key,
    date_shift_days,
    derive_key,
    key_id,
    keyed_uid,
    load_key,
    object_key,
    open_path,
    seal_path,
)
from memmc.errors import IdentityKeyError

OTHER_KEY = bytes(reversed(KEY))


def attributes(key: bytes = KEY, **values: object) -> dict[str, Value]:
    return dict(convert(encoded(dataset(**values)), policy(key=key)).attributes)


def test_what_passes_from_a_plain_chest_image() -> None:
    found = attributes(ManufacturerModelName="FLUOROSPOT Compact", ImagerPixelSpacing=["0.143", "0.143"])
    expected = {
        "modality": "CR",
        "manufacturer": "SIEMENS",
        "manufacturer_model": "FLUOROSPOT COMPACT",
        "view_position": "PA",
        "body_part": "CHEST",
        "patient_sex": "F",
        "patient_age_years": 42,
        "rows": 64,
        "columns": 64,
        "bits_stored": 12,
        "pixel_spacing_mm": 0.143,
        "lossy": False,
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.1",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "photometric_interpretation": "MONOCHROME2",
    }
    assert {name: found[name] for name in expected} == expected
    assert set(found) == set(ATTRIBUTES)


TEXTS = (
    "Manufacturer ManufacturerModelName BodyPartExamined ViewPosition PatientSex ImageLaterality Laterality PatientAge "
    "StudyDate AcquisitionDate PatientBirthDate PatientID IssuerOfPatientID StudyInstanceUID SeriesInstanceUID "
    "SOPInstanceUID SOPClassUID Modality PhotometricInterpretation LossyImageCompression BurnedInAnnotation "
    "StudyDescription InstitutionName PatientName ReferringPhysicianName PresentationLUTShape VOILUTFunction"
)


@pytest.mark.parametrize("keyword", TEXTS.split())
@pytest.mark.parametrize("planted", ["PHI7QX", "PHI7QX^JOHN", "CHEST PHI7QX", "SIEMENS PHI7QX", "DR 77 PHI7QX"])
def test_planted_text_does_not_pass(keyword: str, planted: str) -> None:
    found = attributes(**{keyword: planted})
    assert not [value for value in found.values() if "PHI" in str(value) or "JOHN" in str(value)]
    for name, value in found.items():
        assert value is None or name not in PATTERNS or PATTERNS[name].fullmatch(str(value)), name


@given(st.text(max_size=40), st.sampled_from(["SIEMENS", "GE", None, "OTHER"]))
@example("C-SPINE", "SIEMENS")
def test_vocabularies_are_closed(value: str, vendor: str | None) -> None:
    for word in (vocabulary.body_part, vocabulary.view, vocabulary.modality, vocabulary.manufacturer):
        found = word(value)
        letters = "".join(filter(str.isalnum, value.upper()))
        assert found is None or found == "OTHER" or found[:2] in letters
    found = vocabulary.model(vendor, value)
    assert found in (None, "OTHER") or len(found) <= 32


@pytest.mark.parametrize(
    ("vendor", "model", "passes"),
    [
        ("SIEMENS", "Fluorospot Compact FD", "FLUOROSPOT COMPACT FD"),
        ("GE", "Optima XR656", "OPTIMA XR656"),
        ("CARESTREAM", "DRX-1", "DRX 1"),
        ("FUJIFILM", "FDR D-EVO 2", "OTHER"),
        ("PHILIPS", "DigitalDiagnost", "DIGITALDIAGNOST"),
        ("PHILIPS", "DigitalDiagnost Room Smith", "OTHER"),
        ("PHILIPS", "MRN 123456", "OTHER"),
        ("PHILIPS", "DR 19700101", "OTHER"),
        ("PHILIPS", "DR 1970 0101", "OTHER"),
        ("PHILIPS", "123", "OTHER"),
        ("OTHER", "DigitalDiagnost", "OTHER"),
        (None, "DigitalDiagnost", "OTHER"),
        ("PHILIPS", None, None),
    ],
)
def test_model_names(vendor: str | None, model: str | None, passes: str | None) -> None:
    assert vocabulary.model(vendor, model) == passes


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("FUJI PHOTO FILM Co., ltd.", "FUJIFILM"),
        ('"GE Healthcare"', "GE"),
        ("Philips Medical Systems", "PHILIPS"),
        ("GERMANY CLINIC", "OTHER"),
        ("  ", None),
    ],
)
def test_manufacturers(written: str, known: str | None) -> None:
    assert vocabulary.manufacturer(written) == known


def test_uids_are_keyed_and_stable() -> None:
    first = keyed_uid(KEY, "1.2.3")
    assert first == keyed_uid(KEY, "1.2.3")
    assert first != keyed_uid(OTHER_KEY, "1.2.3")
    assert len({keyed_uid(KEY, f"1.2.{number}") for number in range(2000)}) == 2000
    assert all(len(keyed_uid(KEY, f"1.2.{number}")) <= 64 for number in range(100))
    assert attributes()["study_uid"] == keyed_uid(KEY, "1.2.3.2")
    assert attributes()["study_uid"] == attributes(PatientID="another")["study_uid"]


def test_patient_key() -> None:
    one = attributes()["patient_key"]
    assert one == attributes(SOPInstanceUID="1.9", StudyInstanceUID="1.8")["patient_key"]
    assert one == attributes(PatientID=" MRN0001 ")["patient_key"]
    assert one != attributes(PatientID="MRN0002")["patient_key"]
    assert one != attributes(IssuerOfPatientID="CLINIC B")["patient_key"]
    assert one != attributes(key=OTHER_KEY)["patient_key"]
    nameless = attributes(PatientID="")["patient_key"]
    assert nameless == attributes(PatientID=None, SOPInstanceUID="1.9")["patient_key"]
    assert nameless != attributes(PatientID="", StudyInstanceUID="1.8")["patient_key"]
    assert nameless != attributes(PatientID="1.2.3.2")["patient_key"]


def day(value: Value) -> date:
    assert isinstance(value, str)
    return date(int(value[:4]), int(value[4:6]), int(value[6:]))


def test_dates_move_per_patient_and_keep_their_gaps() -> None:
    first, second = (day(attributes(AcquisitionDate=when)["acquisition_date"]) for when in ("20200228", "20210301"))
    assert (second - first).days == (date(2021, 3, 1) - date(2020, 2, 28)).days
    assert 1 <= abs((first - date(2020, 2, 28)).days) <= 365
    shifts = {date_shift_days(KEY, f"{number}", 30) for number in range(2000)}
    assert shifts == set(range(-30, 31)) - {0}


@pytest.mark.parametrize("written", ["20259999", "", "2020", "yesterday"])
def test_impossible_dates_are_dropped(written: str) -> None:
    assert attributes(AcquisitionDate=written, StudyDate="")["acquisition_date"] is None


@pytest.mark.parametrize(
    ("written", "years"),
    [("089Y", 89), ("090Y", 90), ("104Y", 90), ("131Y", None), ("018M", 1), ("003W", 0), ("old", None), ("42", None)],
)
def test_ages(written: str, years: int | None) -> None:
    assert attributes(PatientAge=written)["patient_age_years"] == years


def test_age_from_the_date_of_birth() -> None:
    birth = {"PatientAge": None, "StudyDate": "20200229"}
    assert attributes(PatientBirthDate="19800301", **birth)["patient_age_years"] == 39
    assert attributes(PatientBirthDate="19800229", **birth)["patient_age_years"] == 40
    assert attributes(PatientBirthDate="19100101", **birth)["patient_age_years"] == 90
    assert attributes(PatientBirthDate="20300101", **birth)["patient_age_years"] is None


def test_paths_are_sealed() -> None:
    path = "DOE^JANE/1970/ä \udcff.dcm"
    token = seal_path(KEY, path)
    assert "DOE" not in token
    assert token.replace("-", "").replace("_", "").isalnum()
    assert (token, open_path(KEY, token)) == (seal_path(KEY, path), path)
    with pytest.raises(IdentityKeyError):
        open_path(OTHER_KEY, token)
    for damaged in (token[:-2], ("A" if token[0] != "A" else "B") + token[1:], "", "*"):
        with pytest.raises(IdentityKeyError):
            open_path(KEY, damaged)


def test_keys() -> None:
    assert derive_key(KEY, "a") != derive_key(KEY, "b") != derive_key(OTHER_KEY, "b")
    assert len(key_id(KEY)) == 16
    assert key_id(KEY) != key_id(OTHER_KEY)
    assert content_key(KEY, b"x") != content_key(KEY, b"y")
    parts = ("s3://a", "b/c.dcm", 10, "20200101")
    keys = {object_key(KEY, *parts), object_key(KEY, "s3://ab", "/c.dcm", 10, "20200101")}
    keys |= {object_key(KEY, *parts[:2], 11, "20200101"), object_key(OTHER_KEY, *parts)}
    assert len(keys) == 4
    assert repr(KEY) not in repr(policy())
    assert pickle.loads(pickle.dumps(policy())) == policy()


def test_load_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"0123456789abcdef" * 2 + b"\n")
    assert load_key(file) == b"0123456789abcdef" * 2
    file.write_bytes(bytes(31) + b"\n")
    assert load_key(file) == bytes(31) + b"\n"
    for content in (b"", b"0123456789abcdef" * 2 + b"", b"short\n"):
        file.write_bytes(content[:31])
        with pytest.raises(IdentityKeyError, match="at least 32"):
            load_key(file)
    with pytest.raises(IdentityKeyError, match="cannot be read") as caught:
        load_key(tmp_path / "none")
    assert str(tmp_path) not in str(caught.value)
