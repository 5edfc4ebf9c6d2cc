"""Structure and limits: what the bytes themselves can show is refused before anything is parsed or decoded."""

from __future__ import annotations

import gzip
import io
import logging
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
from dicom_instances import CR, dataset, encoded, policy
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from memmc.dicom.convert import convert
from memmc.dicom.read import read_instance
from memmc.dicom.reasons import EXCLUDED, REASONS, Rejected, outcome_of

GOOD = encoded(dataset())
DATA_SET = 144 + struct.unpack_from("<I", GOOD, 140)[0]


def reason_of(data: bytes) -> str | None:
    return convert(data, policy()).reason


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    length = len(value) if length is None else length
    if vr in (b"SQ", b"OB", b"OW", b"UN", b"UT"):
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr, 0, length) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, length) + value


def nested(depth: int, declared: bool) -> bytes:
    """A sequence `depth` deep, of declared or undefined lengths."""
    value = b""
    for _ in range(depth):
        if declared:
            item = struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value
            value = element(0x0040A730, b"SQ", item)
        else:
            item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + value + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
            value = element(0x0040A730, b"SQ", item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0), 0xFFFFFFFF)
    return value


def with_header(extra: bytes) -> bytes:
    """The good object with elements put in before its pixels."""
    at = GOOD.index(struct.pack("<HH", 0x7FE0, 0x0010))
    return GOOD[:at] + extra + GOOD[at:]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../a.dcm", GOOD)
    return buffer.getvalue()


FILES: dict[str, tuple[bytes, str | None]] = {
    "good": (GOOD, None),
    "no preamble": (GOOD[132:], None),
    "no preamble but magic": (GOOD[128:], None),
    "no file meta": (GOOD[DATA_SET:], None),
    "tiff preamble": (b"II*\0" + GOOD[4:], None),
    "windows program": (b"MZ" + GOOD[2:], "FILE_PREAMBLE_EXEC"),
    "linux program": (b"\x7fELF" + GOOD[4:], "FILE_PREAMBLE_EXEC"),
    "script": (b"#!/bin/sh\n" + GOOD[10:], "FILE_PREAMBLE_EXEC"),
    "empty": (b"", "FILE_EMPTY"),
    "one byte": (b"\0", "FILE_NOT_DICOM"),
    "text": (b"hello, not DICOM\n" * 30, "FILE_NOT_DICOM"),
    "web page": (b"<!DOCTYPE html><html></html>" * 20, "FILE_NOT_DICOM"),
    "gzip": (gzip.compress(GOOD), "FILE_ARCHIVE_NESTED"),
    "zip": (zipped(), "FILE_ARCHIVE_NESTED"),
    "random": (np.random.default_rng(0).bytes(4096), "FILE_NOT_DICOM"),
    "magic alone": (GOOD[:132], "PARSE_TRUNCATED"),
    "cut in the file meta": (GOOD[:200], "PARSE_TRUNCATED"),
    "cut in the header": (GOOD[: DATA_SET + 101], "PARSE_TRUNCATED"),
    "cut in the pixels": (GOOD[:-500], "PARSE_TRUNCATED"),
    "unknown transfer syntax": (GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"), "PARSE_TS_UNKNOWN"),
    "compressed in name only": (
        GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"),
        "PARSE_TS_MISMATCH",
    ),
    "implicit in name only": (
        GOOD.replace(b"\x14\x001.2.840.10008.1.2.1\0", b"\x14\x001.2.840.10008.1.2\0\0\0"),
        "PARSE_TS_MISMATCH",
    ),
    "a little after the pixels": (GOOD + b"\0" * 1000, None),
    "much after the pixels": (GOOD + b"\0" * (2 << 20), "PARSE_TRAILING"),
    "bad value representation": (with_header(element(0x00321060, b"??", b"ab")), "PARSE_BAD_VR"),
    "length 4 GiB": (with_header(element(0x00321060, b"UT", b"ab", 0xFFFFFFF0)), "PARSE_LENGTH"),
    "length undefined": (with_header(element(0x00321060, b"UT", b"ab", 0xFFFFFFFF)), "PARSE_LENGTH"),
    "depth 64": (with_header(nested(64, True)), None),
    "depth 64, undefined": (with_header(nested(64, False)), None),
    "depth 65": (with_header(nested(65, True)), "PARSE_DEPTH"),
    "depth 65, undefined": (with_header(nested(65, False)), "PARSE_DEPTH"),
    "depth 2000": (with_header(nested(2000, False)), "PARSE_DEPTH"),
    "50,001 elements": (with_header(element(0x00321060, b"LO", b"") * 50_001), "PARSE_ELEMENTS"),
    "33 MiB header": (with_header(element(0x00321060, b"UT", bytes(33 << 20))), "PARSE_HEADER_SIZE"),
}


@pytest.mark.parametrize("case", FILES)
def test_structure(case: str) -> None:
    data, reason = FILES[case]
    assert reason_of(data) == reason


def test_item_beyond_its_sequence() -> None:
    inner = struct.pack("<HHI", 0xFFFE, 0xE000, 100) + element(0x00080100, b"SH", b"ab")
    assert reason_of(with_header(element(0x0040A730, b"SQ", inner))) == "PARSE_LENGTH"


def test_dicomdir_is_not_followed() -> None:
    media = b"1.2.840.10008.1.3.10".ljust(len(CR) + 1, b"\0")
    result = convert(GOOD.replace(CR.encode() + b"\0", media, 1), policy())
    assert (result.outcome, result.reason) == ("excluded", "FILE_DICOMDIR")


def deflated(body: bytes) -> bytes:
    ds = dataset()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    whole = encoded(ds)
    start = 144 + struct.unpack_from("<I", whole, 140)[0]
    return whole[:start] + body


def test_deflated() -> None:
    packer = zlib.compressobj(9, wbits=-15)
    stream = packer.compress(GOOD[DATA_SET:]) + packer.flush()
    assert reason_of(deflated(stream)) is None
    assert reason_of(deflated(stream + b"\0")) is None
    assert reason_of(deflated(stream[:-40])) == "PARSE_TRUNCATED"
    assert reason_of(deflated(b"\xff" * 100)) == "PARSE_INFLATE"


def test_deflate_bomb_stays_small() -> None:
    packer = zlib.compressobj(9, wbits=-15)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(96)) + packer.flush()
    tracemalloc.start()
    try:
        result = convert(deflated(bomb), policy("ingest.max_decoded_bytes=1024"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.reason == "PARSE_INFLATE_LIMIT"
    assert peak < 64 << 20


def test_no_allocation_for_a_lying_length() -> None:
    lie = with_header(element(0x00281201, b"OW", b"ab", 0x7FFFFFF0))
    tracemalloc.start()
    try:
        assert convert(lie, policy()).outcome == "quarantined"
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_fragments() -> None:
    ds = dataset()
    ds.compress(JPEG2000Lossless)
    data = encoded(ds)
    assert reason_of(data) is None
    assert reason_of(data[:-8]) is None  # no sequence delimiter, but a whole stream
    assert reason_of(data[:-12]) == "PARSE_TRUNCATED"
    at = data.rindex(b"\xfe\xff\x00\xe0")
    assert reason_of(data[: at + 4] + struct.pack("<I", 0xFFFFFFF0) + data[at + 8 :]) == "PARSE_LENGTH"


def test_implicit_sequences_with_lookup_tables_are_read() -> None:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 16], np.arange(4096, dtype="<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    ds = dataset(VOILUTSequence=Sequence([item]))
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    instance = read_instance(encoded(ds))
    assert len(instance.dataset.VOILUTSequence[0].LUTData) == 8192


def test_names_never_become_values() -> None:
    instance = read_instance(GOOD)
    assert "PatientName" not in instance.dataset
    assert "PixelData" not in instance.dataset
    assert instance.dataset.PatientID == "MRN0001"


def test_nothing_is_printed(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    ds = dataset(StudyInstanceUID="SMITH-JOHN-MRN123", SpecificCharacterSet="ISO_IR 999")
    ds.add_new("WindowCenter", "LO", "SMITH JOHN")
    ds.add_new("WindowWidth", "LO", "SMITH JOHN")
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = encoded(ds).replace(b"(\x00P\x10LO", b"(\x00P\x10DS").replace(b"(\x00Q\x10LO", b"(\x00Q\x10DS")
        caught.clear()
        caplog.clear()
        result = convert(data, policy())
    assert result.reason == "META_UID_INVALID"
    printed = "".join(capfd.readouterr()) + caplog.text + "".join(str(warning.message) for warning in caught)
    assert "SMITH" not in printed
    assert logging.getLogger("pydicom").level == logging.NOTSET or logging.getLogger("pydicom").level <= 50
    assert pydicom.config.settings.reading_validation_mode != pydicom.config.IGNORE


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 8200), st.binary(min_size=1, max_size=8))
def test_any_damage_gets_a_row(offset: int, damage: bytes) -> None:
    result = convert(GOOD[:offset] + damage + GOOD[offset + len(damage) :], policy("data.image_size=16"))
    assert result.reason is None or result.reason in REASONS
    assert (result.pixels is None) == (result.reason is not None)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_any_cut_is_refused(length: int) -> None:
    assert convert(GOOD[:length], policy()).outcome == "quarantined"


def test_every_element_length_is_checked() -> None:
    """Each length field in turn lies; nothing is allocated for it and the object is not stored beyond its bytes."""
    position = DATA_SET
    while position < len(GOOD):
        vr, short = struct.unpack_from("<2sH", GOOD, position + 4)
        long = vr in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        field = position + (8 if long else 6)
        (length,) = struct.unpack_from("<I", GOOD, field) if long else (short,)
        value = field + (4 if long else 2)
        for lie in (len(GOOD) - value + 1, (1 << 31) if long else 0xFFFF, 0xFFFFFFFE if long else 0xFFFE):
            code = "<I" if long else "<H"
            if lie >= 1 << (32 if long else 16):
                continue
            damaged = GOOD[:field] + struct.pack(code, lie) + GOOD[field + struct.calcsize(code) :]
            if lie != length:
                assert reason_of(damaged) in ("PARSE_LENGTH", "PARSE_TRUNCATED")
        position = value + length


def test_reasons_name_an_outcome() -> None:
    assert set(REASONS) >= EXCLUDED
    assert outcome_of(None) == "stored"
    assert outcome_of("SELECT_DERIVED") == "excluded"
    assert outcome_of("PIX_RANGE") == "quarantined"
    with pytest.raises(Rejected) as caught:
        read_instance(b"")
    assert caught.value.reason == "FILE_EMPTY"
