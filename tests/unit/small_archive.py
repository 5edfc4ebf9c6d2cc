"""A server of a few answers: what real archives do rarely and a test must see always. Real ones: tests/integration."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

Answer = tuple[int, bytes, str]
JSON = "application/json"


@dataclass
class Site:
    """What a server says, what it does wrong, and what it was asked.

    Attributes:
        routes: path and query -> answer.
        takes: path, body and content type of a POST -> answer.
        faults: path, of a POST "POST path" -> what to do instead, one per request: a status, "cut", "hang" or "drip".
    """

    routes: Callable[[str, dict[str, str]], Answer]
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    takes: Callable[[str, bytes, str], Answer] | None = None
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def served(site: Site, tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            site.asked.append((parts.path, dict(self.headers)))
            faults = site.faults.get(parts.path, [])
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                self.reply(fault, b"", JSON)
            elif fault == "hang":
                site.closing.wait(20)
            else:
                self.reply(*site.routes(parts.path, dict(parse_qsl(parts.query))), fault=fault)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = urlsplit(self.path)
            site.asked.append((parts.path, dict(self.headers)))
            faults = site.faults.get(f"POST {parts.path}", [])
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                self.reply(fault, b"", JSON)
            else:
                assert site.takes is not None
                self.reply(*site.takes(parts.path, body, self.headers["Content-Type"]))

        def reply(self, status: int, body: bytes, kind: str, fault: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if 300 <= status < 400:
                self.send_header("Location", f"{site.url}/elsewhere")
            self.end_headers()
            if fault == "drip":
                for byte in body:
                    if site.closing.wait(0.05):
                        return
                    self.wfile.write(bytes([byte]))
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            if fault == "cut":
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that gave up

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    site.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def name(kind: str, number: int) -> str:
    """An identifier as Orthanc makes them."""
    digits = hashlib.sha1(f"{kind} {number}".encode()).hexdigest()
    return "-".join(digits[start : start + 8] for start in range(0, 40, 8))


@dataclass
class Orthanc:
    """The part of an Orthanc's REST interface that is used here; instance n belongs to study n // `per_study`."""

    per_study: int = 2
    now: datetime = datetime(2026, 1, 1, 12)
    files: dict[int, bytes] = field(default_factory=dict)
    attachments: dict[int, str] = field(default_factory=dict)
    changes: list[tuple[int, str, int, datetime]] = field(default_factory=list)
    updated: dict[int, datetime] = field(default_factory=dict)

    def receive(self, number: int, data: bytes) -> None:
        study = number // self.per_study
        self.files[number], self.attachments[number] = data, f"attachment {len(self.changes)}"
        for kind, entry in (("NewInstance", number), ("NewSeries", study)):
            self.changes.append((self.last + 1, kind, entry, self.now))
        self.updated[study] = self.now

    def delete(self, number: int) -> None:
        del self.files[number]
        self.changes = [item for item in self.changes if item[1:3] != ("NewInstance", number)]

    @property
    def last(self) -> int:
        return self.changes[-1][0] if self.changes else 0

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def routes(self, path: str, query: dict[str, str]) -> Answer:
        answer = self._json(path, query)
        if path.endswith("/file"):
            number = self._number("instances", path)
            return (200, self.files[number], "application/dicom") if number in self.files else (404, b"{}", JSON)
        if path == "/tools/now":
            return 200, self.now.strftime("%Y%m%dT%H%M%S").encode(), "text/plain"
        return (404, b"{}", JSON) if answer is None else (200, json.dumps(answer).encode(), JSON)

    def _json(self, path: str, query: dict[str, str]) -> object:
        if path == "/system":
            return {"ApiVersion": 16, "Version": "1.10.1"}
        if path == "/changes":
            since, limit = int(query["since"]), int(query["limit"])
            later = [item for item in self.changes if item[0] > since]
            page = later[:limit]
            return {
                "Changes": [
                    {
                        "Seq": seq,
                        "ChangeType": kind,
                        "ID": name("instances" if kind == "NewInstance" else "series", entry),
                        "Date": when.strftime("%Y%m%dT%H%M%S"),
                    }
                    for seq, kind, entry, when in page
                ],
                "Last": page[-1][0] if page else since,
                "Done": len(page) == len(later),
            }
        kind = path.split("/")[1]
        number = self._number(kind, path)
        if number is None:
            return None
        if kind == "instances" and number in self.files:
            data = self.files[number]
            if path.endswith("/attachments/dicom/info"):
                return {"Uuid": self.attachments[number], "UncompressedMD5": hashlib.md5(data).hexdigest()}
            return {
                "FileSize": len(data),
                "FileUuid": self.attachments[number],
                "ParentSeries": name("series", number // self.per_study),
                "MainDicomTags": {"SOPInstanceUID": "1.2.3"},
            }
        if kind == "series":
            return {"ParentStudy": name("studies", number), "MainDicomTags": {"Modality": "DX"}}
        if kind == "studies":
            when = self.updated[number].strftime("%Y%m%dT%H%M%S")
            return {"LastUpdate": when, "PatientMainDicomTags": {"PatientName": "DOE^JANE"}}
        return None

    def _number(self, kind: str, path: str) -> int | None:
        known = range(max([*self.files, *self.updated, 0]) + 2)
        return next((number for number in known if name(kind, number) == path.split("/")[2]), None)


def slow(seconds: float, limit: float, call: Callable[[], object]) -> float:
    """Time a call that must take about `seconds` and less than `limit`."""
    begun = time.monotonic()
    call()
    taken = time.monotonic() - begun
    assert seconds * 0.8 <= taken < limit, taken
    return taken
