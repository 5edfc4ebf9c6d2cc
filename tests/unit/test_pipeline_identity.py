"""How the identity key comes in, and that it goes nowhere else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dicom_instances import dataset, encoded, policy
from typer.testing import CliRunner

from memmc.cli.main import app
from memmc.config import load_config
from memmc.dicom.convert import convert
from memmc.dicom.deidentify import content_key, date_shift_days, frame_uid, key_id, keyed_uid, object_key
from memmc.errors import IdentityKeyError
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.phi.planes import local_items
from memmc.phi.scan import Scan
from memmc.pipeline import custody
from memmc.pipeline.convert_chunk import IngestJob, convert_objects
from memmc.pipeline.identity import held_key, identity_key
from memmc.pipeline.ingest import preview
from memmc.pipeline.labels import StatedLabels
from memmc.pipeline.progress import Silent
from memmc.sources.open import open_source

TEXT = "5eed" * 16
ONE, TWO = TEXT.encode(), b"another-key-of-more-than-thirty-two-bytes"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    custody.hold(None)
    yield
    custody.hold(None)


def test_the_environment_goes_first_and_is_emptied(tmp_path: Path) -> None:
    environment = {"MEMMC_DEID_KEY": f" {TEXT}\n", "OTHER": "1"}
    custody.adopt(environment)
    assert environment == {"OTHER": "1"}
    config = load_config(overrides=["deid.key_file=absent"])
    assert identity_key(config, tmp_path) == held_key(config, tmp_path) == ONE
    assert list(tmp_path.iterdir()) == []
    custody.adopt({})
    assert held_key(config, tmp_path) == ONE
    custody.hold("short")
    with pytest.raises(IdentityKeyError, match="at least 32") as caught:
        identity_key(config, tmp_path)
    assert "short" not in str(caught.value)


def test_a_verb_takes_it_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMMC_DEID_KEY", TEXT)
    assert CliRunner().invoke(app, ["scan-phi", "--self-test"]).exit_code == 0
    assert "MEMMC_DEID_KEY" not in os.environ
    assert custody.handed_over() == ONE


def test_of_processes_that_begin_together_all_get_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists, together = Path.exists, threading.Barrier(4)

    def seen(self: Path) -> bool:
        found = exists(self)
        if self.name == "deid.key":
            together.wait(5)
        return found

    monkeypatch.setattr(Path, "exists", seen)
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda _: identity_key(load_config(), tmp_path / ".memmc"), range(4)))
    assert len(set(keys)) == 1
    (file,) = (tmp_path / ".memmc").iterdir()
    assert (file.name, file.stat().st_mode & 0o777) == ("deid.key", 0o600)


def test_a_preview_makes_no_key_and_ties_no_lake(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(encoded(dataset()))
    config = load_config(overrides=["lake.uri=lake"])
    assert preview(config, "in", "c").counts["new"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    Lake("lake").check_key_id("another")
    with pytest.raises(IdentityKeyError, match="made with identity key another"):
        preview(config, "in", "c")


def test_a_key_is_held_for_a_step() -> None:
    custody.hold(TEXT)
    with pytest.raises(ZeroDivisionError), custody.holding("other"):
        assert custody.handed_over() == b"other"
        raise ZeroDivisionError
    assert custody.handed_over() == ONE


@pytest.mark.parametrize(
    ("mode", "passes"), [(0o600, True), (0o400, True), (0o440, True), (0o644, True), (0o620, False), (0o602, False)]
)
def test_a_file_that_others_can_change_is_refused_and_one_they_can_read_is_said(
    tmp_path: Path, mode: int, passes: bool
) -> None:
    file = tmp_path / "key"
    file.write_text(TEXT)
    file.chmod(mode)
    config = load_config(overrides=[f"deid.key_file={file}"])
    if passes:
        said: list[str] = []

        class Heard(Silent):
            def message(self, text: str) -> None:
                said.append(text)

        assert identity_key(config, tmp_path, Heard()) == held_key(config, tmp_path) == ONE
        assert [("chmod 600" in text, str(tmp_path) in text) for text in said] == [(True, False)] * bool(mode & 0o044)
        return
    for ask in (identity_key, held_key):
        with pytest.raises(IdentityKeyError, match="chmod 600") as caught:
            ask(config, tmp_path)
        assert str(tmp_path) not in str(caught.value)
        assert TEXT not in str(caught.value)


def test_a_secret_needs_a_flow(tmp_path: Path) -> None:
    config = load_config(overrides=["deid.key_secret=memmc-key"])
    for ask in (identity_key, held_key):
        with pytest.raises(IdentityKeyError, match="--flow"):
            ask(config, tmp_path)
    with custody.holding(TEXT):
        assert identity_key(config, tmp_path) == ONE


def test_two_keys_share_no_pseudonym() -> None:
    """A lake made with a new key is another name space: what both keys make of the same objects never meets."""
    made: list[set[object]] = []
    shifts: list[list[int]] = []
    for key in (ONE, TWO):
        found: set[object] = {key_id(key)}
        for number in range(60):
            data = encoded(dataset(PatientID=f"M{number}", SOPInstanceUID=f"1.2.3.{number}", StudyInstanceUID="1.9"))
            row = convert(data, policy(key=key)).attributes
            found |= {row[name] for name in ("patient_key", "study_uid", "series_uid", "sop_instance_uid")}
            found |= {object_key(key, "s", f"{number}", 1, "v"), content_key(key, data)}
            found |= {frame_uid(str(row["sop_instance_uid"]), 1)}
        found |= {keyed_uid(key, f"1.2.{number}") for number in range(5000)}
        made.append(found)
        shifts.append([date_shift_days(key, str(number), 365) for number in range(200)])
    assert len(made[0]) == len(made[1]) > 5000
    assert not made[0] & made[1]
    assert sum(one == two for one, two in zip(*shifts, strict=True)) < 10


def test_the_key_stands_nowhere_in_what_a_task_writes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(encoded(dataset()))
    config = load_config(overrides=["deid.text=class"])
    source = open_source(str(tmp_path / "in"), config.source, {})
    job = IngestJob(
        run="r",
        cohort="c",
        source=source,
        storage=Storage.open(str(tmp_path / "lake")),
        policy=policy(key=ONE),
        split=config.split,
        labels=StatedLabels(),
        preprocess_id=config.preprocess_id,
        started=datetime(2026, 1, 1, tzinfo=UTC),
    )
    convert_objects(job, source.listing(None, lambda _item: True).objects)
    scan = Scan([TEXT, ONE.hex()], b"k")
    scan.run(local_items("lake", tmp_path / "lake"))
    assert (scan.findings.hits, scan.findings.files["lake"] > 0) == ([], True)
    (tmp_path / "lake" / "leak").write_bytes(b"key=" + ONE.hex().upper().encode())
    scan.run(local_items("lake", tmp_path / "lake"))
    assert scan.findings.hits
    assert TEXT not in repr(job) + repr(job.policy)
