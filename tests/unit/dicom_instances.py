"""Synthetic DICOM instances for the tests of memmc.dicom."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from memmc.config import load_config
from memmc.dicom.convert import ConvertPolicy
from memmc.dicom.read import silenced

CR = "1.2.840.10008.5.1.4.1.1.1"
DX = "1.2.840.10008.5.1.4.1.1.1.1"
KEY = bytes(range(32))


def policy(*overrides: str, key: bytes = KEY) -> ConvertPolicy:
    """The default policy but for the reading of text, which costs a second to load."""
    return ConvertPolicy.from_config(load_config(overrides=["deid.text=class", *overrides]), key)


def texture(rows: int = 64, columns: int = 64, top: int = 4095, seed: int = 0) -> np.ndarray:
    """A smooth ramp with noise over 0..top."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(rows) / rows, np.arange(columns) / columns) / 2
    return np.clip(ramp * top + rng.normal(0, top / 50, (rows, columns)), 0, top).astype(np.int64)


def dataset(pixels: np.ndarray | None = None, bits: int = 12, signed: bool = False, **attributes: object) -> Dataset:
    """A chest CR; `attributes` by keyword, None deletes one."""
    pixels = texture() if pixels is None else pixels
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CR
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = CR, "1.2.3.1"
    ds.Modality, ds.PatientID, ds.PatientName = "CR", "MRN0001", "DOE^JANE"
    ds.BodyPartExamined, ds.ViewPosition, ds.Manufacturer = "CHEST", "PA", "SIEMENS"
    ds.PatientSex, ds.PatientAge, ds.StudyDate, ds.AcquisitionDate = "F", "042Y", "20200229", "20200301"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[2]
    ds.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    ds.PixelRepresentation = int(signed)
    kind = ("i" if signed else "u") + ("1" if bits <= 8 else "2")
    raw = pixels.astype("<" + kind).tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OB" if bits <= 8 else "OW"
    with silenced():
        for keyword, value in attributes.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
    return ds


def encoded(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    with silenced():
        ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def data_folder(name: str) -> Path:
    """A folder of real objects, or a skipped test."""
    root = os.environ.get("MEMMC_TEST_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"MEMMC_TEST_DATA does not name a folder with {name}")
    return Path(root) / name
