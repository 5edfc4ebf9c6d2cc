"""Pixels against highdicom's own chain of transformations, and against arithmetic written out here."""

from __future__ import annotations

import io
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_instances import DX, dataset, encoded, policy, texture
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from memmc.dicom.convert import Converted, convert
from memmc.dicom.decode import check_geometry
from memmc.dicom.pixels import grey_image
from memmc.dicom.read import read_instance, silenced

HALF_LEVEL = 0.5 / 65535 + 1e-6  # of a grey level of 16 bits

# In pydicom's wheel, single-frame: monochrome, and colour.
BUNDLED = (
    "693_J2KI CT_small J2K_pixelrep_mismatch JPEG2000 JPEGLSNearLossless_08 JPEGLSNearLossless_16 MR_small "
    "MR_small_RLE MR_small_implicit MR_small_jp2klossless MR_small_jpeg_ls_lossless image_dfl"
)
COLOUR = (
    "SC_rgb_dcmtk_+eb+cr SC_rgb_dcmtk_+eb+cy+n1 SC_rgb_dcmtk_+eb+cy+np SC_rgb_dcmtk_+eb+cy+s4 SC_rgb_gdcm_KY "
    "SC_rgb_jls_lossy_line SC_rgb_jls_lossy_sample SC_rgb_jpeg_dcmtk SC_rgb_jpeg_gdcm SC_rgb_jpeg_app14_dcmd "
    "SC_rgb_rle SC_rgb_rle_16bit SC_rgb_small_odd SC_rgb_small_odd_big_endian SC_rgb_small_odd_jpeg "
    "SC_ybr_full_422_uncompressed examples_jpeg2k examples_palette examples_rgb_color GDCMJ2K_TextGBR"
)


def grey(ds: Dataset, *overrides: str) -> np.ndarray:
    return grey_of(encoded(ds), *overrides)


def grey_of(data: bytes, *overrides: str) -> np.ndarray:
    chosen = policy(*overrides)
    with silenced():
        instance = read_instance(data)
        return grey_image(instance, check_geometry(instance, chosen.ingest), chosen.data)


def oracle(ds: Dataset) -> np.ndarray:
    """highdicom's display grey; where the object has no window, over the range of its stored values."""
    image = highdicom.Image.from_dataset(ds)
    has_voi = "VOILUTSequence" in ds or "WindowWidth" in ds
    frame = image.get_frame(1, apply_voi_transform=has_voi, apply_presentation_lut=has_voi, dtype=np.float64)
    if has_voi:
        return frame
    slope, intercept = float(ds.get("RescaleSlope") or 1), float(ds.get("RescaleIntercept") or 0)
    top = 1 << ds.BitsStored
    low, high = (-top // 2, top // 2 - 1) if ds.PixelRepresentation else (0, top - 1)
    grey = (frame - (low * slope + intercept)) / ((high - low) * slope)
    return 1 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey


def bundled(name: str) -> tuple[bytes, Dataset]:
    path = get_testdata_file(f"{name}.dcm", download=False)
    if path is None:
        pytest.skip(f"{name} is not in pydicom's wheel")
    data = Path(path).read_bytes()
    return data, pydicom.dcmread(io.BytesIO(data), force=True)


@pytest.mark.parametrize("name", BUNDLED.split())
def test_bundled_files_as_highdicom_shows_them(name: str) -> None:
    data, ds = bundled(name)
    with silenced():
        expected = oracle(decompressed(ds))
    np.testing.assert_allclose(grey_of(data), expected, atol=HALF_LEVEL)


def decompressed(ds: Dataset) -> Dataset:
    """The stored values in explicit little endian, the only encoding highdicom shows all of."""
    stored = ds.pixel_array
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW" if stored.itemsize == 2 else "OB"
    for keyword in ("PatientID", "StudyID", "PatientName", "AccessionNumber"):
        setattr(ds, keyword, ds.get(keyword) or "")
    return pydicom.dcmread(io.BytesIO(encoded(ds)))


def test_one_image_in_two_encodings() -> None:
    np.testing.assert_array_equal(grey_of(bundled("MR_small_bigendian")[0]), grey_of(bundled("MR_small")[0]))
    # 12-bit JPEG Extended, which no pydicom plugin decodes, against JPEG 2000 of the same acquisition
    extended, wavelet = (grey_of(bundled(name)[0]) for name in ("JPEG-lossy", "JPEG2000"))
    assert np.corrcoef(extended.ravel(), wavelet.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("name", COLOUR.split())
def test_bundled_colour_files_as_pydicom_shows_them(name: str) -> None:
    data, ds = bundled(name)
    with silenced():
        shown = ds.pixel_array
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            shown = apply_color_lut(shown, ds)
    expected = shown @ np.array([0.299, 0.587, 0.114]) / np.iinfo(shown.dtype).max
    # Where the object is YBR, pydicom went to 8-bit RGB and back: one step of rounding and gamut clipping.
    atol = 1e-5 if "YBR_FULL" not in ds.PhotometricInterpretation else 0.04
    np.testing.assert_allclose(grey_of(data), expected, atol=atol)


def voi_lut(bits: int = 16, first: int = 100) -> Sequence:
    item = Dataset()
    entries = (np.linspace(0, 1, 2000) ** 2 * ((1 << bits) - 1)).astype("<u2")
    item.LUTDescriptor = [2000, first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = entries.tobytes()
    item["LUTData"].VR = "OW"
    return Sequence([item])


def modality_lut() -> Sequence:
    items = voi_lut(16, 50)
    items[0].ModalityLUTType = "US"
    return items


SYNTHETIC: dict[str, dict[str, object]] = {
    "window": {"WindowCenter": "1500", "WindowWidth": "900"},
    "first of two windows": {"WindowCenter": ["1500", "300"], "WindowWidth": ["900", "10"]},
    "window of width 1": {"WindowCenter": "1500", "WindowWidth": "1"},
    "linear exact": {"WindowCenter": "1500", "WindowWidth": "900.5", "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": "1500", "WindowWidth": "900", "VOILUTFunction": "SIGMOID"},
    "rescale and window": {
        "RescaleSlope": "1",
        "RescaleIntercept": "-1024",
        "WindowCenter": "400",
        "WindowWidth": "1500",
    },
    "rescale alone": {"RescaleSlope": "0.5", "RescaleIntercept": "-10"},
    "monochrome1": {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": "1500", "WindowWidth": "900"},
    "monochrome1 without a window": {"PhotometricInterpretation": "MONOCHROME1"},
    "monochrome1 and inverse shape invert once": {
        "PhotometricInterpretation": "MONOCHROME1",
        "PresentationLUTShape": "INVERSE",
        "SOPClassUID": DX,
        "WindowCenter": "1500",
        "WindowWidth": "900",
    },
    "voi lut": {"VOILUTSequence": voi_lut()},
    "voi lut before window": {"VOILUTSequence": voi_lut(), "WindowCenter": "1500", "WindowWidth": "900"},
    "modality lut": {"ModalityLUTSequence": modality_lut(), "WindowCenter": "20000", "WindowWidth": "30000"},
}


@pytest.mark.parametrize("case", SYNTHETIC)
@pytest.mark.parametrize("syntax", ["explicit", "implicit"])
def test_grey_chain_as_highdicom(case: str, syntax: str) -> None:
    ds = dataset(**SYNTHETIC[case])
    expected = oracle(ds)
    if syntax == "implicit":
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    np.testing.assert_allclose(grey(ds), expected, atol=HALF_LEVEL)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("slope", ["2.5", "0.25"])
def test_slope_and_window_as_pydicom(slope: str, function: str) -> None:
    """highdicom 0.28 folds the slope into the window and so scales the half values of C.11.2.1.2.1 with it."""
    ds = dataset(RescaleSlope=slope, RescaleIntercept="1024", WindowCenter="900", WindowWidth="400")
    ds.VOILUTFunction, ds.RescaleType = function, "US"
    windowed = apply_windowing(apply_modality_lut(ds.pixel_array, ds), ds)
    reach = sorted(float(slope) * end + 1024 for end in (0, 4095))
    np.testing.assert_allclose(grey(ds), (windowed - reach[0]) / (reach[1] - reach[0]), atol=2e-4)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_every_depth_and_sign(bits: int, signed: bool) -> None:
    stored = texture(top=(1 << bits) - 1)
    low = -(1 << bits - 1) if signed else 0
    ds = dataset(stored + low, bits=bits, signed=signed)
    np.testing.assert_allclose(grey(ds), stored / ((1 << bits) - 1), atol=HALF_LEVEL)


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_syntaxes_give_the_same_grey(syntax: pydicom.uid.UID, signed: bool) -> None:
    stored = texture(48, 80) - (2048 if signed else 0)
    ds = dataset(stored, signed=signed, WindowCenter="700", WindowWidth="2000")
    expected = grey(ds)
    if syntax.is_compressed and not syntax.is_deflated:
        ds.compress(syntax)
    elif syntax == ExplicitVRBigEndian:
        ds.PixelData = stored.astype(">i2" if signed else ">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    np.testing.assert_array_equal(grey(ds), expected)


def test_padding_is_black_even_when_inverted() -> None:
    stored = texture()
    stored[:8], stored[8:12] = 0, 5
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        ds = dataset(stored, PhotometricInterpretation=photometric, PixelPaddingValue=0, PixelPaddingRangeLimit=5)
        ds["PixelPaddingValue"].VR = ds["PixelPaddingRangeLimit"].VR = "US"
        shown = grey(ds)
        assert not shown[:12].any()
        assert shown[12:].any(axis=1).all()


def test_overlay_and_sign_bits_above_bits_stored_do_not_count() -> None:
    stored = texture()
    ds = dataset(stored)
    expected = grey(ds)
    ds.PixelData = (stored | 0xA000).astype("<u2").tobytes()
    np.testing.assert_array_equal(grey(ds), expected)


def stored_image(result: Converted, side: int, kind: str = "<u2") -> np.ndarray:
    assert result.pixels is not None, result.reason
    return np.frombuffer(result.pixels, kind).reshape(side, side).astype(np.float64)


def test_output_range_is_the_windows_not_the_images() -> None:
    dark = encoded(dataset(texture() // 4))
    full = stored_image(convert(dark, policy("data.image_size=64")), 64)
    np.testing.assert_allclose(full, np.rint(texture() // 4 / 4095 * 65535), atol=1)
    eight = convert(dark, policy("data.image_size=64", "data.bits=8"))
    np.testing.assert_allclose(stored_image(eight, 64, "u1"), np.rint(texture() // 4 / 4095 * 255), atol=1)
    windowed = encoded(dataset(WindowCenter="100", WindowWidth="100"))
    ignored = convert(windowed, policy("data.image_size=64", "data.window=full"))
    np.testing.assert_allclose(stored_image(ignored, 64), np.rint(texture() / 4095 * 65535), atol=1)


def test_fit() -> None:
    wide = np.zeros((64, 128), dtype=np.int64)
    wide[:, 32:96] = 4095
    images = {
        fit: stored_image(convert(encoded(dataset(wide)), policy("data.image_size=32", f"data.fit={fit}")), 32)
        for fit in ("stretch", "pad")
    }
    middle = np.abs(np.arange(32) - 15.5)
    np.testing.assert_array_equal(images["stretch"][16] > 32768, middle < 8)
    np.testing.assert_array_equal(images["pad"][:, 16] > 32768, middle < 8)
    np.testing.assert_array_equal(images["pad"][16] > 32768, middle < 8)
    wide[:4] = 0
    crop = stored_image(convert(encoded(dataset(wide)), policy("data.image_size=32", "data.fit=crop")), 32)
    assert (crop[3:, 1:-1] == 65535).all()
    assert not crop[:1].any()


OBLONG = {
    "PixelAspectRatio": (["1", "2"], ["3", "3"], [], "5", ["0", "1"]),
    "PixelSpacing": (["0.1", "0.2"], ["0.1", "0.1002"], ["0.1"]),
    "ImagerPixelSpacing": (["0.2", "0.1"], ["0.1", "0.1"]),
}


@pytest.mark.parametrize("keyword", OBLONG)
def test_proportions_are_not_kept_of_pixels_that_are_not_square(keyword: str) -> None:
    """PS3.3 C.7.6.3.1.7: vertical over horizontal."""
    oblong, *square = OBLONG[keyword]
    for fit, reason in (("pad", "META_DIMENSIONS"), ("crop", "META_DIMENSIONS"), ("stretch", None)):
        assert convert(encoded(dataset(**{keyword: oblong})), policy(f"data.fit={fit}")).reason == reason
    for value in square:
        assert convert(encoded(dataset(**{keyword: value})), policy("data.fit=pad")).outcome == "stored"


def test_reduction_does_not_alias() -> None:
    stripes = np.zeros((512, 512), dtype=np.int64)
    stripes[:, ::2] = 4095
    stripes[:, 256:] //= 2
    image = stored_image(convert(encoded(dataset(stripes)), policy("data.image_size=32")), 32)
    assert np.ptp(image[:, 1:14]) <= 65535 * 0.02
    np.testing.assert_allclose(image[:, 1:14], 32768, rtol=0.02)


REJECTED: dict[str, tuple[str, dict[str, object]]] = {
    "no rows": ("META_MISSING_TYPE1", {"Rows": None}),
    "zero rows": ("META_DIMENSIONS", {"Rows": 0}),
    "two samples": ("META_DIMENSIONS", {"SamplesPerPixel": 2}),
    "13 bits allocated": ("META_BITS", {"BitsAllocated": 13}),
    "32 bits allocated": ("META_BITS", {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}),
    "more stored than allocated": ("META_BITS", {"BitsStored": 17, "HighBit": 16}),
    "high bit elsewhere": ("META_BITS", {"HighBit": 15}),
    "unknown photometric": ("PIX_PHOTOMETRIC_UNSUPPORTED", {"PhotometricInterpretation": "PURPLE"}),
    "colour of one sample": ("PIX_PHOTOMETRIC_UNSUPPORTED", {"PhotometricInterpretation": "RGB"}),
    "pixels short": ("PIX_LENGTH", {"PixelData": b"\0" * 8190}),
    "pixels long": ("PIX_LENGTH", {"PixelData": b"\0" * 8194}),
    "slope zero": ("PIX_LUT_INVALID", {"RescaleSlope": "0", "RescaleIntercept": "0"}),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: str) -> None:
    reason, attributes = REJECTED[case]
    result = convert(encoded(dataset(**attributes)), policy())
    assert (result.outcome, result.reason, result.pixels) == ("quarantined", reason, None)
    assert result.attributes["patient_key"] is not None


def test_a_constant_image_is_stored_for_the_gate_to_flag() -> None:
    result = convert(encoded(dataset(PixelData=b"\1\1" * 4096)), policy())
    assert (result.outcome, result.reason) == ("stored", None)
    assert np.ptp(stored_image(result, 64)) == 0


def test_size_limits_come_from_the_configuration() -> None:
    data = encoded(dataset())
    assert convert(data, policy("ingest.max_rows=63")).reason == "META_DIMENSIONS"
    assert convert(data, policy("ingest.max_decoded_bytes=8191")).reason == "PIX_LIMIT"
    assert convert(data, policy("ingest.max_file_bytes=100")).reason == "FILE_TOO_LARGE"
    assert convert(data, policy("ingest.max_decoded_bytes=8192")).outcome == "stored"


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_lying_codestream_never_reaches_a_decoder(syntax: pydicom.uid.UID, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = dataset()
    ds.compress(syntax)
    ds.Rows = 128
    if syntax == RLELossless:
        ds.Rows, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 64, 8, 8, 7
    monkeypatch.setattr("memmc.dicom.decode.get_decoder", lambda syntax: pytest.fail("decoder was called"))
    assert convert(encoded(ds), policy()).reason == "PIX_CODESTREAM_MISMATCH"


def test_values_beyond_bits_stored_are_another_image() -> None:
    ds = dataset(texture(top=65535), bits=16)
    ds.compress(JPEG2000Lossless)
    ds.BitsStored, ds.HighBit = 12, 11
    assert convert(encoded(ds), policy()).reason == "PIX_RANGE"


def test_garbage_codestream() -> None:
    ds = dataset()
    ds.compress(JPEG2000Lossless)
    data = encoded(ds)
    start = data.rindex(b"\xff\x4f\xff\x51") + 120
    damaged = data[:start] + bytes(255 - byte for byte in data[start : start + 400]) + data[start + 400 :]
    assert convert(damaged, policy()).reason == "PIX_DECODE_ERROR"
    assert convert(data.replace(b"\xff\x4f\xff\x51", b"\0\0\0\0"), policy()).reason == "PIX_DECODE_ERROR"
