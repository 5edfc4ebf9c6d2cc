"""A verb and its flow leave the same rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from memmc.lake.tables import Lake

pytestmark = pytest.mark.slow

# What differs between any two runs: when they ran and what they were called.
_OF_THE_RUN = {"ingest_run", "ingested_at"}


def _memmc(*arguments: str) -> dict:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MEMMC_", "PREFECT_", "RAY_"))
    }
    command = [sys.executable, "-m", "memmc.cli.main", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _rows(uri: str) -> list[dict]:
    lake = Lake(uri)
    names = [name for name in lake.read("instances").column_names if name not in _OF_THE_RUN] + ["pixels"]
    return sorted(lake.read("instances", names).to_pylist(), key=lambda row: row["object_key"])


def test_ingest_as_a_verb_and_as_a_flow_give_the_same_rows(hospital, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    files = sorted(path for path in hospital.dicom_dir.rglob("*") if path.is_file())[:24]
    for number, file in enumerate(files):
        shutil.copy(file, tmp_path / "in" / f"{number:03d}.dcm")
    direct = _memmc("ingest", "in", "--cohort", "cxr", "--label", "normal", "--lake", "as-verb")
    flow = _memmc("ingest", "in", "--cohort", "cxr", "--label", "normal", "--lake", "as-flow", "--flow")
    skipped = {"run", "seconds"}
    assert {k: v for k, v in direct.items() if k not in skipped} == {k: v for k, v in flow.items() if k not in skipped}
    assert _rows("as-verb") == _rows("as-flow")
