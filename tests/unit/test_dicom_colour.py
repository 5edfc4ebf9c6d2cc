"""Colour as luminance: native, in palettes, and as codestreams and their markers say."""

from __future__ import annotations

import io

import numpy as np
import pytest
from dicom_instances import dataset, texture
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, JPEGBaseline8Bit
from test_dicom_pixels import HALF_LEVEL, bundled, grey, grey_of


def test_colour_becomes_luminance() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (32, 40, 3))
    expected = colour @ np.array([0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(grey(dataset(colour, bits=8)), expected, atol=HALF_LEVEL)
    ds = dataset(colour, bits=8, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(grey(ds), colour[..., 0] / 255, atol=HALF_LEVEL)
    ds = dataset(colour, bits=8, PlanarConfiguration=1)
    ds.PixelData = colour.transpose(2, 0, 1).astype("u1").tobytes()
    np.testing.assert_allclose(grey(ds), expected, atol=HALF_LEVEL)


def test_palette_becomes_luminance() -> None:
    stored = texture(top=255)
    ds = dataset(stored, bits=8, PhotometricInterpretation="PALETTE COLOR")
    tables = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype("<u2")
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
        ds[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        ds[f"{name}PaletteColorLookupTableData"].VR = "OW"
    expected = (tables.T[stored] @ np.array([0.299, 0.587, 0.114])) / 65535
    np.testing.assert_allclose(grey(ds), expected, atol=1e-5)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_in_words(bits: int, big_endian: bool) -> None:
    """Entries of 8 or 16 bits, in words of 16, in either byte order."""
    stored = texture(top=255)
    ds = dataset(stored, bits=8, PhotometricInterpretation="PALETTE COLOR")
    tables = np.random.default_rng(1).integers(0, 1 << bits, (3, 256))
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, bits])
        setattr(ds, f"{name}PaletteColorLookupTableData", table.astype(">u2" if big_endian else "<u2").tobytes())
        ds[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        ds[f"{name}PaletteColorLookupTableData"].VR = "OW"
    if big_endian:
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    expected = (tables.T[stored] @ np.array([0.299, 0.587, 0.114])) / ((1 << bits) - 1)
    np.testing.assert_allclose(grey(ds), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["SC_rgb_jpeg_gdcm", "SC_rgb_jpeg_dcmtk", "examples_jpeg2k", "SC_rgb_rle", "SC_rgb_jls_lossy_line"]
)
def test_compressed_colour_lies_as_the_codestream_says(name: str) -> None:
    data, ds = bundled(name)
    ds.PlanarConfiguration = 1
    expected = grey_of(data)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(grey(ds), expected)


def red_jpeg(adobe_transform: int | None) -> bytes:
    """A red image as YCbCr; its JFIF marker makes place for an Adobe one (JPEG's Annex K has neither)."""
    with io.BytesIO() as stream:
        Image.new("RGB", (64, 64), (255, 0, 0)).save(stream, "JPEG", quality=95, subsampling=1)
        jpeg = stream.getvalue()
    if adobe_transform is None:
        return jpeg
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([adobe_transform])
    return jpeg[:2] + adobe + jpeg[4 + int.from_bytes(jpeg[4:6]) :]


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("adobe_transform", [None, 1])
def test_a_markers_colour_transform_does_not_make_red_white(adobe_transform: int | None, photometric: str) -> None:
    ds = dataset(np.zeros((64, 64, 3), np.int64), 8, PhotometricInterpretation=photometric, PlanarConfiguration=0)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = encapsulate([red_jpeg(adobe_transform)])
    ds["PixelData"].VR = "OB"
    np.testing.assert_allclose(grey(ds), 0.299, atol=0.01)
