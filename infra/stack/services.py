"""The services of a stack: how each is started, how it is known to be well, how it is stopped. Loopback only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
POOL = "memmc-process"
_STOP_S = 20.0
_STARTS = 3


class StackError(RuntimeError):
    """Something of the stack did not come up, or a run in it failed."""


@dataclass(frozen=True)
class Service:
    """One process, with those it starts.

    Attributes:
        well: answers whether it does its work; called until it does.
        ports: by the name in their variable; they must be free before the start.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    well: Callable[[], bool]
    ports: Mapping[str, int] = field(default_factory=dict[str, int])


def ask(url: str, headers: Mapping[str, str] | None = None, body: Any = None) -> Any:
    """Return what a server of the stack answers, as JSON or text; None while it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, urllib.error.HTTPError):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def basic(user: str, password: str) -> dict[str, str]:
    """Return the header of HTTP Basic authentication."""
    return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}


def python(module: str, *arguments: str) -> list[str]:
    """Return the command of a module in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


class Keeper:
    """Starts and stops services, and remembers them in a file across calls."""

    def __init__(self, folder: Path) -> None:
        self._file, self._logs = folder / "processes.json", folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, list[float]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def start(self, service: Service) -> bool:
        """Start a service unless it runs; say whether it was started.

        Raises:
            StackError: its port is taken by somebody else.
        """
        if self.process(service.name) is not None:
            return False
        for name, port in service.ports.items():
            if _listening(port):
                variable = f"MEMMC_STACK_{name.upper()}_PORT"
                raise StackError(f"port {port} is taken by another program; set {variable} to a free one")
        with self.log(service.name).open("ab") as log:
            process = subprocess.Popen(
                service.command, env=service.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._known[service.name] = [process.pid, psutil.Process(process.pid).create_time()]
        self._write()
        return True

    def wait(self, service: Service, timeout_s: float = 240.0) -> None:
        """Return when a service does its work; one that ends meanwhile is started again, `_STARTS` times in all.

        Ray gives a node 30 s to come up, which a busy machine may not do.

        Raises:
            StackError: it ended again, or took too long; the end of its log says why.
        """
        end, starts = time.monotonic() + timeout_s, 1
        while time.monotonic() < end:
            if service.well():
                return
            if self.process(service.name) is None:
                if starts == _STARTS:
                    break
                self.start(service)
                starts += 1
            time.sleep(0.5)
        tail = self.log(service.name).read_text(errors="replace").splitlines()[-12:]
        raise StackError(f"{service.name} is not up; {self.log(service.name)} ends with:\n" + "\n".join(tail))

    def stop(self, name: str) -> bool:
        """Stop a service and all it started; say whether it ran."""
        found = self.process(name)
        if found is not None:
            family = [found, *found.children(recursive=True)]
            found.terminate()
            psutil.wait_procs([found], _STOP_S)
            left = [process for process in family if process.is_running()]
            for process in left:
                process.kill()
            psutil.wait_procs(left, _STOP_S)
        if self._known.pop(name, None) is not None:
            self._write()
        return found is not None

    def process(self, name: str) -> psutil.Process | None:
        """Return the running process of a service; a later process of the same number is not it."""
        number, began = self._known.get(name, (0, 0.0))
        try:
            found = psutil.Process(int(number))
            alive = found.create_time() == began and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return found if alive else None

    def log(self, name: str) -> Path:
        """Where a service writes."""
        return self._logs / f"{name}.log"

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._known))


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((HOST, port)) == 0


def port_of(name: str, default: int) -> int:
    """Return a port from MEMMC_STACK_<NAME>_PORT."""
    return int(os.environ.get(f"MEMMC_STACK_{name}_PORT", default))
