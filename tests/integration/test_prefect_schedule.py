"""A schedule on a real server produces runs, and they run: no other test would notice a scheduler that is broken."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = pytest.mark.slow

SERVE = """
from datetime import timedelta
from prefect.schedules import Interval
from flows.ingest import ingest_flow
if __name__ == "__main__":  # runs are spawned processes that import this file
    parameters = {"source": "scans", "cohort": "nightly", "config": {"lake": {"uri": "lake"}}}
    schedule = Interval(timedelta(seconds=15), parameters=parameters)
    ingest_flow.serve(name="nightly", schedules=[schedule], print_starting_message=False)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stop_group(process):
    for number, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def start(command, cwd, environment):
    with (cwd / "output.log").open("ab") as log:
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture
def server(tmp_path):
    """A server and the environment of its clients."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMMC_"))}
    environment |= {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = start(command, tmp_path, environment)
    url = f"http://127.0.0.1:{port}/api"
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            assert process.poll() is None, (tmp_path / "output.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.3)
        yield url, environment | {"PREFECT_API_URL": url}
    finally:
        stop_group(process)


def post(url, path, body):
    request = urllib.request.Request(f"{url}/{path}", body.encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def await_runs(url, state, timeout_s):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = post(url, "flow_runs/filter", '{"sort": "EXPECTED_START_TIME_ASC"}')
        matching = [run for run in found if run["state_type"] == state]
        if matching:
            return matching
        assert not [run for run in found if run["state_type"] in {"FAILED", "CRASHED"}]
        time.sleep(0.5)
    return []


def test_a_schedule_makes_runs_and_they_complete(server, tmp_path):
    url, environment = server
    (tmp_path / "scans").mkdir()
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    process = start([sys.executable, str(script)], tmp_path, environment)
    try:
        end = time.monotonic() + 180
        while not post(url, "deployments/filter", "{}"):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "output.log").read_text()[-2000:]
            time.sleep(0.3)
        scheduled = await_runs(url, "SCHEDULED", 60)
        assert scheduled, "the scheduler made no run within 60 s"
        assert scheduled[0]["auto_scheduled"]
        completed = await_runs(url, "COMPLETED", 240)
        assert completed, (tmp_path / "output.log").read_text()[-4000:]
        assert completed[0]["parameters"]["cohort"] == "nightly"
        assert completed[0]["name"].startswith("ingest-nightly-")
    finally:
        stop_group(process)
