import json
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from small_authority import LOOPBACK, NOW, Authority

from memmc.errors import ConfigError, StorageError
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


@pytest.fixture
def guarded(tmp_path):
    """A server behind a proxy that wants a header, with a certificate of the hospital's own authority."""

    class Guarded(Answers):
        def _answer(self, content):
            guest = self.headers.get("X-Proxy") == "let me in"
            super()._answer(content) if guest else self.send_error(403)

    ours = Authority(tmp_path / "ours")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    context = ours.server(LOOPBACK, NOW + timedelta(days=1))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}/api", str(ours.file)
    server.shutdown()
    server.server_close()


def test_prefects_own_client_settings_are_used(guarded):
    url, certificates = guarded
    known = {"PREFECT_API_AUTH_STRING": "memmc:secret", "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Proxy": "let me in"}'}
    trusting = known | {"PREFECT_API_SSL_CERT_FILE": certificates}
    assert look_at_server(url, trusting).workers == 2
    assert look_at_server(url, known | {"PREFECT_API_TLS_INSECURE_SKIP_VERIFY": "true"}).workers == 2
    for env in (known, trusting | {"PREFECT_CLIENT_CUSTOM_HEADERS": "{}"}):
        with pytest.raises(StorageError, match="PREFECT_API_URL"):
            look_at_server(url, env)
    for wrong in ({"PREFECT_API_SSL_CERT_FILE": "/absent.pem"}, {"PREFECT_CLIENT_CUSTOM_HEADERS": "X-Proxy: x"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            look_at_server(url, trusting | wrong)


def test_a_server_that_refuses_or_is_not_there_is_named(url):
    for place, env in ((url, {}), (url, {"PREFECT_API_KEY": "other"}), ("http://127.0.0.1:9/api", {}), ("no url", {})):
        with pytest.raises(StorageError, match="PREFECT_API_URL") as caught:
            look_at_server(place, env)
        assert "other" not in str(caught.value)
