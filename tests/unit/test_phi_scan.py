"""Identifiers are found in every form and container, and nothing is found where there is none."""

from __future__ import annotations

import base64
import bz2
import gzip
import html
import io
import json
import lzma
import os
import random
import sqlite3
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicom_instances import dataset, encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from memmc.cli.main import app
from memmc.errors import DataError, UsageError
from memmc.phi import containers, selftest
from memmc.phi.identifiers import chosen, from_dicom, from_file
from memmc.phi.patterns import Searcher, spellings
from memmc.phi.planes import local_items
from memmc.phi.scan import Findings, Scan

NAME = "QUÖXX^ANNE O'TOOLE"
FORMS: dict[str, Callable[[str], bytes]] = {
    "text": lambda text: text.encode(),
    "upper": lambda text: text.upper().encode(),
    "lower": lambda text: text.lower().encode(),
    "latin-1": lambda text: text.encode("latin-1"),
    "utf-16le": lambda text: text.encode("utf-16-le"),
    "utf-16be": lambda text: text.encode("utf-16-be"),
    "hex": lambda text: text.encode().hex().encode(),
    "HEX": lambda text: text.encode().hex().upper().encode(),
    "url": lambda text: quote(text).encode(),
    "url plus": lambda text: quote_plus(text).encode(),
    "json": lambda text: json.dumps(text).encode(),
    "html": lambda text: html.escape(text).encode(),
    "repr": lambda text: repr(text).encode(),
    **{f"base64 after {n}": lambda text, n=n: base64.b64encode(b"=" * n + text.encode() + b"z") for n in range(3)},
    **{f"urlsafe after {n}": lambda text, n=n: base64.urlsafe_b64encode(b"~" * n + text.encode()) for n in range(3)},
}


def found(value: str, data: bytes, split: int = 0) -> bool:
    return bool(Searcher([value]).search([data[:split], data[split:]]))


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    rng = random.Random(form)
    data = rng.randbytes(300) + b"\n" + FORMS[form](NAME) + b"\n" + rng.randbytes(300)
    searcher = Searcher([NAME])
    assert all(searcher.search([data[:split], data[split:]]) for split in range(0, len(data), 7))
    assert not found("QUÖXX^ANNA O'TOOLE", data)


@settings(deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z", "Nd")), min_size=6, max_size=30),  # printable
    st.sampled_from([name for name in FORMS if name != "latin-1"]),
    st.binary(max_size=40),
    st.data(),
)
def test_any_text_is_found_wherever_it_is_cut(text: str, form: str, before: bytes, data: st.DataObject) -> None:
    whole = before + b" " + FORMS[form](text) + b" " + before
    assert found(text, whole, data.draw(st.integers(0, len(whole))))


SEVERAL = Searcher([NAME, "MRN0000123", "19230214"])


@given(st.binary(max_size=4000))
def test_noise_holds_nothing(noise: bytes) -> None:
    assert not SEVERAL.search([noise])


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("id 19700704, ", True),
        ("19700704", True),
        ("MRN19700704", True),
        ("1970-07-04T", True),
        ("04.07.1970", True),
        ("119700704", False),
        ("197007041", False),
        ("0.19700704", False),
        ("2.25.8719700704331", False),
        ("9f3a19700704bb01c2", False),
        ("a19700704b", False),
        ("9f3abb01c219700704", False),
        ("file19700704.dcm", True),
        ("image19700704", True),
        ("case19700704", True),
        ("ACC19700704", True),
        ("19700704ed", True),
        ("0a1b2c3d-ffff-4fff-8fff-bbbb19700704", False),
    ],
)
def test_numbers_stand_for_themselves(text: str, hit: bool) -> None:
    padded = b" " * 200 + text.encode() + b" " * 200
    searcher = Searcher(["19700704"])
    assert all(bool(searcher.search([padded[:split], padded[split:]])) == hit for split in range(180, 230))


def test_uids_are_not_parts_of_longer_numbers() -> None:
    assert found("1.2.3.44", b"(1.2.3.44)")
    assert found("1.2.3.44", b"1.2.3.44.5")
    assert not found("1.2.3.44", b"1.2.3.445")


def test_orders_of_a_name() -> None:
    for written in ("DOE, JANE", "JANE DOE", "Doe Jane", "jane^doe", "DOE^JANE^^DR", "doe_jane"):
        assert found("DOE^JANE^^DR", written.encode()), written
    assert not found("DOE^JANE", b"JANET DOEX")
    assert spellings("MRN 1") == ["MRN 1"]


def scanned(root: Path, *values: str) -> Findings:
    scan = Scan(values or (NAME,), b"k" * 32)
    scan.run(local_items("here", root))
    return scan.findings


def parquet(values: list[object], kind: pa.DataType, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"c": pa.array(values, kind)}), sink, **options)
    return sink.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return sink.getvalue()


def compressed(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PLAIN = b"0123 " * 50 + NAME.encode() + b" tail"
ROWS: list[object] = [*(f"row {number}" for number in range(300)), NAME]
PACKED = {
    "gzip": gzip.compress(PLAIN),
    "gzip twice": gzip.compress(b"first") + gzip.compress(PLAIN),
    "zlib": zlib.compress(PLAIN),
    "bz2": bz2.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "zstd": compressed("zstd", PLAIN),
    "lz4": compressed("lz4", PLAIN),
    "zip": zipped("a", PLAIN),
    "zip name": zipped(NAME, b"0"),
    "zip in gzip": gzip.compress(zipped("a", PLAIN)),
    "parquet in zip": zipped("a", parquet(ROWS, pa.string(), compression="zstd")),
    **{f"parquet {c}": parquet(ROWS, pa.string(), compression=c) for c in ("lz4", "zstd", "gzip", "snappy", "none")},
    "parquet plain": parquet(ROWS, pa.string(), use_dictionary=False, write_statistics=False),
    "parquet binary": parquet([b"1", NAME.encode("utf-16-le")], pa.binary()),
    "parquet packed cell": parquet([b"1", gzip.compress(PLAIN)], pa.binary()),
    "parquet list": parquet([["a"], ["b", NAME]], pa.list_(pa.string())),
    "parquet struct": parquet([{"x": "a"}, {"x": NAME}], pa.struct({"x": pa.string()})),
}


@pytest.mark.parametrize("kind", PACKED)
def test_containers(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(PACKED[kind])
    findings = scanned(tmp_path)
    assert findings.hits
    assert not findings.unread
    assert not scanned(tmp_path, "QUÖXX^ANNA O'TOOLE").hits


def test_integers_of_a_parquet_column(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(parquet([1, 88123], pa.int64(), compression="zstd"))
    assert scanned(tmp_path, "88123").hits
    assert not scanned(tmp_path, "8812").hits


def test_sqlite_values_on_several_pages_and_in_the_log(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "state.db")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x TEXT, y BLOB)")
    for start in range(4080 - 60, 4080):  # the value crosses from page to page in one of these rows
        connection.execute("INSERT INTO t VALUES (?, ?)", ("-" * start + NAME, gzip.compress(PLAIN)))
    connection.commit()
    inside = {hit.inside for hit in scanned(tmp_path).hits}
    assert {"table t", "table t, unpacked, decompressed", "file"} <= inside
    assert {path.name for path in tmp_path.iterdir()} == {"state.db", "state.db-wal", "state.db-shm"}
    connection.close()


def test_what_cannot_be_unpacked_is_no_pass(tmp_path: Path) -> None:
    (tmp_path / "cut.gz").write_bytes(gzip.compress(os.urandom(90_000))[:50_000])
    (tmp_path / "text").write_text("x^2 and BZh are words\n")
    assert scanned(tmp_path).unread == 1
    (tmp_path / "cut.gz").write_bytes(gzip.compress(PLAIN * 9)[:-9])
    findings = scanned(tmp_path)
    assert (findings.unread, bool(findings.hits)) == (1, True)
    (tmp_path / "cut.gz").unlink()
    (tmp_path / "no.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    assert scanned(tmp_path).unread == 1


def test_names_are_searched_and_withheld(tmp_path: Path) -> None:
    (tmp_path / "QUOXX99").mkdir()
    (tmp_path / "QUOXX99" / "a.log").write_text("quoxx99")
    (tmp_path / "link").symlink_to("/in/QUOXX99.dcm")
    findings = scanned(tmp_path, "QUOXX99")
    assert sorted(hit.inside for hit in findings.hits) == ["file", "name", "name", "name"]
    assert "QUOXX" not in repr(findings).upper()


def test_dates_that_were_shifted_are_counted_apart(tmp_path: Path) -> None:
    table = pa.table({"acquisition_date": ["20200103", "20210506"], "label": ["a", "20210506"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert (scanned(tmp_path, "20200103").hits, scanned(tmp_path, "20200103").shifted_dates > 0) == ([], True)
    assert {hit.inside for hit in scanned(tmp_path, "20210506").hits} == {"file, column label"}


def test_short_patterns_do_not_count_in_large_binary_data(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(2 << 20) + b"\0ROSE\0")
    (tmp_path / "small").write_bytes(bytes(20) + b"\0ROSE\0")
    (tmp_path / "text").write_bytes(b"." * (2 << 20) + b"ROSE")
    assert [hit.file for hit in scanned(tmp_path, "ROSE").hits] == ["small", "text"]


def test_lists(tmp_path: Path) -> None:
    table = tmp_path / "phi.csv"
    table.write_text('patient_id,kind,value\nMRN1234,addr,"10 Rose Lane, Sampletown"\nMRN1234,sex,F\nMRN1234,x,1234\n')
    found_values = from_file(table)
    assert found_values.values == ("MRN1234", "10 Rose Lane, Sampletown")
    assert found_values.short == 2
    assert "MRN" not in repr(found_values)
    (tmp_path / "list.txt").write_text("DOE^JANE\n\n  12345\n")
    assert from_file(tmp_path / "list.txt").values == ("DOE^JANE", "12345")
    for content in (b"a\nF\n", b"\xff\xfe\xfa"):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(UsageError):
            from_file(tmp_path / "list.txt")
    assert chosen(["1234", "abc", "abcd", "12345", "abcd "]).values == ("abcd", "12345")


def test_identifiers_of_objects(tmp_path: Path) -> None:
    item = dataset(InstitutionName="St Quoxx", PatientBirthDate="19570312")
    one = dataset(AccessionNumber="ACC77821", StudyDescription="CHEST PA", PatientBirthDate="19570312")
    one.RequestAttributesSequence = [item]
    one.add_new(0x00091010, "LO", "private Quoxx")
    (tmp_path / "a.dcm").write_bytes(encoded(one))
    (tmp_path / "b.txt").write_text("no object")
    values = from_dicom(tmp_path)
    assert set(values.values) == {
        "MRN0001", "DOE^JANE", "ACC77821", "St Quoxx", "private Quoxx", "19570312", "1.2.3.1", "1.2.3.2", "1.2.3.3",
    }  # fmt: skip
    assert (values.generic, values.unread) == (1, 1)
    with pytest.raises(UsageError):
        from_dicom(tmp_path / "absent")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("MEMMC_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def asked(*options: str) -> Result:
    return CliRunner().invoke(app, ["scan-phi", *options])


def test_the_verb(here: Path) -> None:
    (here / "list.txt").write_text("QUOXX99\nabc\n")
    (here / "lake").mkdir()
    (here / "lake" / "a").write_text("nothing")
    clean = asked("--identifiers", "list.txt", "--json")
    assert clean.exit_code == 0, clean.output
    told = json.loads(clean.stdout)
    assert (told["num_hits"], told["planted"], told["found"], told["skipped_short"]) == (0, 8, 8, 1)
    (here / ".memmc").mkdir()
    (here / ".memmc" / "x.log").write_text("lost quoxx99")
    for options in ((), ("--json",)):
        dirty = asked("--identifiers", "list.txt", *options)
        assert dirty.exit_code == 1
        assert "x.log" in dirty.stdout
        assert "quoxx" not in dirty.output.lower()
    assert asked("--self-test").exit_code == 0
    for options in ((), ("--identifiers", "list.txt", "--path", "absent"), ("--identifiers", "absent")):
        assert getattr(asked(*options).exception, "exit_code", 0) == 2


def test_a_search_that_cannot_find_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.self_test(["MRN0001"]) == list(selftest.LEAKS)
    monkeypatch.setattr(containers, "_decompressed", lambda file, head: None)
    missed = set(selftest.LEAKS) - set(selftest.self_test([]))
    assert missed == {"JSON-escaped in a gzip artifact", "hex in a zlib stream"}
    (here / "list.txt").write_text("QUOXX99\n")
    failed = asked("--identifiers", "list.txt")
    assert isinstance(failed.exception, DataError)
    assert "6 of 8" in str(failed.exception)
