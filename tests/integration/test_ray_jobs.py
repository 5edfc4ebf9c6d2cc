"""Jobs on a real Ray cluster through its Jobs API; the command is a few lines long, so that each ending can be had."""

import os
import subprocess
import sys
import threading
import time

import pytest

from flows.deadline import time_limit
from memmc.config import RayConfig
from memmc.errors import DataError, DeadlineError, MemmcError, StorageError
from memmc.pipeline.cluster_job import _Client, count_jobs, run_job, stop_jobs
from memmc.pipeline.results import ReportResult

pytestmark = pytest.mark.slow

CANARY = "QUARTZBERG^ZEBEDEE"
COMMAND = f"""#!{sys.executable}
import json, os, sys, time
def say(**line): print(json.dumps(line), file=sys.stderr, flush=True)
print("could not convert string to float: '{CANARY}'", flush=True)
say(memmc="stage", name=os.environ["MEMMC_PROGRESS"], total=3.0)
if sys.argv[1] == "forever":
    while True: time.sleep(1)
say(memmc="message", text=os.getcwd())
say(note="{CANARY}")
if sys.argv[1] == "refuse":
    print(json.dumps(dict(error="DataError", message="do this")))
    sys.exit(1)
if sys.argv[1] == "die":
    raise ValueError("{CANARY}")
print(json.dumps(dict(report=str(time.time()), model="m/1", cohort="cxr")))
"""


class Listener:
    def __init__(self):
        self.heard = []

    def stage(self, name, total=None):
        self.heard.append(("stage", name, total))

    def advance(self, done, note=""):
        self.heard.append(("advance", done, note))

    def message(self, text):
        self.heard.append(("message", text))


@pytest.fixture
def ray(ray_head, tmp_path):
    command = tmp_path / "command"
    command.write_text(COMMAND)
    command.chmod(0o755)
    return RayConfig(address=ray_head.url, job_directory=str(tmp_path), job_command=str(command))


def test_a_job_is_followed_joined_and_heard_and_nothing_else_leaves_it(ray, tmp_path):
    listener = Listener()
    first = run_job(ray, "memmc-a-report", ["succeed"], ReportResult, listener)
    assert listener.heard == [
        ("message", "Ray job memmc-a-report-1 submitted"),
        ("stage", "lines", 3.0),
        ("message", str(tmp_path)),
    ]
    assert CANARY in _Client(ray).log("memmc-a-report-1")
    assert run_job(ray, "memmc-a-report", ["succeed"], ReportResult, listener) == first
    assert _jobs(ray, "memmc-a-") == ["memmc-a-report-1"]
    assert count_jobs(ray) >= 1
    assert CANARY not in str(listener.heard)


def test_errors_come_back_by_name_and_a_failed_job_is_followed_by_another(ray):
    for number in (1, 2):
        with pytest.raises(DataError, match=r"^do this$"):
            run_job(ray, "memmc-b-report", ["refuse"], ReportResult, Listener())
        assert len(_jobs(ray, "memmc-b-")) == number
    with pytest.raises(MemmcError, match="stays on the cluster") as caught:
        run_job(ray, "memmc-c-report", ["die"], ReportResult, Listener())
    assert CANARY not in str(caught.value)


def test_a_job_is_stopped_at_its_deadline_and_by_whoever_knows_its_name(ray):
    def end():
        while not ended:
            time.sleep(2)
            ended.extend([1] * stop_jobs(ray, "memmc-e-"))

    with pytest.raises(DeadlineError), time_limit(15 / 60):
        run_job(ray, "memmc-d-report", ["forever"], ReportResult, Listener())
    _await_stopped(ray, "memmc-d-report-1")

    ended = []
    threading.Thread(target=end).start()
    with pytest.raises(MemmcError, match="stopped on the cluster"):
        run_job(ray, "memmc-e-report", ["forever"], ReportResult, Listener())
    assert ended == [1]
    assert stop_jobs(ray, "memmc-e-") == 0


def test_a_cluster_that_is_not_there_or_refuses_the_token_is_named(ray):
    with pytest.raises(StorageError, match=r"ray\.address"):
        run_job(RayConfig(address="http://127.0.0.1:9"), "memmc-f", ["succeed"], ReportResult, Listener())
    code = (
        "import sys; from memmc.config import RayConfig; from memmc.errors import ConfigError\n"
        "from memmc.pipeline.cluster_job import stop_jobs\n"
        "try:\n    stop_jobs(RayConfig(address=sys.argv[1]), 'memmc-')\n"
        "except ConfigError as error:\n    print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN_PATH"}
    command = [sys.executable, "-c", code, ray.address]
    done = subprocess.run(
        command, env=environment | {"RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True, timeout=120, check=True
    )
    assert "refuses the token" in done.stdout


def _jobs(ray, prefix):
    return sorted(job for job in _Client(ray).jobs() if job.startswith(prefix))


def _await_stopped(ray, job):
    end = time.monotonic() + 60
    while _Client(ray).status(job) != "STOPPED":
        assert time.monotonic() < end, "the job goes on"
        time.sleep(1)
