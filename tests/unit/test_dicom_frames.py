"""Multi-frame and enhanced objects: frames found, shown as highdicom shows them, filed one by one."""

from __future__ import annotations

import highdicom
import numpy as np
import pytest
from dicom_instances import dataset, encoded, policy, texture
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames, itemize_fragment
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from memmc.dicom.convert import convert
from memmc.dicom.decode import check_geometry, decode_frame
from memmc.dicom.deidentify import frame_uid
from memmc.dicom.pixels import grey_image
from memmc.dicom.read import read_instance, silenced
from memmc.dicom.sandbox import Sandbox

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
FRAMES = np.stack([texture(40, 48, seed=seed) // (seed + 1) for seed in range(5)])


def multiframe(frames: np.ndarray = FRAMES, bits: int = 12, **attributes: object) -> Dataset:
    ds = dataset(frames[0], bits=bits, NumberOfFrames=len(frames), **attributes)
    raw = frames.astype("<u1" if bits <= 8 else "<u2").tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    return ds


def enhanced() -> Dataset:
    """Every frame with a window of its own; slope and intercept shared."""
    ds = multiframe(SOPClassUID=ENHANCED_MR, Modality="MR")
    shared, transform = Dataset(), Dataset()
    transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = "1", "-100", "US"
    shared.PixelValueTransformationSequence = Sequence([transform])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for number in range(len(FRAMES)):
        group, window = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = str(200 + 150 * number), str(300 + 50 * number)
        group.FrameVOILUTSequence = Sequence([window])
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return ds


def decoded(data: bytes) -> np.ndarray:
    with silenced():
        instance = read_instance(data)
        geometry = check_geometry(instance, policy().ingest)
        return np.stack([decode_frame(instance, geometry, frame)[0] for frame in range(geometry.frames)])


def compressed(syntax: str) -> tuple[Dataset, list[bytes]]:
    ds, streams = multiframe(), []
    for frame in FRAMES:
        one = dataset(frame)
        one.compress(syntax)
        streams += generate_frames(one.PixelData, number_of_frames=1)
    ds.file_meta.TransferSyntaxUID = syntax
    return ds, streams


@pytest.mark.parametrize("bits", [1, 7, 8, 12, 16])
def test_native_frames(bits: int) -> None:
    frames = FRAMES.clip(0, (1 << bits) - 1) if bits > 1 else (FRAMES[:, :23, :37] > 500).astype(np.int64)
    ds = multiframe(frames, bits)
    if bits == 1:  # frames follow each other bit by bit: PS3.5 8.1.1
        ds.BitsAllocated = 1
        packed = np.packbits(frames.ravel(), bitorder="little").tobytes()
        ds.PixelData = packed + b"\0" * (len(packed) % 2)
    np.testing.assert_array_equal(decoded(encoded(ds)), frames)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("table", [True, False])
def test_compressed_frames(syntax: str, table: bool) -> None:
    ds, streams = compressed(syntax)
    ds.PixelData = encapsulate(streams, has_bot=table)
    np.testing.assert_array_equal(decoded(encoded(ds)), FRAMES)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("table", [True, False])
def test_frames_of_several_fragments(syntax: str, table: bool) -> None:
    ds, streams = compressed(syntax)
    ds.PixelData = encapsulate(streams, fragments_per_frame=3, has_bot=table)
    np.testing.assert_array_equal(decoded(encoded(ds)), FRAMES)


@pytest.mark.parametrize("count", [4, 6, 9])
def test_another_number_of_frames_than_the_header_says(count: int) -> None:
    ds, streams = compressed(JPEG2000Lossless)
    ds.PixelData = encapsulate((streams * 2)[:count], has_bot=False)
    assert convert(encoded(ds), policy("select.frames=each")).reason == "PIX_CODESTREAM_MISMATCH"


def test_a_missing_delimiter_is_tolerated_only_after_a_whole_stream() -> None:
    ds, streams = compressed(JPEG2000Lossless)
    ds.NumberOfFrames = 1
    ds.PixelData = encapsulate(streams[:1])
    data = encoded(ds)
    assert data.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    assert convert(data[:-8], policy()).outcome == "stored"
    assert convert(data[:-12], policy()).reason == "PARSE_TRUNCATED"
    cut = dataset(FRAMES[0])
    cut.file_meta.TransferSyntaxUID = JPEG2000Lossless
    cut.PixelData = b"".join(
        [itemize_fragment(b""), itemize_fragment(streams[0][:-20] + b"\0" * (len(streams[0]) % 2))]
    )
    cut["PixelData"].is_undefined_length = True
    assert convert(encoded(cut)[:-8], policy()).reason == "PARSE_TRUNCATED"


def test_enhanced_frames_as_highdicom_shows_them() -> None:
    ds = enhanced()
    image = highdicom.Image.from_dataset(ds)
    with silenced():
        instance = read_instance(encoded(ds))
        geometry = check_geometry(instance, policy().ingest)
        for frame in range(len(FRAMES)):
            expected = image.get_frame(frame + 1, apply_voi_transform=True, dtype=np.float64)
            shown = grey_image(instance, geometry, policy().data, frame)
            np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_policy_of_frames() -> None:
    data = encoded(enhanced())
    chosen = ("select.modalities=MR", "data.image_size=16")
    refused = convert(data, policy(*chosen))
    assert (refused.outcome, refused.reason) == ("excluded", "META_MULTIFRAME_UNSUPPORTED")
    each = convert(data, policy(*chosen, "select.frames=each"))
    middle = convert(data, policy(*chosen, "select.frames=middle"))
    assert each.pixels is not None
    assert (each.frames, len(each.pixels), each.attributes["frame_number"]) == (5, 5 * 16 * 16 * 2, None)
    assert (middle.frames, middle.attributes["frame_number"]) == (1, 3)
    assert middle.pixels == each.pixels[2 * 512 : 3 * 512]
    assert convert(encoded(dataset()), policy("select.frames=each")).frames == 1
    with Sandbox(policy(*chosen, "select.frames=each")) as box:
        assert box.convert(data) == each


def test_frames_are_bounded() -> None:
    many = multiframe(np.zeros((2000, 8, 8), dtype=np.int64))
    assert convert(encoded(many), policy("select.frames=each", "data.image_size=512")).reason == "PIX_LIMIT"
    assert (
        convert(encoded(many), policy("select.frames=middle", "ingest.max_decoded_bytes=255999")).reason == "PIX_LIMIT"
    )
    many.NumberOfFrames = 20_000
    assert convert(encoded(many), policy("select.frames=each")).reason == "META_DIMENSIONS"


def test_frames_have_uids_of_their_own() -> None:
    uids = {frame_uid("2.25.1", number) for number in range(1, 100)}
    assert len(uids) == 99
    assert all(len(uid) <= 64 and uid.startswith("2.25.") for uid in uids)
    assert frame_uid("2.25.1", 1) != frame_uid("2.25.2", 1)
