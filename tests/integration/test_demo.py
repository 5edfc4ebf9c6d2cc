"""`memmc demo`, as a newcomer runs it: through the flows, in an empty folder, then once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memmc.lake.tables import Lake

pytestmark = pytest.mark.slow


def _demo(folder: Path) -> dict:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MEMMC_", "PREFECT_", "RAY_"))
    }
    command = [sys.executable, "-m", "memmc.cli.main", "demo", "--minutes", "0.2", "--json"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_demo_goes_the_whole_way_and_does_nothing_twice(tmp_path):
    first = _demo(tmp_path)
    account = first["ingest"]
    assert account["seen"] == account["stored"] + account["duplicate"] + account["excluded"] + account["quarantined"]
    assert min(account[name] for name in ("stored", "duplicate", "excluded", "quarantined")) > 0
    assert "not a medical device" in (tmp_path / first["report"]).read_text()
    versions = {name: Lake(tmp_path / "memmc-demo" / "lake").version(name) for name in ("instances", "scores")}
    second = _demo(tmp_path)
    assert second["ingest"] == account
    assert second["model"] == first["model"]
    assert second["evaluation"] == first["evaluation"]
    assert versions == {name: Lake(tmp_path / "memmc-demo" / "lake").version(name) for name in versions}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".memmc", "memmc-demo"]
