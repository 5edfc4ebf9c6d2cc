import contextlib
import errno
import os
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from memmc import s3
from memmc.errors import StorageError, UsageError
from memmc.lake import storage as module
from memmc.lake.storage import Storage


def test_write_read_list_delete(tmp_path):
    storage = Storage.open(tmp_path / "lake")
    storage.write("a/b.bin", b"one")
    storage.write("a/b.bin", b"two")
    storage.write("c.bin", b"")
    assert storage.read("a/b.bin") == b"two"
    assert storage.list() == ["a/b.bin", "c.bin"]
    assert storage.list("a") == ["a/b.bin"]
    assert storage.exists("c.bin") and not storage.exists("a")
    storage.delete("c.bin")
    storage.delete("c.bin")
    assert storage.list() == ["a/b.bin"]
    assert storage.local_path("a/b.bin") == tmp_path / "lake/a/b.bin"
    assert oct((tmp_path / "lake").stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("rel", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "./a", "a//b"])
def test_names_cannot_leave_the_root(tmp_path, rel):
    storage = Storage.open(tmp_path)
    for call in (storage.read, storage.exists, storage.delete, storage.join):
        with pytest.raises(StorageError, match="leaves its root"):
            call(rel)
    with pytest.raises(StorageError, match="leaves its root"):
        Storage.open("s3://bucket/prefix").join(rel)


def test_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage.open("lake").uri == str(tmp_path / "lake")
    assert Storage.open("file:///a%20b/c").uri == "/a b/c"
    assert Storage.open("s3://bucket/x/y/").uri == "s3://bucket/x/y"
    assert Storage.open("s3://bucket").join("k") == "s3://bucket/k"
    assert Storage.open("s3://bucket/x").local_path("y") is None


@pytest.mark.parametrize(
    "uri", ["", "http://169.254.169.254/x", "s3://", "s3://b/../c", "s3://k@b/c", "file://host/x", "gs://b"]
)
def test_other_places_are_refused(uri):
    with pytest.raises(UsageError):
        Storage.open(uri)


def test_create_has_one_winner(tmp_path):
    storage = pickle.loads(pickle.dumps(Storage.open(tmp_path)))
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def race(index: int) -> None:
        barrier.wait()
        if storage.create("once", str(index).encode()):
            wins.append(index)

    threads = [threading.Thread(target=race, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert storage.read("once") == str(wins[0]).encode()
    assert storage.list() == ["once"]
    storage.probe_conditional_put()
    assert storage.list() == ["once"]


def test_probe_refuses_a_store_that_overwrites(tmp_path, monkeypatch):
    def careless(self: Storage, rel: str, data: bytes) -> bool:
        self.write(rel, data)
        return True

    monkeypatch.setattr(Storage, "create", careless)
    with pytest.raises(StorageError, match="If-None-Match"):
        Storage.open(tmp_path).probe_conditional_put()


def test_probe_knows_its_own_write_after_a_lost_answer(tmp_path, monkeypatch):
    real, lost = Storage.create, [True]

    def create(self: Storage, rel: str, data: bytes) -> bool:
        return real(self, rel, data) and not (lost and lost.pop())

    monkeypatch.setattr(Storage, "create", create)
    Storage.open(tmp_path).probe_conditional_put()
    assert not lost


class Bucket(BaseHTTPRequestHandler):
    """Answers every GET; drips where the key says so."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.clients.add(self.client_address)  # type: ignore[attr-defined]
        body = b"x" * 3000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "drip" not in self.path:
            self.wfile.write(body[:1000])
            self.wfile.flush()
            self.wfile.write(body[1000 : 2000 if "cut" in self.path else 3000])
            self.close_connection = "cut" in self.path
            return
        with contextlib.suppress(OSError):
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.clients = set()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr(s3, "RETRY_BUDGET_S", 0.2)
    yield server
    server.shutdown()
    server.server_close()


def test_a_body_that_drips_is_given_up(bucket, monkeypatch):
    storage = Storage.open("s3://b/p")
    assert [storage.read("a"), storage.read_range("b", 0, 5)[0]] == [b"x" * 3000, b"xxxxx"]
    assert len(bucket.clients) == 1  # one connection for both
    with pytest.raises(StorageError, match="no answer"):
        storage.read("cut")
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(StorageError, match="no answer"):
        storage.read("drip")
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_bytes(tmp_path, monkeypatch, step):
    storage = Storage.open(tmp_path)
    storage.write("x", b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((module.os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(StorageError, match="free space") as caught:
        storage.write("x", b"new")
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.undo()
    assert storage.read("x") == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_absent_object(tmp_path):
    with pytest.raises(StorageError, match="check the URI"):
        Storage.open(tmp_path).read("nothing")


def test_delta_options_follow_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    options = Storage.open("s3://bucket").delta_options()
    assert options["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert options["AWS_ALLOW_HTTP"] == "true"
    assert options["conditional_put"] == "etag"
    assert options["AWS_ACCESS_KEY_ID"] == "key"
    assert os.environ.pop("AWS_REQUEST_CHECKSUM_CALCULATION") == "when_required"
    assert Storage.open("lake").delta_options() == {}
