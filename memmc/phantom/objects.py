"""DICOM objects of the simulated hospital: several makers, encodings and grey scales, and headers full of identifiers.

Every identifier is invented; names are strings of syllables.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from memmc.phantom.radiograph import BITS_STORED, Radiograph

Grey = Literal["none", "window", "sigmoid", "voi_lut", "rescale", "signed"]

_TOP = (1 << BITS_STORED) - 1
_SYLLABLES = "ba-be-do-fen-gar-hul-il-jo-kem-lun-mar-nes-or-pel-qui-ros-sim-tar-ul-ven-wis-yor-zan"


@dataclass(frozen=True)
class Profile:
    """One make of X-ray machine and how it writes."""

    manufacturer: str
    model: str
    modality: Literal["CR", "DX"]
    transfer_syntax: UID
    photometric: Literal["MONOCHROME1", "MONOCHROME2"]
    grey: Grey


PROFILES: tuple[Profile, ...] = (
    Profile("Aldermoor Imaging", "Panel One", "DX", ExplicitVRLittleEndian, "MONOCHROME2", "none"),
    Profile("Aldermoor Imaging", "Panel One", "DX", JPEGLSLossless, "MONOCHROME2", "window"),
    Profile("Brightwater", "BW-400", "CR", ImplicitVRLittleEndian, "MONOCHROME1", "window"),
    Profile("Brightwater", "BW-400", "CR", RLELossless, "MONOCHROME1", "none"),
    Profile("Corvane Systems", "Lumen DR", "DX", JPEG2000Lossless, "MONOCHROME2", "sigmoid"),
    Profile("Corvane Systems", "Lumen DR", "DX", ExplicitVRLittleEndian, "MONOCHROME1", "window"),
    Profile("Dunmarrow", "Cassette 7", "CR", ExplicitVRBigEndian, "MONOCHROME2", "rescale"),
    Profile("Dunmarrow", "Cassette 7", "CR", DeflatedExplicitVRLittleEndian, "MONOCHROME2", "voi_lut"),
    Profile("Eskerlight", "E-Ray", "CR", ExplicitVRLittleEndian, "MONOCHROME2", "signed"),
)


@dataclass(frozen=True)
class Identity:
    """An invented patient's study, as the radiology system would know it."""

    seed: int
    patient: int
    study: int
    sex: str

    def rng(self, *extra: int) -> np.random.Generator:
        """Return the stream that draws the patient's attributes, or with extras the study's."""
        return np.random.default_rng([self.seed, self.patient, *extra, 5])

    def uid(self, kind: str) -> UID:
        """Return a UID derived from the seed, PS3.5 B.2."""
        digest = hashlib.sha256(f"{self.seed}/{self.patient}/{self.study}/{kind}".encode()).digest()
        return UID(f"2.25.{int.from_bytes(digest[:15], 'big')}")


def stored_pixels(radiograph: Radiograph, profile: Profile) -> npt.NDArray[np.uint16] | npt.NDArray[np.int16]:
    """Return the values the machine writes; rescaled, and inverted for MONOCHROME1, they are the image again."""
    image = radiograph.image_HW
    if profile.photometric == "MONOCHROME1":
        image = (_TOP - image).astype(np.uint16)
    return image.astype(np.int16) - np.int16(2048) if profile.grey == "signed" else image


def image_object(radiograph: Radiograph, identity: Identity, profile: Profile, view: str = "PA") -> bytes:
    """Return a radiograph as the bytes of a DICOM file (PS3.10)."""
    sop_class = DigitalXRayImageStorageForPresentation if profile.modality == "DX" else ComputedRadiographyImageStorage
    dataset = _header(identity, sop_class, profile.modality)
    dataset.Manufacturer, dataset.ManufacturerModelName = profile.manufacturer, profile.model
    dataset.ViewPosition, dataset.BodyPartExamined, dataset.Laterality = view, "CHEST", ""
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.DistanceSourceToDetector, dataset.KVP = 1800, 120
    dataset.ImagerPixelSpacing = [round(radiograph.info["pixel_mm"], 5)] * 2
    _grey_scale(dataset, profile, identity.rng(identity.study, 1))
    pixels = stored_pixels(radiograph, profile)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, profile.photometric
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, BITS_STORED, BITS_STORED - 1
    dataset.PixelRepresentation = int(profile.grey == "signed")
    if profile.transfer_syntax.is_compressed and profile.transfer_syntax != DeflatedExplicitVRLittleEndian:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        plugin = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}
        dataset.compress(
            profile.transfer_syntax,
            pixels,
            encoding_plugin=plugin[profile.transfer_syntax],
            generate_instance_uid=False,
        )
    else:
        order = ">" if profile.transfer_syntax == ExplicitVRBigEndian else "<"
        dataset.add_new("PixelData", "OW", pixels.astype(pixels.dtype.newbyteorder(order)).tobytes())
    return _file(dataset, profile.transfer_syntax)


def _grey_scale(dataset: Dataset, profile: Profile, rng: np.random.Generator) -> None:
    """Add the Modality LUT and VOI LUT modules (PS3.3 C.11.1, C.11.2)."""
    offset = {"rescale": -1024, "signed": 2048}.get(profile.grey, 0)
    if profile.modality == "DX" or offset:
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = offset, 1, "US"
    if profile.modality == "DX":
        dataset.PixelIntensityRelationship = "LOG"
        dataset.PixelIntensityRelationshipSign = -1 if profile.photometric == "MONOCHROME2" else 1
        dataset.PresentationIntentType = "FOR PRESENTATION"
        dataset.PresentationLUTShape = "INVERSE" if profile.photometric == "MONOCHROME1" else "IDENTITY"
    if profile.grey in ("window", "rescale", "signed"):
        middle = 2048 + (offset if profile.grey == "rescale" else 0)
        dataset.WindowCenter = round(middle + rng.uniform(-60, 60))
        dataset.WindowWidth = round(rng.uniform(3700, 4096))
    elif profile.grey == "sigmoid":
        dataset.WindowCenter, dataset.WindowWidth = round(2048 + rng.uniform(-60, 60)), round(rng.uniform(3000, 3400))
        dataset.VOILUTFunction = "SIGMOID"
    elif profile.grey == "voi_lut":
        values = np.rint(65535 * np.linspace(0, 1, 1 << BITS_STORED) ** rng.uniform(0.92, 1.08)).astype(int)
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [1 << BITS_STORED, 0, 16])
        item.LUTExplanation = "NORMAL"
        item.add_new("LUTData", "US", [int(value) for value in values])
        dataset.VOILUTSequence = [item]


def report_object(identity: Identity) -> bytes:
    """Return a text report without pixels (Basic Text SR, PS3.3 A.35.1)."""
    dataset = _header(identity, BasicTextSRStorage, "SR")
    dataset.ValueType, dataset.ContinuityOfContent = "CONTAINER", "SEPARATE"
    dataset.CompletionFlag, dataset.VerificationFlag = "COMPLETE", "UNVERIFIED"
    dataset.ConceptNameCodeSequence = [_code("18782-3", "LN", "Radiology Study observation")]
    text = Dataset()
    text.RelationshipType, text.ValueType = "CONTAINS", "TEXT"
    text.ConceptNameCodeSequence = [_code("121071", "DCM", "Finding")]
    text.TextValue = f"Chest of {dataset.PatientName}: no acute finding."
    dataset.ContentSequence = [text]
    return _file(dataset, ExplicitVRLittleEndian)


def garbage_object(identity: Identity) -> bytes:
    """Return a well-formed object whose JPEG stream is noise."""
    dataset = _header(identity, ComputedRadiographyImageStorage, "CR")
    dataset.ViewPosition, dataset.BodyPartExamined = "PA", "CHEST"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = 256
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.add_new("PixelData", "OB", encapsulate([b"\xff\xd8\xff\xe0" + identity.rng(9).bytes(6000)]))
    dataset["PixelData"].is_undefined_length = True
    return _file(dataset, JPEGBaseline8Bit)


def _header(identity: Identity, sop_class: UID, modality: str) -> Dataset:
    """Return the patient, study and series modules with invented identifiers in the usual and the unusual places."""
    patient, study = identity.rng(), identity.rng(identity.study)
    family, given = _name(patient), _name(patient)
    birth_year = int(patient.integers(1934, 2001))
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, identity.uid("instance")
    dataset.PatientName = f"{family}^{given}"
    dataset.PatientID = f"H{patient.integers(10**7):07d}"
    dataset.PatientBirthDate = f"{birth_year}{patient.integers(1, 13):02d}{patient.integers(1, 29):02d}"
    dataset.PatientSex = identity.sex
    dataset.PatientAddress = f"{patient.integers(1, 200)} {_name(patient)} Street"
    dataset.PatientTelephoneNumbers = f"555-{patient.integers(10**4):04d}"
    dataset.OtherPatientIDs = f"INS-{patient.integers(10**9):09d}"
    year = 2022 + identity.study
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = (
        f"{year}{study.integers(1, 13):02d}{study.integers(1, 29):02d}"
    )
    dataset.PatientAge = f"{year - birth_year:03d}Y"
    clock = f"{study.integers(7, 19):02d}{study.integers(60):02d}{study.integers(60):02d}"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = clock
    dataset.AccessionNumber = f"A{study.integers(10**9):09d}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = identity.uid("study"), identity.uid("series")
    dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber = str(identity.study + 1), 1, 1
    dataset.Modality = modality
    dataset.StudyDescription = f"Chest, {family}"
    dataset.ReferringPhysicianName = f"{_name(study)}^{_name(study)}"
    dataset.OperatorsName = f"{_name(study)}^{_name(study)}"
    dataset.InstitutionName, dataset.StationName = "Simulated General Hospital", f"ROOM{study.integers(1, 9)}"
    dataset.DeviceSerialNumber = f"SN{study.integers(10**6):06d}"
    dataset.PatientComments = f"Spoke with {given} {family}"
    request = Dataset()
    request.RequestedProcedureID = dataset.AccessionNumber
    request.ScheduledProcedureStepID = f"S{study.integers(10**6):06d}"
    dataset.RequestAttributesSequence = [request]
    block = dataset.private_block(0x0019, "MEMMC PHANTOM", create=True)
    block.add_new(0x01, "LO", f"{family}, {given}")
    return dataset


def _name(rng: np.random.Generator) -> str:
    return "".join(rng.choice(_SYLLABLES.split("-"), int(rng.integers(2, 4)))).capitalize()


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _file(dataset: Dataset, transfer_syntax: UID) -> bytes:
    """Return the bytes of a PS3.10 file; nothing in them depends on time or on the writing library's version."""
    meta: Any = dataset.file_meta
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = transfer_syntax
    meta.ImplementationClassUID = UID("2.25.208861435790253674098374569834021")
    meta.ImplementationVersionName = "MEMMC_PHANTOM"
    target = BytesIO()
    dataset.save_as(target, enforce_file_format=True)
    return target.getvalue()
