"""A Ray cluster that does not start at once, or at all, or cannot be joined; each in a process without a cluster."""

import subprocess
import sys
import time

import pytest
from operation_plant import free_port

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path

from memmc.config import load_config
from memmc.errors import MemmcError
from memmc.pipeline.cluster import prepare_environment, ray_cluster

failures, address = int(sys.argv[1]), sys.argv[2:]
home = Path.cwd() / ".memmc"
prepare_environment(home)

import ray

start, tried = ray.init, []

def init(**options):
    tried.append(options)
    if len(tried) <= failures:
        raise Exception("The current node timed out during startup.")  # as Ray raises it
    return start(**options)

ray.init = init
try:
    with ray_cluster(load_config(overrides=[f"ray.address={each}" for each in address]), home, training=False) as found:
        print("up", int(found.cluster_resources()["CPU"]) > 0, len(tried))
except MemmcError as error:
    print(type(error).__name__, len(tried), error)
print("left", [path.name for path in (home / "ray").glob("*")])
"""


def said(folder, *words):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_cluster_that_is_late_is_started_again(tmp_path):
    assert said(tmp_path, 2) == ["up True 3", "left []"]


def test_a_cluster_that_does_not_start_is_named_as_the_reason(tmp_path):
    error, left = said(tmp_path, 9)
    assert error.startswith("MemmcError 3 a Ray cluster did not start here")
    assert left == "left []"


def test_a_cluster_that_is_not_there_is_named_as_the_reason(tmp_path):
    began = time.monotonic()
    error, _ = said(tmp_path, 0, f"127.0.0.1:{free_port()}")
    print(f"told after {time.monotonic() - began:.0f} s")
    assert error.startswith("StorageError 0 no Ray cluster could be joined at ray.address")
