"""The cores of this process, not those of the host."""

import os
import subprocess
import sys

import pytest

from memmc.cores import cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_a_process_confined_to_one_core_counts_one():
    first = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{first}}}); from memmc.cores import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["1"]


def test_never_more_than_the_host_has():
    assert 1 <= cores() <= (os.cpu_count() or 1)
