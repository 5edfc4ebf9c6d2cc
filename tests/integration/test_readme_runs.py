"""Every command of the README runs as it stands there, in its order."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memmc.cli.main import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MADE = {"make demo", "make test"}  # the first has its own test; the second is the one that runs this


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_readme_commands_run_as_written(inside, hospital, monkeypatch, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name, value in {
        "TRAIN__MAX_MINUTES": "0.3",
        "SPLIT__TRAIN": "0.5",
        "SPLIT__CALIBRATE": "0.3",
        "SPLIT__TEST": "0.2",
        "EVALUATE__BOOTSTRAP": "100",
    }.items():
        monkeypatch.setenv(f"MEMMC_{name}", value)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(hospital.dicom_dir, data / "dicom")
    shutil.copy(hospital.labels_csv, data / "labels.csv")
    ran = 0
    for line in commands():
        if line in MADE:
            continue
        words = shlex.split(line.replace("/data/", f"{data}/"))
        assert words[0] == "memmc"
        result = CliRunner().invoke(app, words[1:], catch_exceptions=True)
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"
        ran += 1
    assert ran == len(commands()) - len(MADE) >= 10
    assert (work / "scores.parquet").exists()
    done = [json.loads(path.read_text())["action"] for path in sorted((work / "lake" / "_audit").glob("0*.json"))]
    verbs = {shlex.split(line)[1] for line in commands() if "--dry-run" not in line}
    assert {verb for verb in verbs if verb not in {"make", "doctor", "demo", "test", "audit"}} <= set(done)
    assert "not a medical device" in (work / "report.html").read_text()
