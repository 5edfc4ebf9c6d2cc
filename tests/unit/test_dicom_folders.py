"""Whole folders of real, odd and hostile objects through the sandbox; they skip without MEMMC_TEST_DATA."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

import numpy as np
import pydicom
import pytest
from dicom_instances import data_folder, policy
from PIL import Image

from memmc.dicom.convert import Converted
from memmc.dicom.reasons import REASONS
from memmc.dicom.sandbox import Sandbox

SIDE = 128
WIDE = (  # lets every decoder see what the default selection keeps from it
    "select.modalities=CR,DX,CT,MR,OT,US,NM,MG,PT,SC,XC",
    "select.secondary_capture=true",
    "select.lateral_views=true",
    "select.burned_in_annotation=accept",
    "ingest.timeout_s=20",
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(policy(f"data.image_size={SIDE}")) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def wide_sandbox() -> Iterator[Sandbox]:
    with Sandbox(policy(f"data.image_size={SIDE}", *WIDE)) as sandbox:
        yield sandbox


def rows(folder: str, table: str = "expected.csv") -> list[dict[str, str]]:
    with (data_folder(folder) / table).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def image_of(result: Converted) -> np.ndarray:
    assert result.pixels is not None
    return np.frombuffer(result.pixels, "<u2").reshape(SIDE, SIDE).astype(np.float64)


def texts_of(result: Converted) -> str:
    return "\n".join(f"{name}={value}" for name, value in result.attributes.items())


def test_hospital_images_are_their_sources(sandbox: Sandbox) -> None:
    sources = data_folder("cxr-hires")
    planted = [row["value"] for row in rows("dicom-hospital", "phi.csv")]
    # A bare date of birth may by chance be a shifted date: those are looked for where dates do not belong.
    texts = [value for value in planted if not re.fullmatch(r"[0-9]{8}", value)]
    births = [value for value in planted if re.fullmatch(r"[0-9]{8}", value)]
    stored = 0
    for row in rows("dicom-hospital"):
        result = sandbox.convert((data_folder("dicom-hospital") / row["dicom"]).read_bytes())
        everything = texts_of(result)
        assert not [value for value in texts if value in everything]
        undated = everything.replace(f"acquisition_date={result.attributes['acquisition_date']}", "")
        assert not [value for value in births if value in undated]
        if row["modality"] == "OT":
            assert result.reason == "META_MODALITY_OUT_OF_SCOPE"
        elif result.outcome == "stored":
            stored += 1
            source = Image.open(sources / row["source"]).convert("L").convert("F")
            expected = np.asarray(source.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            correlation = np.corrcoef(expected.ravel(), image_of(result).ravel())[0, 1]
            assert correlation >= 0.98, row["profile"]
        else:
            assert (result.reason, row["burned_in"]) == ("DEID_BURNED_IN_FLAG", "1")
    assert stored >= 38


def test_odd_objects_get_the_right_outcome(sandbox: Sandbox) -> None:
    allowed = {
        "image": {"stored"},
        "tolerate": {"stored", "excluded", "quarantined"},
        "reject": {"quarantined"},
        "nonimage": {"excluded"},
    }
    exact = {
        "malformed/truncated_30.dcm": "PARSE_TRUNCATED",
        "malformed/preamble_mz.dcm": "FILE_PREAMBLE_EXEC",
        "malformed/html.dcm": "FILE_NOT_DICOM",
        "malformed/gzipped.dcm": "FILE_ARCHIVE_NESTED",
        "malformed/rows_huge.dcm": "META_DIMENSIONS",
        "malformed/nested_120.dcm": "PARSE_DEPTH",
        "malformed/ts_unknown.dcm": "PARSE_TS_UNKNOWN",
        "malformed/pixel_short2.dcm": "PIX_LENGTH",
        "malformed/slope_zero.dcm": "PIX_LUT_INVALID",
        "malformed/no_meta.dcm": None,
        "malformed/no_preamble.dcm": None,
        "malformed/preamble_tiff.dcm": None,
        "nonimage/pdf.dcm": "META_SOP_CLASS_UNSUPPORTED",
    }
    for row in rows("dicom-odd"):
        result = sandbox.convert((data_folder("dicom-odd") / row["file"]).read_bytes())
        assert result.outcome in allowed[row["class"]], (row["file"], result.reason)
        if row["file"] in exact:
            assert result.reason == exact[row["file"]]


def test_canary_header_passes_nothing(wide_sandbox: Sandbox) -> None:
    header = pydicom.dcmread(data_folder("dicom-poison") / "canary.dcm")
    header.PixelData = np.random.default_rng(0).integers(0, 255, len(header.PixelData), dtype=np.uint8).tobytes()
    header.ManufacturerModelName = "PHIQ9001ZK"
    header.BodyPartExamined = header.ViewPosition = header.PatientSex = header.ImageLaterality = "PHIQ9002ZK"
    identifiers = [
        str(element.value)
        for element in header.iterall()
        if element.VR in ("AE", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
        and re.search(r"PHI|1\.2\.999\.777|\.[0-9]*0000[0-9]+$", str(element.value))
    ]
    assert len(identifiers) > 300
    for manufacturer in ("PHIQ9003ZK", "SIEMENS", "GE PHIQ9004ZK"):
        header.Manufacturer = manufacturer
        buffer = io.BytesIO()
        header.save_as(buffer)
        result = wide_sandbox.convert(buffer.getvalue())
        assert result.outcome == "stored"
        everything = texts_of(result)
        assert "PHI" not in everything
        assert "1.2.999" not in everything
        assert not [value for value in identifiers if value in everything]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["dicom-zoo", "dicom-poison"])
def test_every_object_gets_a_row(wide_sandbox: Sandbox, folder: str) -> None:
    root, count = data_folder(folder), 0
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix not in (".csv", ".md"):
            result = wide_sandbox.convert(path.read_bytes())
            assert (result.outcome == "stored") == (result.reason is None) == (result.pixels is not None)
            assert result.reason is None or result.reason in REASONS
            assert not path.name.startswith(("nest2", "nest3", "jpeg_sof", "j2k_siz")) or result.outcome != "stored"
            count += 1
    assert count > 50
