"""A proxy before a real S3 server that fails as it is told: refuses, resets, hangs, cuts bodies, flips bits, kills.

A process of its own (`fault_proxy`), since a client that waits in native code may not let other threads of its process
answer. Every request gets a number, from 1; the plan says which of them meet the fault:

    {"fault": "503", "at": 3}              the third one
    {"fault": "reset", "share": 0.4}       four of ten, by a seeded chance
    {"fault": "truncate", "method": "GET", "path": ".parquet", "first": 2}    the first two such ones
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("pass", "503", "403", "reset", "lost", "hang", "truncate", "flip", "kill", "kill after")
"""`lost`: done by the server, its answer never comes. `kill` and `kill after` end the process `victim`, before the
server has the request and when it has done it."""

HANG_S = 60.0
_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>x</Message><RequestId>1</RequestId></Error>'
_CODES = {"503": "SlowDown", "403": "AccessDenied"}
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


@dataclass(frozen=True)
class FaultProxy:
    """A running proxy, at `uri`."""

    uri: str

    def plan(self, fault: str = "pass", **which: Any) -> int:
        """Count anew under another plan; return how many requests met the fault of the last one."""
        assert fault in FAULTS
        body = json.dumps({"fault": fault, **which}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.uri}/_plan", body, method="POST")) as answer:
            return int(json.load(answer)["met"])


@contextmanager
def fault_proxy(backend: str) -> Iterator[FaultProxy]:
    """Run a proxy before a server while the body runs."""
    process = subprocess.Popen([sys.executable, str(Path(__file__)), backend], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield FaultProxy(process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait(20)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = urlsplit(backend)
        self._lock = threading.Lock()
        self.begin({"fault": "pass"})

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that die or give up are what this is for."""

    def begin(self, told: dict[str, Any]) -> int:
        with self._lock:
            met = getattr(self, "_met", 0)
            self.told, self._number, self._met = told, 0, 0
            self._chance = random.Random(1)
            return met

    def fault(self, method: str, path: str) -> str:
        told = self.told
        with self._lock:
            if told.get("method", method) != method or told.get("path", "") not in path:
                return "pass"
            self._number += 1
            met = (
                told.get("at", self._number) == self._number
                and self._number <= told.get("first", self._number)
                and self._chance.random() < told.get("share", 1.0)
            )
            self._met += met
            return str(told["fault"]) if met else "pass"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/_plan":
            self._send(200, {}, json.dumps({"met": self.server.begin(json.loads(body))}).encode())
            return
        fault = self.server.fault(self.command, self.path)
        if fault in {"kill", "hang"}:
            self.close_connection = True
            if fault == "kill":
                self._kill()
            else:
                threading.Event().wait(HANG_S)
        elif fault == "reset":
            self._reset()
        elif fault in _CODES:
            self._send(int(fault), {"Content-Type": "application/xml"}, _ERROR.format(code=_CODES[fault]).encode())
        else:
            self._pass_on(fault, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _pass_on(self, fault: str, body: bytes) -> None:
        if fault == "flip" and self.command == "PUT" and body:
            body = _flipped(body)
        status, headers, answer = self._forward(body)
        if fault == "kill after":
            self._kill()
        if fault in {"kill after", "lost"}:
            self._reset()
        elif fault == "truncate":
            self._send(status, headers, answer, sent=len(answer) // 2)
        elif fault == "flip" and self.command == "GET":
            self._send(status, headers, _flipped(answer))
        else:
            self._send(status, headers, answer)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(
            self.server.backend.hostname or "", self.server.backend.port, timeout=60
        )
        try:
            gone = {"connection", "expect"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in gone}
            connection.request(self.command, self.path, body=body or None, headers=headers)
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            length = answer.getheader("Content-Length")
            if self.command == "HEAD" and length is not None:
                kept["Content-Length"] = length
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
        with contextlib.suppress(OSError):  # the client has gone, killed or out of patience
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body if sent is None else body[:sent])
            if sent is not None and sent < len(body):
                self._reset()
            return
        self.close_connection = True

    def _kill(self) -> None:
        os.kill(int(self.server.told["victim"]), signal.SIGKILL)

    def _reset(self) -> None:
        """End the connection with a reset instead of a goodbye."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


if __name__ == "__main__":
    with _Server(sys.argv[1]) as running:
        print(f"http://127.0.0.1:{running.server_port}", flush=True)
        running.serve_forever()
