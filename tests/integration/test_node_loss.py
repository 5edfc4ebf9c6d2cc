"""A machine of the cluster goes dark while the model trains on it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Workspace
from operation_plant import RayHead, until

pytestmark = pytest.mark.slow

STEPS = 120
_TRAIN = """
import sys
from memmc.config import load_config
from memmc.pipeline.progress import Silent
from memmc.pipeline.train import train

class Told(Silent):
    def advance(self, done, note=""):
        print(note, flush=True)

print(train(load_config(overrides=sys.argv[1:]), "cxr", progress=Told()).steps, "steps in all", flush=True)
"""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[RayHead]:
    """A cluster whose first node can train alone, if need be."""
    cluster = RayHead(tmp_path, num_cpus=2)
    yield cluster
    cluster.stop()


def test_training_shrinks_to_the_node_that_is_left_and_goes_on(
    workspace: Workspace, settings: list[str], head: RayHead, tmp_path: Path
) -> None:
    """Three workers and the data tasks need both nodes; the second is killed once there is a checkpoint."""
    node = head.add_node(num_cpus=2)
    shutil.copytree(workspace.root / "lake" / "instances", tmp_path / "lake" / "instances")
    bounds = [f"train.max_steps={STEPS}", "train.max_minutes=8", "train.checkpoint_seconds=2"]
    overrides = [*settings, *bounds, f"ray.address={head.address}", "train.num_workers=3", "train.min_workers=1"]
    with (tmp_path / "out.txt").open("wb") as out:
        training = subprocess.Popen(
            [sys.executable, "-c", _TRAIN, *overrides], cwd=tmp_path, env=head.environment, stdout=out, stderr=out
        )
    try:
        until(lambda: _checkpointed(tmp_path / "lake") or training.poll() is not None, 240, "a checkpoint")
        assert training.poll() is None, (tmp_path / "out.txt").read_text()
        head.kill_node(node)
        assert training.wait(timeout=300) == 0, (tmp_path / "out.txt").read_text()
    finally:
        training.kill()
    said = (tmp_path / "out.txt").read_text().splitlines()
    assert f"{STEPS} steps in all" in said
    steps = [int(line.split()[1]) for line in said if line.startswith("step ")]
    assert steps == sorted(steps) and steps.count(steps[0]) == 1, "the run began again instead of resuming"


def _checkpointed(lake: Path) -> bool:
    snapshots = (lake / "training").glob("*/checkpoint_manager_snapshot.json")
    return any("checkpoint_" in path.read_text() for path in snapshots)
