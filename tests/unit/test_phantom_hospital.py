"""The simulated hospital on disk: deterministic, readable, lossless, with faults where they belong."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut

from memmc.errors import UsageError
from memmc.phantom.hospital import FAULTS, HospitalSummary, plan_exams, write_hospital
from memmc.phantom.lesions import LESION_KINDS
from memmc.phantom.objects import PROFILES, Identity, Profile, image_object, stored_pixels
from memmc.phantom.radiograph import Radiograph, simulate

SIZES = {"num_normal": 7, "num_abnormal": 4, "num_broken": 7, "seed": 3}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> HospitalSummary:
    return write_hospital(tmp_path_factory.mktemp("hospital") / "scans", **SIZES)


@pytest.fixture(scope="module")
def radiograph() -> Radiograph:
    return simulate(0, 0, None, 64)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: f"{p.transfer_syntax.name}-{p.photometric}-{p.grey}")
def test_every_profile_decodes_to_the_simulated_pixels(profile: Profile, radiograph: Radiograph) -> None:
    dataset = pydicom.dcmread(BytesIO(image_object(radiograph, Identity(1, 2, 0, "F"), profile)))
    assert dataset.file_meta.TransferSyntaxUID == profile.transfer_syntax
    stored = stored_pixels(radiograph, profile)
    np.testing.assert_array_equal(dataset.pixel_array, stored)
    values = apply_modality_lut(dataset.pixel_array, dataset)
    if profile.grey == "rescale":
        values = values + 1024
    if profile.photometric == "MONOCHROME1":
        values = 4095 - values
    np.testing.assert_array_equal(values, radiograph.image_HW)
    assert dataset.BitsStored == 12


def test_profiles_cover_the_syntaxes_both_photometrics_and_both_modalities() -> None:
    assert len({profile.transfer_syntax for profile in PROFILES}) == 7
    assert {profile.photometric for profile in PROFILES} == {"MONOCHROME1", "MONOCHROME2"}
    assert {profile.modality for profile in PROFILES} == {"CR", "DX"}
    assert {profile.grey for profile in PROFILES} == {"none", "window", "sigmoid", "voi_lut", "rescale", "signed"}


def test_counts_labels_and_masks_agree(hospital: HospitalSummary) -> None:
    labels = rows_of(hospital.labels_csv)
    files = {str(path.relative_to(hospital.dicom_dir)) for path in hospital.dicom_dir.rglob("*") if path.is_file()}
    assert {row["path"] for row in labels} == files
    assert (hospital.num_normal, hospital.num_abnormal, hospital.num_broken) == (7, 4, 7)
    assert sorted(row["lesion"] for row in labels if row["label"] == "abnormal") == sorted(LESION_KINDS)
    assert sum(row["label"] == "normal" for row in labels) == 7 + 1  # the copy of a normal is a normal
    by_uid = {row["sop_instance_uid"]: row for row in rows_of(hospital.masks_csv)}
    assert len(by_uid) == 4
    for row in labels:
        if row["label"] != "abnormal":
            continue
        dataset = pydicom.dcmread(hospital.dicom_dir / row["path"])
        mask = np.array(Image.open(hospital.masks_csv.parent / by_uid[dataset.SOPInstanceUID]["path"]))
        assert mask.shape == (dataset.Rows, dataset.Columns)
        assert set(np.unique(mask)) == {0, 255}
        assert by_uid[dataset.SOPInstanceUID]["lesion"] == row["lesion"]


def test_the_faults_are_what_they_are_called(hospital: HospitalSummary) -> None:
    seen: dict[str, int] = {}
    contents: dict[bytes, str] = {}
    for exam in plan_exams(7, 4, 7, 3):
        data = (hospital.dicom_dir / exam.path).read_bytes()
        if exam.fault is None:
            contents[data] = exam.path
    for exam in plan_exams(7, 4, 7, 3):
        path = hospital.dicom_dir / exam.path
        data = path.read_bytes()
        if exam.fault is None:
            assert pydicom.dcmread(path).pixel_array.shape == (256, 256)
            continue
        seen[exam.fault] = seen.get(exam.fault, 0) + 1
        if exam.fault == "empty":
            assert data == b""
        elif exam.fault == "web_page":
            with pytest.raises(InvalidDicomError):
                pydicom.dcmread(path)
        elif exam.fault == "duplicate":
            assert data in contents
        elif exam.fault == "lateral":
            assert pydicom.dcmread(path).ViewPosition == "LL"
        elif exam.fault == "report":
            assert pydicom.dcmread(path).Modality == "SR"
        else:  # truncated, garbage
            with pytest.raises(Exception):  # noqa: B017 - whatever the decoder raises
                _ = pydicom.dcmread(path).pixel_array
    assert seen == dict.fromkeys(FAULTS, 1)


def test_equal_parameters_give_equal_bytes_whatever_the_workers(hospital: HospitalSummary, tmp_path: Path) -> None:
    again = write_hospital(tmp_path / "again", **SIZES, workers=2)
    assert tree(again.dicom_dir.parent) == tree(hospital.dicom_dir.parent)


def test_a_complete_folder_is_reused_and_another_is_refused(hospital: HospitalSummary, tmp_path: Path) -> None:
    root = hospital.dicom_dir.parent
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    calls: list[tuple[int, int]] = []
    summary = write_hospital(root, **SIZES, progress=lambda done, total: calls.append((done, total)))
    assert summary.reused
    assert summary.num_patients == hospital.num_patients
    assert not calls
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == stamps
    with pytest.raises(UsageError, match="other scans"):
        write_hospital(root, **{**SIZES, "seed": 4})
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="other files"):
        write_hospital(tmp_path, **SIZES)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_progress_counts_to_the_end_and_a_broken_off_run_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "scans.partial" / "masks").mkdir(parents=True)
    (tmp_path / "scans.partial" / "left-over").write_text("x")
    calls: list[tuple[int, int]] = []
    write_hospital(tmp_path / "scans", num_normal=1, num_abnormal=0, num_broken=2, seed=0,
                   progress=lambda done, total: calls.append((done, total)))  # fmt: skip
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scans"]
    assert not (tmp_path / "scans" / "left-over").exists()
    assert json.loads((tmp_path / "scans" / "manifest.json").read_text())["num_normal"] == 1


def test_headers_identify_an_invented_patient_consistently(hospital: HospitalSummary) -> None:
    exams = [exam for exam in plan_exams(7, 4, 7, 3) if exam.fault is None]
    people: dict[int, set[tuple[str, str, str]]] = {}
    uids: list[str] = []
    for exam in exams:
        dataset = pydicom.dcmread(hospital.dicom_dir / exam.path, stop_before_pixels=True)
        identity = (str(dataset.PatientName), dataset.PatientID, dataset.PatientBirthDate)
        assert all(identity)
        assert dataset.AccessionNumber
        people.setdefault(exam.patient, set()).add(identity)
        uids.append(dataset.SOPInstanceUID)
    assert all(len(identities) == 1 for identities in people.values())
    assert len({next(iter(identities)) for identities in people.values()}) == len(people)
    assert len(set(uids)) == len(uids)
    studies = [exam.patient for exam in exams]
    assert max(studies.count(patient) for patient in studies) == 2


def test_order_and_makers_tell_nothing_about_labels() -> None:
    exams = [exam for exam in plan_exams(300, 80, 7, 1) if exam.fault is None]
    abnormal = np.array([exam.lesion is not None for exam in exams])
    position = np.flatnonzero(abnormal).mean() / len(exams)
    assert 0.4 < position < 0.6
    for profile in range(len(PROFILES)):
        chosen = np.array([exam.profile == profile for exam in exams])
        assert 0.05 < abnormal[chosen].mean() < 0.45
