"""A proxy before a real S3 server that fails as it is told: refuses, resets, hangs, cuts bodies, flips bits, kills.

Every request gets a number, from 1; `FaultProxy.plan` says by number, method and path what becomes of it.

As a process of its own (``python s3_fault_proxy.py BACKEND``) it prints its URI, and takes its plan by
``POST /_plan {"fault": "kill", "at": 3, "victim": 4711}``.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["pass", "503", "403", "reset", "lost", "hang", "truncate", "flip", "kill", "kill after"]
Plan = Callable[[int, str, str], Fault]

_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>x</Message><RequestId>1</RequestId></Error>'
_CODES = {"503": "SlowDown", "403": "AccessDenied"}
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class FaultProxy:
    """Listens on a port of its own while the `with` body runs.

    Attributes:
        plan: what to do with a request; pass it on by default.
        seen: (method, path) of every request so far.
        victim: process to kill on "kill" (before the request reaches the server) and "kill after" (before its answer).
    """

    def __init__(self, backend: str) -> None:
        self.backend = urlsplit(backend)
        self.plan: Plan = lambda number, method, path: "pass"
        self.seen: list[tuple[str, str]] = []
        self.victim: int | None = None
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.proxy = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def reset(self, plan: Plan, victim: int | None = None) -> None:
        """Begin to count anew, under another plan."""
        with self._lock:
            self.plan, self.victim = plan, victim
            self.seen = []

    def fault(self, method: str, path: str) -> Fault:
        with self._lock:
            self.seen.append((method, path))
            return self.plan(len(self.seen), method, path)

    def kill(self) -> None:
        if self.victim is not None:
            os.kill(self.victim, signal.SIGKILL)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/_plan":
            seen, told = len(proxy.seen), json.loads(body)
            proxy.reset(lambda number, *_: told["fault"] if number == told["at"] else "pass", told.get("victim"))
            self._send(200, {}, json.dumps({"seen": seen}).encode())
            return
        fault = proxy.fault(self.command, self.path)
        if fault == "kill":
            proxy.kill()
        elif fault == "hang":
            proxy.released.wait(120)
        if fault in {"kill", "hang"}:
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault in _CODES:
            self._send(int(fault), {"Content-Type": "application/xml"}, _ERROR.format(code=_CODES[fault]).encode())
        else:
            if fault == "flip" and self.command == "PUT" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            status, headers, answer = self._forward(proxy, body)
            if fault == "kill after":
                proxy.kill()
            if fault in {"kill after", "lost"}:
                self._reset()
            elif fault == "truncate":
                self._send(status, headers, answer, sent=len(answer) // 2)
            elif fault == "flip" and self.command == "GET" and answer:
                middle = len(answer) // 2
                self._send(status, headers, answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :])
            else:
                self._send(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _forward(self, proxy: FaultProxy, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(proxy.backend.hostname or "", proxy.backend.port, timeout=60)
        try:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in {"connection", "expect"}
            }
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
        try:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body if sent is None else body[:sent])
            if sent is not None and sent < len(body):
                self.wfile.flush()
                self._reset()
        except OSError:  # the client has gone, killed or out of patience
            self.close_connection = True

    def _reset(self) -> None:
        """End the connection with a reset instead of a goodbye."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = self.rfile = open(os.devnull, "rb+")  # noqa: SIM115, PTH123 - what the base class would flush

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with FaultProxy(sys.argv[1]) as running:
        print(running.uri, flush=True)
        threading.Event().wait()
