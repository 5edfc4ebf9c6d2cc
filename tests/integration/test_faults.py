"""Processes killed at the worst moment: nothing lost, nothing twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from memmc.config import load_config
from memmc.lake.tables import Lake
from memmc.pipeline.ingest import ingest
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.progress import Silent
from memmc.pipeline.runs import unfinished
from memmc.pipeline.train import train
from memmc.registry.models import all_versions

pytestmark = pytest.mark.slow

_TRAIN = (
    "import sys; from memmc.config import load_config; from memmc.pipeline.train import train;"
    "train(load_config(overrides=sys.argv[1:]), 'cxr')"
)
_INGEST = (
    "import sys; from memmc.config import load_config; from memmc.pipeline.ingest import ingest;"
    "config = load_config(overrides=['lake.uri=killed', 'ingest.objects_per_task=16', *sys.argv[2:]]);"
    "ingest(config, sys.argv[1], 'cxr', label='normal')"
)


def _shards(lake: Path) -> list[Path]:
    return list(lake.glob("instances/**/*.parquet"))


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [*process.children(recursive=True), process]


@pytest.mark.parametrize("ingest_from", [10_000, 0], ids=["its own processes", "a cluster"])
def test_an_ingest_killed_half_way_leaves_no_trace_and_the_next_completes(inside, ingest_from):
    """Kill -9 of the driver and all its workers once shards exist, before the commit."""
    shutil.rmtree("killed", ignore_errors=True)
    command = [sys.executable, "-c", _INGEST, str(inside.hospital.dicom_dir), f"ray.ingest_from={ingest_from}"]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not _shards(Path("killed")) and time.monotonic() < deadline:
        assert victim.poll() is None, "ingest ended before it could be killed"
        time.sleep(0.01)
    for process in _tree(victim.pid):
        process.kill()
    victim.wait()
    assert _shards(Path("killed"))
    assert not Lake("killed").exists("instances")
    config = inside.config.model_copy(update={"lake": inside.config.lake.model_copy(update={"uri": "killed"})})
    account = ingest(config, str(inside.hospital.dicom_dir), "cxr", label="normal")
    assert account.seen == inside.ingested.seen
    assert account.stored == inside.ingested.stored
    rows = Lake("killed").read("instances", ["object_key", "sop_instance_uid", "outcome"])
    assert rows.num_rows == len(set(rows["object_key"].to_pylist())) == account.seen
    stored = [row["sop_instance_uid"] for row in rows.to_pylist() if row["outcome"] == "stored"]
    assert len(stored) == len(set(stored))


_LOOKED = ("val_error", "probe_auroc", "memory/mass/layer1", "gate/level1", "ablation/error_without_memory")


def _checkpoints(lake: Path) -> str:
    """What a restart would find: files alone do not count, the snapshot must name them."""
    snapshots = (lake / "training").glob("*/checkpoint_manager_snapshot.json")
    return "".join(text for path in snapshots if "checkpoint_" in (text := path.read_text()))


class _HitsAWorker(Silent):
    """Sends one training worker a signal, once, after the controller has taken note of a new checkpoint."""

    def __init__(self, lake: Path, blow: signal.Signals) -> None:
        self.lake, self.blow, self.killed = lake, blow, threading.Event()
        self.before = _checkpoints(lake)
        self.steps: list[int] = []

    def advance(self, done: float, note: str = "") -> None:
        if not note.startswith("step"):
            return
        self.steps.append(int(note.split()[1]))
        if not self.killed.is_set() and _checkpoints(self.lake) != self.before:
            mine = psutil.Process().children(recursive=True)
            workers = [process for process in mine if "RayTrainWorker" in " ".join(process.cmdline())]
            assert workers, "no training worker found"
            os.kill(workers[-1].pid, self.blow)
            self.killed.set()


def test_training_goes_on_from_its_checkpoint_when_a_worker_is_killed(inside, tmp_path, monkeypatch):
    """In a copy of the lake with a registry of its own, so that the other tests see one model.

    The images are streamed from the shards, the number of workers is elastic, the best average is kept.
    """
    shutil.copytree("lake/instances", tmp_path / "lake" / "instances")
    monkeypatch.chdir(tmp_path)
    watcher = _HitsAWorker(Path("lake"), signal.SIGKILL)
    config = inside.config.model_copy(
        update={
            "train": inside.config.train.model_copy(
                update={
                    "max_steps": 120,
                    "max_minutes": 5.0,
                    "checkpoint_seconds": 2.0,
                    "min_workers": 1,
                    "cache_bytes": 0,
                    "validate_share": 0.3,
                    "select": "val_error",
                    "look_seconds": 5.0,
                }
            )
        }
    )
    result = train(config, "cxr", progress=watcher)
    assert watcher.killed.is_set()
    assert result.steps == 120
    restarts = [b for a, b in zip(watcher.steps, watcher.steps[1:], strict=False) if b <= a]
    assert all(step > 8 for step in restarts), "the run began again instead of resuming"
    tracking = tracking_of(config, tmp_path / ".memmc")
    (version,) = all_versions(tracking)
    history = {name: tracking.metric_history(version.run_id, name) for name in _LOOKED}
    assert all(values for values in history.values()), history
    best_step, best = min(history["val_error"], key=lambda point: point[1])
    assert open_model(config, tmp_path / ".memmc", result.model).info["steps"] == best_step
    assert best < history["val_error"][0][1] or len(history["val_error"]) == 1


def test_a_killed_driver_is_followed_by_one_that_goes_on_and_a_stopped_worker_is_noticed(
    inside, settings, tmp_path, monkeypatch
):
    """Kill -9 of the driver and its whole cluster, then SIGSTOP of a worker of the next driver."""
    shutil.copytree("lake/instances", tmp_path / "lake" / "instances")
    monkeypatch.chdir(tmp_path)
    bounds = ["train.max_steps=160", "train.max_minutes=4", "train.checkpoint_seconds=2", "train.hung_seconds=15"]
    overrides = [*settings, *bounds]
    victim = subprocess.Popen(
        [sys.executable, "-c", _TRAIN, *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    while not _checkpoints(Path("lake")) and time.monotonic() < deadline:
        assert victim.poll() is None, "training ended before it could be killed"
        time.sleep(0.05)
    for process in _tree(victim.pid):
        process.kill()
    victim.wait()
    (begun,) = Path("lake/training").glob("train-*")
    watcher = _HitsAWorker(Path("lake"), signal.SIGSTOP)
    result = train(load_config(overrides=overrides), "cxr", progress=watcher)
    assert result.run == begun.name
    assert result.steps == 160
    assert watcher.killed.is_set()
    assert watcher.steps[0] > 8, "the run began again instead of resuming"
    assert unfinished(Lake("lake").storage, "cxr") == []
