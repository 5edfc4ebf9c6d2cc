"""Runs and models through a real `mlflow server`, and what happens to training when it goes away."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from memmc.config import TrackingConfig
from memmc.errors import StorageError
from memmc.registry.models import CHAMPION, download, register, resolve
from memmc.registry.tracking import open_tracking

sys.path.insert(0, str(Path(__file__).parents[2] / "infra" / "benchmarks"))
from tracking_outage import MlflowServer, outage, passed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        running.start()
        yield running
    finally:
        running.kill()


def test_runs_and_models_over_http(server, tmp_path, capsys):
    url = server.url
    tracking = open_tracking(TrackingConfig(uri=url), tmp_path / "train" / ".memmc")
    run = tracking.start_run("memmc/cxr", "train-1", {"a": "b"}, {"lr": 0.1})
    tracking.log_metrics(run, [(step, {"loss": 1.0 / (step + 1)}) for step in range(1500)])
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    (folder / "model.json").write_text('{"format": 1}')
    version = register(tracking, run, folder, "memmc-cxr", {"cohort": "cxr"})
    tracking.end_run(run)
    tracking.client.set_registered_model_alias("memmc-cxr", CHAMPION, version.version)

    # Another machine: other home, same server.
    scoring = open_tracking(TrackingConfig(uri=url), tmp_path / "score" / ".memmc")
    fetched = download(scoring, resolve(scoring))
    assert resolve(scoring).ref == "memmc-cxr/1"
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in fetched.iterdir()) == ["model.json", "model.safetensors"]
    assert scoring.client.get_run(run).info.status == "FINISHED"
    assert tracking.lost == 0
    assert capsys.readouterr().out == ""  # nothing but the verb's own JSON may stand on stdout


def test_nothing_is_lost_while_the_server_hangs_and_is_killed(server, tmp_path):
    """The short form of infra/benchmarks/tracking_outage.py; MEMMC_OUTAGE_SECONDS=300 makes it the long one."""
    found = outage(server, tmp_path / ".memmc", float(os.environ.get("MEMMC_OUTAGE_SECONDS", "5")))
    assert passed(found), found
    assert found["down_s"] > 5 and found["logged"] > 50


def test_a_server_that_is_down_at_the_start_is_said_at_once(server, tmp_path):
    """Hanging, then dead: nobody trains for hours towards a registry that is not there. The last test of the module."""
    for end in (lambda: server.signal(signal.SIGSTOP), server.kill):
        end()
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"check tracking\.uri and that its server runs"):
            open_tracking(TrackingConfig(uri=server.url), tmp_path / ".memmc")
        assert time.monotonic() - began < 30
