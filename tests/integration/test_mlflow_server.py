"""Runs and models through a real `mlflow server`, and what happens to training when it goes away."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from memmc.config import TrackingConfig
from memmc.errors import StorageError
from memmc.registry.models import CHAMPION, download, register, resolve
from memmc.registry.tracking import open_tracking

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def await_health(url, process, timeout_s=300):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the server did not answer")


def stop_group(process):
    """End a server with its children, stopped or dead ones too."""
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number == signal.SIGTERM:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                continue
    process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db"),
        *(
            "--artifacts-destination",
            str(folder / "artifacts"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "GIT_PYTHON_REFRESH": "quiet"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | quiet
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await_health(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop_group(process)


def test_runs_and_models_over_http(server, tmp_path):
    url, _ = server
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


def test_a_server_that_hangs_or_dies_does_not_hold_up_training(server, tmp_path, caplog):
    url, process = server
    tracking = open_tracking(TrackingConfig(uri=url), tmp_path / ".memmc")
    run = tracking.start_run("memmc/cxr", "train-2")
    os.killpg(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    tracking.log_metrics(run, [(0, {"loss": 1.0})])
    first = time.monotonic() - began
    began = time.monotonic()
    for step in range(1, 100):
        tracking.log_metrics(run, [(step, {"loss": 1.0})])
    later = time.monotonic() - began
    assert first < 10
    assert later < 1
    assert tracking.lost == 100
    assert len([record for record in caplog.records if "values are lost" in record.message]) == 1
    os.killpg(process.pid, signal.SIGCONT)
    tracking.end_run(run)
    assert tracking.client.get_run(run).info.status == "FINISHED"

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    tracking.log_metrics(run, [(100, {"loss": 1.0})])
    assert tracking.lost == 101
    assert time.monotonic() - began < 15
    with pytest.raises(StorageError, match=r"check tracking\.uri"):
        tracking.start_run("memmc/cxr", "train-3")
