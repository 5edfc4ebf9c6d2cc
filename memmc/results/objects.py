"""DICOM objects that carry a result: a report for readers of data, and a picture for any viewer.

* **sr**: Comprehensive SR by TID 1500 (PS3.16): score, p-value and verdict of the image by TID 1501, each region by
  TID 1410 with its outline in pixels of the original image. Unverified, preliminary.
* **sc**: Secondary Capture (PS3.3 A.8.1) of the image with its heat map, as the model saw it.

Both stand in the study of the image, in series of their own. Their UIDs follow from the image, the model and the
calibration, and so does what they say, so that an object made twice is one object.

Objects are made without a patient and given the archive's `HEADER` at the end, so that no library that makes them can
speak of a value it does not like.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import highdicom as hd
import numpy as np
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from memmc import __version__
from memmc.results.archive import HEADER

Kind = Literal["sr", "sc"]

MANUFACTURER: Final = "memmc"
SCHEME: Final = "99MEMMC"
DISCLAIMER: Final = "Research, not for diagnosis"
ANOMALY_SCORE: Final = Code("anomaly-score", SCHEME, "Anomaly score")
P_VALUE: Final = Code("p-value", SCHEME, "p-value among normal scans")
REGION_PEAK: Final = Code("region-peak", SCHEME, "Highest value of the anomaly map in the region")
VERDICT: Final = Code("verdict", SCHEME, "Verdict at the chosen false-positive rate")
_FORM = "1"  # of what is made here; another gives other UIDs
_SERIES: Final[Mapping[Kind, tuple[int, str]]] = {"sr": (9101, "anomaly report"), "sc": (9102, "anomaly heat map")}
_NO_UNIT = Code("1", "UCUM", "no units")
_LINE_PX = 15


@dataclass(frozen=True)
class Judged:
    """What a model said of one image, in the archive's terms: holds original UIDs, so patient data.

    Attributes:
        sop_instance_uid, sop_class_uid, series_uid, study_uid: of the original image.
        frame: of a multi-frame object, from 1.
        rows, columns: size of the original image, px.
        lossy: whether it was ever compressed with loss.
        anomaly_score: higher is more abnormal.
        p_value: among held-out normals.
        is_abnormal: at `rate`; None where there were too few normals to say.
        rate: the chosen false-positive rate.
        regions: as in `scores.regions`.
        model: name/version.
        model_digest, calibration_id, preprocess_id, dataset_version: what it can be reproduced from.
        scored_at: when, in the hospital's own zone, as all times of an archive are.
    """

    sop_instance_uid: str = field(repr=False)
    sop_class_uid: str
    series_uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    frame: int | None
    rows: int
    columns: int
    lossy: bool
    anomaly_score: float
    p_value: float
    is_abnormal: bool | None
    rate: float
    regions: Sequence[Mapping[str, Any]]
    model: str
    model_digest: str
    calibration_id: str
    preprocess_id: str
    dataset_version: int
    scored_at: datetime

    @property
    def frames(self) -> list[int] | None:
        """The frame as highdicom takes it."""
        return None if self.frame is None else [self.frame]

    @property
    def number(self) -> int:
        """Instance Number of its results, 1 to 9999: the same whatever is pushed beside it."""
        return 1 + int(self._made("number", self.sop_instance_uid, str(self.frame)).removeprefix("2.25.")) % 9999

    def uid(self, kind: Kind) -> str:
        """Return the SOP Instance UID of a result."""
        return self._made(kind, "instance", self.sop_instance_uid, str(self.frame))

    def series(self, kind: Kind) -> str:
        """Return the Series Instance UID of the results of one kind, model and calibration in the study."""
        return self._made(kind, "series", self.study_uid)

    def tracking(self, what: str) -> str:
        """Return the UID by which the image, or a region, is tracked from report to report."""
        return self._made("tracking", self.sop_instance_uid, str(self.frame), what)

    def _made(self, *parts: str) -> str:
        return _uid(_FORM, self.model_digest, self.calibration_id, *parts)


def report(judged: Judged, header: Dataset) -> Dataset:
    """Return the report of one image.

    Args:
        judged: what was said of it.
        header: `HEADER` as the archive has it.
    """
    name, _, version = judged.model.rpartition("/")
    algorithm = sr.AlgorithmIdentification(
        name=name or judged.model,
        version=version or "0",
        manufacturer=MANUFACTURER,
        parameters=[
            f"model digest {judged.model_digest}",
            f"calibration {judged.calibration_id}, false-positive rate {judged.rate:g}",
            f"preprocessing {judged.preprocess_id}, dataset version {judged.dataset_version}",
            DISCLAIMER,
        ],
    )
    whole = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(judged.tracking("image"), "whole image"),
        algorithm_id=algorithm,
        measurements=[_measured(ANOMALY_SCORE, judged.anomaly_score), _measured(P_VALUE, judged.p_value)],
        qualitative_evaluations=_verdict(judged.is_abnormal),
        source_images=[sr.SourceImageForMeasurementGroup(judged.sop_class_uid, judged.sop_instance_uid, judged.frames)],
    )
    groups = [whole, *_regions(judged, algorithm)]
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=_uid("device", judged.model_digest),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=judged.model,
    )
    observer = sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    made = sr.ComprehensiveSR(
        evidence=[_evidence(judged)],
        content=content[0],
        is_complete=True,
        coding_schemes=[CodingSchemeIdentificationItem(SCHEME, name="memmc", responsible_organization=MANUFACTURER)],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **_common(judged, "sr"),
    )
    return _finished(made, judged, header)


def picture(judged: Judged, header: Dataset, shown_HW3: NDArray[np.uint8]) -> Dataset:
    """Return the picture of one image.

    Args:
        judged: what was said of it.
        header: `HEADER` as the archive has it.
        shown_HW3: the image with heat map and frames, RGB; a caption is added below it.
    """
    made = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=_evidence(judged),
        pixel_array=_captioned(shown_HW3, judged),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **_common(judged, "sc"),
    )
    for keyword in ("PatientOrientation", "Laterality"):
        setattr(made, keyword, None)  # type 2C: the original's, which are not known here
    made.ConversionType = "WSD"
    made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = made.ContentDate, made.ContentTime
    made.DerivationDescription = f"Anomaly heat map of {judged.model} on the image as the model saw it. {DISCLAIMER}"
    if judged.lossy:
        made.LossyImageCompression = "01"
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = judged.sop_class_uid, judged.sop_instance_uid
    if judged.frame is not None:
        source.ReferencedFrameNumber = judged.frame
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    source.PurposeOfReferenceCodeSequence = [hd.sr.CodedConcept(*purpose[:3])]
    made.SourceImageSequence = [source]
    return _finished(made, judged, header)


def _regions(judged: Judged, algorithm: sr.AlgorithmIdentification) -> list[Any]:
    """Return a group for each region whose place in the original image is known."""
    source = sr.SourceImageForRegion(judged.sop_class_uid, judged.sop_instance_uid, judged.frames)
    groups: list[Any] = []
    for index, region in enumerate(judged.regions, start=1):
        outline = _outline(region, judged.rows, judged.columns)
        if outline is None:
            continue
        measured = [_measured(REGION_PEAK, region["peak"])]
        if region["p_value"] is not None:
            measured.append(_measured(P_VALUE, region["p_value"]))
        groups.append(
            sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(judged.tracking(f"region {index}"), f"region {index}"),
                referenced_region=sr.ImageRegion("POLYLINE", outline, source),
                finding_type=codes.DCM.AbnormalRegion,
                algorithm_id=algorithm,
                measurements=measured,
            )
        )
    return groups


def _outline(region: Mapping[str, Any], rows: int, columns: int) -> NDArray[np.float64] | None:
    """Return the closed outline (5, 2) of a region, column and row, px; None where it has no place in the image."""
    if region["image_x_px"] is None:
        return None
    left, right = np.clip([region["image_x_px"], region["image_x_px"] + region["image_width_px"]], 0, columns)
    top, bottom = np.clip([region["image_y_px"], region["image_y_px"] + region["image_height_px"]], 0, rows)
    if left >= right or top >= bottom:
        return None
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom], [left, top]])


def _measured(name: Code, value: float) -> sr.Measurement:
    # A decimal string holds 16 characters (PS3.5 6.2): as many digits as fit, the same on any machine.
    return sr.Measurement(name=name, value=float(f"{value:.9g}"), unit=_NO_UNIT)


def _verdict(is_abnormal: bool | None) -> list[sr.QualitativeEvaluation] | None:
    if is_abnormal is None:
        return None
    return [sr.QualitativeEvaluation(VERDICT, codes.SCT.Abnormal if is_abnormal else codes.SCT.Normal)]


def _evidence(judged: Judged) -> Dataset:
    """Return what highdicom wants to know of the original image, with nobody's name in it."""
    image = Dataset()
    for keyword in HEADER:
        setattr(image, keyword, "")
    image.SOPClassUID, image.SOPInstanceUID = judged.sop_class_uid, judged.sop_instance_uid
    image.StudyInstanceUID, image.SeriesInstanceUID = judged.study_uid, judged.series_uid
    image.Rows, image.Columns = judged.rows, judged.columns
    if judged.frame is not None:
        image.NumberOfFrames = judged.frame
    return image


def _common(judged: Judged, kind: Kind) -> dict[str, Any]:
    series_number, what = _SERIES[kind]
    date, time = judged.scored_at.strftime("%Y%m%d"), judged.scored_at.strftime("%H%M%S")
    return {
        "series_instance_uid": judged.series(kind),
        "series_number": series_number,
        "series_description": f"memmc {what}: {DISCLAIMER.lower()}",
        "sop_instance_uid": judged.uid(kind),
        "instance_number": judged.number,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": judged.model[:64],
        "software_versions": __version__,
        "content_date": date,
        "content_time": time,
        "specific_character_set": "ISO_IR 192",
    }


def _finished(made: Dataset, judged: Judged, header: Dataset) -> Dataset:
    """Give an object the archive's patient and study, and the time of its score for every time in it."""
    made.InstanceCreationDate, made.InstanceCreationTime = made.ContentDate, made.ContentTime
    equipment = hd.ContributingEquipment(
        MANUFACTURER,
        codes.DCM.ProcessingEquipment,
        manufacturer_model_name=judged.model[:64],
        software_versions=__version__,
        contribution_description=DISCLAIMER,
    )
    made.ContributingEquipmentSequence = [equipment]
    for keyword in HEADER:
        value = header.get(keyword) or ""
        if value or keyword not in {"IssuerOfPatientID", "StudyDescription"}:  # these may be absent, not empty
            setattr(made, keyword, value)
    made.StudyInstanceUID = judged.study_uid
    return made


def _captioned(shown_HW3: NDArray[np.uint8], judged: Judged) -> NDArray[np.uint8]:
    """Return the picture with lines below it that say what it is; nothing of the patient."""
    from PIL import Image, ImageDraw, ImageFont

    verdict = {True: "abnormal", False: "not abnormal", None: "no verdict"}[judged.is_abnormal]
    lines = [judged.model, f"{verdict} at {100 * judged.rate:g} %, p {judged.p_value:.3g}", DISCLAIMER]
    height, width, _ = shown_HW3.shape
    font = ImageFont.load_default(size=_LINE_PX - 4)
    widest = max(width, *(math.ceil(font.getlength(line)) + 8 for line in lines))
    page = Image.new("RGB", (widest, height + _LINE_PX * len(lines) + 4))
    page.paste(Image.fromarray(shown_HW3, mode="RGB"), (0, 0))
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(lines):
        draw.text((4, height + 2 + index * _LINE_PX), line, fill=(255, 255, 255), font=font)
    return np.asarray(page)


def _uid(*parts: str) -> str:
    """Return a UID (PS3.5 B.2) that follows from the parts."""
    digest = hashlib.sha256("\n".join(("memmc result", *parts)).encode()).digest()
    # A version-4 UUID's bits, as B.2 wants a UUID: 122 of them are the digest's.
    value = int.from_bytes(digest[:16])
    value = value & ~(0xF << 76) | 0x4 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return f"2.25.{value}"
