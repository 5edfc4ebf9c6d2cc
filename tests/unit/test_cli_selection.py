"""`memmc select --explain`: every rule, the verdict, no patient data, no server, no lake."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from dicom_instances import dataset, encoded
from typer.testing import CliRunner, Result

from memmc.cli.main import app
from memmc.dicom.select import RULES


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MEMMC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(folder: Path, data: bytes, *options: str) -> Result:
    (folder / "one.dcm").write_bytes(data)
    return CliRunner().invoke(app, ["select", "--explain", str(folder / "one.dcm"), *options])


def test_an_image_in_scope(here: Path) -> None:
    found = json.loads(asked(here, encoded(dataset()), "--json").stdout)
    assert (found["outcome"], found["reason"]) == ("in scope", None)
    assert [rule["name"] for rule in found["rules"]] == [rule.name for rule in RULES]
    assert all(rule["passed"] for rule in found["rules"])
    assert {path.name for path in here.iterdir()} == {"one.dcm"}


def test_an_image_out_of_scope_for_two_reasons(here: Path) -> None:
    lateral = encoded(dataset(ViewPosition="LL", ImageType=["DERIVED", "SECONDARY"]))
    shown = asked(here, lateral).stdout
    assert "FAIL  derived" in shown
    assert "FAIL  lateral            ViewPosition LL" in shown
    assert "select.lateral_views=False" in shown
    assert shown.splitlines()[-1].startswith("excluded")
    assert "(SELECT_DERIVED)" in shown.splitlines()[-1]  # the first decides
    accepted = asked(here, lateral, "--set", "select.derived=true", "--set", "select.lateral_views=true")
    assert accepted.stdout.splitlines()[-1] == "in scope: no rule objects"


def test_no_patient_data_is_shown(here: Path) -> None:
    planted = dataset(PatientName="QUOXX^ANNE", PatientID="QUOXX1", ViewPosition="QUOXX", Manufacturer="QUOXX")
    for options in ((), ("--json",)):
        shown = asked(here, encoded(planted), *options)
        assert "OTHER" in shown.stdout
        for text in ("QUOXX", "ANNE", "1.2.3.1", "20200301", "042Y"):
            assert text not in shown.output, text


@pytest.mark.parametrize(("data", "reason"), [(b"", "FILE_EMPTY"), (b"<html>", "FILE_NOT_DICOM")])
def test_what_cannot_be_read(here: Path, data: bytes, reason: str) -> None:
    found = json.loads(asked(here, data, "--json").stdout)
    assert (found["outcome"], found["reason"], found["rules"]) == ("quarantined", reason, [])


def test_what_is_no_file(here: Path) -> None:
    os.mkfifo(here / "pipe")
    for name in ("pipe", "absent", "."):
        done = CliRunner().invoke(app, ["select", "--explain", name])
        assert "FILE" in str(done.exception), name
        assert getattr(done.exception, "exit_code", 0) == 2


def test_too_large_a_file_is_not_read(here: Path) -> None:
    found = json.loads(asked(here, encoded(dataset()), "--json", "--set", "ingest.max_file_bytes=100").stdout)
    assert found["reason"] == "FILE_TOO_LARGE"


def test_nothing_heavy_is_loaded(here: Path) -> None:
    import subprocess

    (here / "one.dcm").write_bytes(encoded(dataset()))
    script = (
        "import sys\nfrom memmc.cli.main import app\n"
        "app(['select', '--explain', 'one.dcm'], standalone_mode=False)\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'prefect', 'deltalake', 'rapidocr'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
