import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from memmc.errors import StorageError
from memmc.pipeline.prefect_server import PrefectServer, look_at_server


@pytest.mark.parametrize(
    ("workers", "postgres", "fine"), [(0, False, True), (2, False, True), (3, False, False), (30, True, True)]
)
def test_sqlite_bears_two_workers(workers, postgres, fine):
    assert (PrefectServer(workers, postgres).fix() == "") is fine


class Answers(BaseHTTPRequestHandler):
    """The parts of Prefect 3.8's answers that are read."""

    settings: ClassVar = {"server": {"database": {"connection_url": "**********", "driver": "postgresql+asyncpg"}}}
    workers: ClassVar = [{"name": "a", "status": "ONLINE"}, {"name": "b", "status": "OFFLINE"}]

    def do_GET(self):
        self._answer({"token": "t"} if self.path.startswith("/api/csrf-token?client=") else self.settings)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(self.workers if self.path.endswith("/workers/filter") else [{"name": "p"}, {"name": "q"}])

    def _answer(self, content):
        authorised = self.headers.get("Authorization") == "Basic bWVtbWM6c2VjcmV0"
        authorised &= self.command == "GET" or self.headers.get("Prefect-Csrf-Token") == "t"
        self.send_response(200 if authorised else 401)
        self.end_headers()
        self.wfile.write(json.dumps(content if authorised else {}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()


def test_workers_that_beat_are_counted_over_all_pools_and_the_driver_is_seen(url):
    assert look_at_server(url, {"PREFECT_API_AUTH_STRING": "memmc:secret"}) == PrefectServer(2, True)


def test_a_server_that_refuses_or_is_not_there_is_named(url):
    for place, env in ((url, {}), (url, {"PREFECT_API_KEY": "other"}), ("http://127.0.0.1:9/api", {}), ("no url", {})):
        with pytest.raises(StorageError, match="PREFECT_API_URL") as caught:
            look_at_server(place, env)
        assert "other" not in str(caught.value)
