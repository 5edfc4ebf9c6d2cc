"""A Prefect server and a process worker with deployments of the flows; each can be killed and come back."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

AUTOMATIONS = Path(__file__).parents[2] / "infra" / "automations.yaml"
POOL = "faults"
_BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Return the first true value; fail when there is none in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


class RayHead:
    """A Ray cluster of one machine with ports of its own, and so with a Jobs API that works beside other clusters.

    Attributes:
        url: of the Jobs API.
        address: of the cluster itself.
        environment: of whoever joins it.
    """

    def __init__(self, folder: Path, num_cpus: int) -> None:
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            token = folder / "token"
            token.write_text(secrets.token_hex(32))
            token.chmod(0o600)
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        port, dashboard, agent = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        self._sessions = tempfile.mkdtemp(prefix="memmc-")  # a short path, for Ray's sockets
        self.address, self._log, self._nodes = f"127.0.0.1:{port}", folder / "ray.log", list[subprocess.Popen[bytes]]()
        words = ["--head", f"--temp-dir={self._sessions}", f"--port={port}", f"--dashboard-port={dashboard}"]
        self._start(num_cpus, *words, f"--dashboard-agent-listen-port={agent}")
        until(self._answers, 180, "the Jobs API answers")

    def add_node(self, num_cpus: int) -> subprocess.Popen[bytes]:
        """Start another node, and wait until the cluster counts it."""
        node = self._start(num_cpus, f"--address={self.address}", f"--dashboard-agent-listen-port={free_port()}")
        until(lambda: self._alive() == len(self._nodes), 60, "the node has joined")
        return node

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """Kill -9 a node and everything it runs, as when its machine loses power."""
        self._nodes.remove(node)
        below = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
        for process in [node, *below]:
            process.kill()
        node.wait()

    def stop(self) -> None:
        """End every process of the cluster, and remove what it kept."""
        for node in reversed(self._nodes.copy()):
            self.kill_node(node)
        shutil.rmtree(self._sessions, ignore_errors=True)

    def _start(self, num_cpus: int, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={num_cpus}", *words]
        with self._log.open("ab") as out:
            node = subprocess.Popen(
                [*command, "--node-ip-address=127.0.0.1"],
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._nodes.append(node)
        return node

    def _answers(self) -> bool:
        assert self._nodes[0].poll() is None, "ray start has ended"
        return self._ask("/api/version") is not None

    def _alive(self) -> int:
        summary = (self._ask("/nodes?view=summary") or {}).get("data", {}).get("summary", [])
        return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary)

    def _ask(self, path: str) -> Any:
        """Return what the dashboard answers; None when it does not."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return None


class Plant:
    """The server and the worker of one test.

    Attributes:
        environment: of the worker, and of whoever speaks to the server.
    """

    def __init__(self, folder: Path, directory: Path, settings: Mapping[str, str]) -> None:
        self.folder, self.directory = folder, directory
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MEMMC_"))}
        self.environment = {
            **kept,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            **settings,
        }
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None

    def start_server(self) -> None:
        command = ["server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        self.server = self._start(command, "server.log")
        until(self._healthy, 180, "the server answers")

    def start_worker(self) -> None:
        self.worker = self._start(["worker", "start", "--pool", POOL, "--type", "process"], "worker.log")

    def kill(self, process: subprocess.Popen[bytes] | None) -> None:
        """Kill -9 a process and the Prefect processes below it; what those have started is left to itself."""
        if process is None:
            return
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for each in [process, *(child for child in below if "prefect" in " ".join(_command_of(child)))]:
            each.kill()
        process.wait()

    def stop(self) -> None:
        """End both, politely at first."""
        for process in (self.worker, self.server):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    self.kill(process)

    def deploy(self, client: Any, flow: Any, entrypoint: str, tags: list[str], name: str = "faults") -> Any:
        """Deploy a flow that is installed where the worker runs; return the deployment's id."""
        return client.create_deployment(
            flow_id=client.create_flow(flow),
            name=name,
            work_pool_name=POOL,
            tags=tags,
            entrypoint=entrypoint,
            job_variables={"working_dir": str(self.directory), "env": self.environment},
        )

    def apply_automations(self) -> None:
        """Bring the project's own automations to the server, those of heartbeats alone."""
        names = {"memmc-crash-zombies", "memmc-resume-crashed"}
        found = [each for each in yaml.safe_load(AUTOMATIONS.read_text())["automations"] if each["name"] in names]
        assert len(found) == len(names)
        file = self.folder / "automations.yaml"
        file.write_text(yaml.safe_dump({"automations": found}))
        self.prefect("automation", "create", "--from-file", str(file))

    def prefect(self, *words: str) -> str:
        """Run Prefect's command line against the server."""
        command = [str(_BIN / "prefect"), *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def memmc(self, *words: str, **settings: str) -> subprocess.Popen[str]:
        """Start our own command line where the worker works; stderr, where Prefect writes too, goes to a file."""
        with (self.folder / "memmc.log").open("ab") as log:
            return subprocess.Popen(
                [str(_BIN / "memmc"), *words],
                cwd=self.directory,
                env=self.environment | settings,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _healthy(self) -> bool:
        assert self.server is not None and self.server.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def _start(self, words: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(
                [str(_BIN / "prefect"), *words],
                cwd=self.directory,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
