"""The short form of infra/benchmarks/score_chaos.py: two scoring runs at once, a few kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_runs_killed_at_random_leave_each_instance_one_score(inside):
    script = Path(__file__).parents[2] / "infra" / "benchmarks" / "score_chaos.py"
    call = [sys.executable, str(script), "--lake", "lake", "--cohort", "cxr", "--runs", "2", "--kills", "4"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("PASS")
