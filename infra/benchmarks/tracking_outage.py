"""A real MLflow server that hangs, is killed and comes back, under a run that goes on logging.

Printed: how long the server did not answer, the longest call that logs, and how many values were logged and are there.

::

    python infra/benchmarks/tracking_outage.py                  # five minutes
    python infra/benchmarks/tracking_outage.py --seconds 10
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from memmc.config import TrackingConfig
from memmc.registry.tracking import Tracking, open_tracking

LONGEST_CALL_S = 5.0
_EVERY_S = 0.05


class MlflowServer:
    """`mlflow server` on a store of its own, that may be killed and started again on it."""

    def __init__(
        self,
        folder: Path,
        store: str | None = None,
        artifacts: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Choose a port.

        Args:
            folder: of the store and the artifacts, where no other place is given.
            store: URI of the database; SQLite in the folder when absent.
            artifacts: URI of the artifacts.
            environment: set for the server alone, such as credentials of the artifacts.
        """
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._folder, self._environment = folder, environment or {}
        self._store = store or f"sqlite:///{folder}/server.db"
        self._artifacts = artifacts or str(folder / "artifacts")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, meanwhile: Callable[[], None] = lambda: time.sleep(0.3), timeout_s: float = 400) -> None:
        """Start, and call `meanwhile` until it answers."""
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "GIT_PYTHON_REFRESH": "quiet"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
        places = ["--backend-store-uri", self._store, "--artifacts-destination", self._artifacts]
        where = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *places, *where],
            cwd=self._folder,
            env=inherited | quiet | self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + timeout_s
        while not self.answers():
            assert self._process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server did not answer"
            meanwhile()

    def answers(self) -> bool:
        """Say whether it is up."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        """Send a signal to the server with its children."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self._process.wait(30)


class Logging:
    """A run that logs one value at a time and remembers the longest call."""

    def __init__(self, tracking: Tracking, run: str) -> None:
        """Begin at step 0."""
        self.tracking, self.run = tracking, run
        self.logged, self.longest_s = 0, 0.0

    def once(self) -> None:
        """Log the next step."""
        began = time.monotonic()
        self.tracking.log_metrics(self.run, [(self.logged, {"loss": 1.0 / (self.logged + 1)})])
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        self.logged += 1
        time.sleep(_EVERY_S)

    def during(self, seconds: float) -> None:
        """Log for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.once()


def outage(server: MlflowServer, home: Path, seconds: float) -> dict[str, float]:
    """Log through a hang and a death of the server, with another process that logs and dies meanwhile."""
    tracking = open_tracking(TrackingConfig(uri=server.url), home)
    logging = Logging(tracking, tracking.start_run("memmc/outage", "goes-on"))
    other = open_tracking(TrackingConfig(uri=server.url), home)
    orphan = other.start_run("memmc/outage", "dies")
    logging.during(2)
    server.signal(signal.SIGSTOP)
    logging.during(min(seconds, 10))
    server.signal(signal.SIGCONT)
    logging.during(2)
    began = time.monotonic()
    server.kill()
    process = multiprocessing.get_context("fork").Process(target=_log_and_die, args=(other, orphan))
    process.start()
    with tempfile.TemporaryDirectory() as folder:  # gone long before the server is back
        (Path(folder) / "report.html").write_text("ok")
        tracking.log_artifact(logging.run, Path(folder) / "report.html", "reports")
    logging.during(seconds)
    server.start(logging.once)
    down = time.monotonic() - began
    process.join()
    logging.during(2)
    tracking.end_run(logging.run)
    replayed = open_tracking(TrackingConfig(uri=server.url), home).replay()
    steps = [step for step, _ in tracking.metric_history(logging.run, "loss")]
    assert steps == sorted(set(steps))
    return {
        "down_s": round(down, 1),
        "longest_call_s": round(logging.longest_s, 3),
        "logged": logging.logged,
        "there": len(steps),
        "artifacts": len(tracking.client.list_artifacts(logging.run, "reports")),
        "ended": float(tracking.client.get_run(logging.run).info.status == "FINISHED"),
        "orphaned": 50,
        "replayed": replayed,
        "there_of_orphan": len(tracking.metric_history(orphan, "loss")),
        "waiting": tracking.waiting,
        "lost": tracking.lost,
    }


def passed(found: dict[str, float]) -> bool:
    """Say whether nothing is lost and nobody waited."""
    return (
        found["there"] == found["logged"]
        and found["there_of_orphan"] == found["replayed"] == found["orphaned"]
        and found["artifacts"] == found["ended"] == 1
        and found["waiting"] == found["lost"] == 0
        and found["longest_call_s"] <= LONGEST_CALL_S
    )


def _log_and_die(tracking: Tracking, run: str) -> None:
    for step in range(50):
        tracking.log_metrics(run, [(step, {"loss": 1.0})])
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long the server stays away")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(Path(folder))
        try:
            server.start()
            found = outage(server, Path(folder) / ".memmc", arguments.seconds)
        finally:
            server.kill()
    print(json.dumps(found))
    return 0 if passed(found) else 1


if __name__ == "__main__":
    sys.exit(main())
