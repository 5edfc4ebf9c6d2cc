"""Result objects: conformant, complete, the same whenever they are made, silent about odd values."""

from __future__ import annotations

import io
import shutil
import subprocess
import warnings
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from highdicom import sr
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ComprehensiveSRStorage, SecondaryCaptureImageStorage

from memmc.results.archive import HEADER
from memmc.results.dicomweb import encoded
from memmc.results.objects import ANOMALY_SCORE, DISCLAIMER, P_VALUE, VERDICT, Judged, picture, report

DX, XA = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.12.1"
BOX = {"image_x_px": 10.5, "image_y_px": 20.0, "image_width_px": 100.0, "image_height_px": 90.0}
REGION = {"x_px": 1, "y_px": 2, "width_px": 4, "height_px": 3, "area_px": 9, "peak": 2.5, "p_value": 0.01, **BOX}
JUDGED = Judged(
    sop_instance_uid="1.2.840.1.3",
    sop_class_uid=DX,
    series_uid="1.2.840.1.2",
    study_uid="1.2.840.1.1",
    frame=None,
    rows=2048,
    columns=1800,
    lossy=False,
    anomaly_score=3.123456789012345,
    p_value=0.012345,
    is_abnormal=True,
    rate=0.05,
    regions=[REGION],
    model="memmc-cxr/3",
    model_digest="d" * 64,
    calibration_id="c0ffee",
    preprocess_id="p1",
    dataset_version=7,
    scored_at=datetime(2026, 11, 29, 12, 0, 5, tzinfo=UTC),
)
SHOWN = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


def header(**changes: str) -> Dataset:
    values = dict.fromkeys(HEADER, "") | {"PatientName": "Müßig^Zoë", "PatientID": "4711", "PatientSex": "F"}
    values |= {"PatientBirthDate": "19611224", "StudyDate": "20260105", "StudyTime": "093015", "StudyID": "S1"}
    made = Dataset()
    for keyword, value in {**values, **changes}.items():
        setattr(made, keyword, value)
    return made


def read(made: Dataset) -> Dataset:
    return dcmread(io.BytesIO(encoded(made)))


def groups(made: Dataset) -> list[Dataset]:
    """The measurement groups of a report."""
    (measurements,) = (item for item in made.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010")
    return list(measurements.ContentSequence)


def outlines(made: Dataset) -> list[list[float]]:
    items = [item for group in groups(made) for item in group.ContentSequence]
    return [list(map(float, item.GraphicData)) for item in items if item.ValueType == "SCOORD"]


@pytest.mark.parametrize("frame", [None, 3])
@pytest.mark.parametrize("verdict", [True, False, None])
def test_both_objects_conform(verdict, frame, tmp_path):
    """By dciodvfy, the standard's checker (dicom3tools), where it is installed; by dcmtk's reader of reports too."""
    judged = replace(JUDGED, is_abnormal=verdict, frame=frame, lossy=verdict is None)
    if frame is not None:
        judged = replace(judged, sop_class_uid=XA)
    made = {"sr": report(judged, header()), "sc": picture(judged, header(), SHOWN)}
    tools = {name for name in ("dciodvfy", "dsrdump") if shutil.which(name)}
    if not tools:
        pytest.skip("needs the Debian packages dicom3tools or dcmtk")
    for kind, result in made.items():
        file = tmp_path / f"{kind}.dcm"
        file.write_bytes(encoded(result))
        if "dciodvfy" in tools:
            told = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
            assert not [line for line in told.stderr.splitlines() if line.startswith("Error")], told.stderr
    if "dsrdump" in tools:
        done = subprocess.run(["dsrdump", str(tmp_path / "sr.dcm")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("Abnormal" in done.stdout, '"Normal"' in done.stdout) == (
            verdict is not None or bool(judged.regions),
            verdict is False,
        )


def test_a_report_says_what_was_found_and_where():
    made = read(report(JUDGED, header()))
    assert made.SOPClassUID == ComprehensiveSRStorage
    content = sr.MeasurementReport.from_sequence([made])
    (whole,) = content.get_image_measurement_groups()
    measured = {item.name.value: float(item.value) for item in whole.get_measurements()}
    assert measured == pytest.approx({ANOMALY_SCORE.value: JUDGED.anomaly_score, P_VALUE.value: JUDGED.p_value})
    (verdict,) = whole.get_qualitative_evaluations()
    assert (verdict.name.value, verdict.value.value) == (VERDICT.value, codes.SCT.Abnormal.value)
    (region,) = content.get_planar_roi_measurement_groups()
    assert region.finding_type == codes.DCM.AbnormalRegion
    assert outlines(made) == [[10.5, 20, 110.5, 20, 110.5, 110, 10.5, 110, 10.5, 20]]
    (study,) = made.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    (image,) = series.ReferencedSOPSequence
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (JUDGED.study_uid, JUDGED.series_uid)
    assert (image.ReferencedSOPInstanceUID, image.ReferencedSOPClassUID) == (JUDGED.sop_instance_uid, DX)
    assert (made.VerificationFlag, made.PreliminaryFlag, made.CompletionFlag) == (
        "UNVERIFIED",
        "PRELIMINARY",
        "COMPLETE",
    )
    text = encoded(made).decode("utf-8", errors="replace")
    for stamp in (JUDGED.model_digest, JUDGED.calibration_id, JUDGED.preprocess_id, "version 7", DISCLAIMER):
        assert stamp in text


def test_an_image_without_a_verdict_gets_none():
    (whole,) = sr.MeasurementReport.from_sequence(
        [read(report(replace(JUDGED, is_abnormal=None, regions=[]), header()))]
    ).get_image_measurement_groups()
    assert whole.get_qualitative_evaluations() == []
    assert len(whole.get_measurements()) == 2


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ({"image_x_px": -20.0}, [[0, 20, 80, 20, 80, 110, 0, 110, 0, 20]]),
        ({"image_y_px": 2000.0}, [[10.5, 2000, 110.5, 2000, 110.5, 2048, 10.5, 2048, 10.5, 2000]]),
        ({"image_x_px": 1800.0}, []),  # padding beside the image alone
        ({"image_x_px": None}, []),  # pixels made with other settings
    ],
)
def test_regions_stay_within_the_image(box, expected):
    made = report(replace(JUDGED, regions=[{**REGION, **box}]), header())
    assert outlines(made) == expected
    assert len(groups(made)) == 1 + len(expected)


def test_a_picture_shows_the_scan_and_a_caption():
    made = read(picture(JUDGED, header(), SHOWN))
    assert made.SOPClassUID == SecondaryCaptureImageStorage
    height, width, _ = SHOWN.shape
    assert (made.pixel_array[:height, :width] == SHOWN).all()
    assert not made.pixel_array[:height, width:].any()  # the caption is wider than so small a picture
    caption = made.pixel_array[height:].max(-1)
    assert caption.shape[0] > 40
    assert caption.max() == 255
    assert not caption[:, -3:].any()  # nothing is cut off
    (source,) = made.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == JUDGED.sop_instance_uid
    assert "LossyImageCompression" not in made
    assert picture(replace(JUDGED, lossy=True), header(), SHOWN).LossyImageCompression == "01"


def test_frames_are_named_and_told_apart():
    one, two = (replace(JUDGED, frame=number) for number in (1, 2))
    assert one.uid("sr") != two.uid("sr")
    assert one.series("sr") == two.series("sr")
    (source,) = picture(two, header(), SHOWN).SourceImageSequence
    assert source.ReferencedFrameNumber == 2


def test_what_is_made_twice_is_the_same_object_and_what_differs_is_another():
    assert encoded(report(JUDGED, header())) == encoded(report(JUDGED, header()))
    assert encoded(picture(JUDGED, header(), SHOWN)) == encoded(picture(JUDGED, header(), SHOWN))
    others = [
        replace(JUDGED, sop_instance_uid="1.2.840.1.4"),
        replace(JUDGED, calibration_id="other"),
        replace(JUDGED, model_digest="e" * 64),
    ]
    uids = {each.uid(kind) for each in (JUDGED, *others) for kind in ("sr", "sc")}
    uids |= {each.series(kind) for each in (JUDGED, *others[1:]) for kind in ("sr", "sc")}
    assert len(uids) == 14
    assert all(len(uid) <= 64 and uid.startswith("2.25.") for uid in uids)
    assert others[0].series("sr") == JUDGED.series("sr")
    assert 1 <= JUDGED.number <= 9999
    assert JUDGED.number != others[0].number


def test_the_archives_words_are_repeated_whatever_they_are(caplog):
    """Values that a library complains of, quoting them, are passed on in silence."""
    odd = {"PatientName": "A=B=C=D^E^F^G^H^I^J", "PatientBirthDate": "24.12.1961", "PatientSex": "unbekannt"}
    odd |= {"StudyTime": "half past nine", "StudyID": "S" * 40, "AccessionNumber": "A" * 70}
    with warnings.catch_warnings(record=True) as said, disable_value_validation():
        warnings.simplefilter("always")
        for made in (report(JUDGED, header(**odd)), picture(JUDGED, header(**odd), SHOWN)):
            again = read(made)
            assert {keyword: str(again.get(keyword)) for keyword in odd} == odd
    assert not said
    assert not caplog.records
    assert "4711" not in repr(JUDGED) and JUDGED.sop_instance_uid not in repr(JUDGED)


def test_names_survive_in_unicode():
    for name in ("Müßig^Zoë", "Yamada^Tarou=山田^太郎", "Иванов^Пётр"):
        again = read(report(JUDGED, header(PatientName=name)))
        assert (again.SpecificCharacterSet, str(again.PatientName)) == ("ISO_IR 192", name)
