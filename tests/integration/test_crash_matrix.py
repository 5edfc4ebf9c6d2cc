"""The short form of infra/benchmarks/crash_matrix.py: every kind of fault, few points of each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)"),
]


def _attachable() -> bool:
    """Return whether this container lets strace attach at all."""
    with subprocess.Popen(["sleep", "20"]) as sleeper:
        try:
            done = subprocess.run(
                ["timeout", "-s", "INT", "1", "strace", "-p", str(sleeper.pid)], capture_output=True, check=False
            )
            return b"Operation not permitted" not in done.stderr
        finally:
            sleeper.kill()


def test_no_fault_of_a_commit_leaves_part_of_it():
    if not _attachable():
        pytest.skip("strace may not attach to processes here")
    script = Path(__file__).parents[2] / "infra" / "benchmarks" / "crash_matrix.py"
    done = subprocess.run(
        [sys.executable, str(script), "--short"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing wrong PASS") == 5
    assert "60 of 60 flipped bits" in done.stdout and "12 of 12 commits" in done.stdout
