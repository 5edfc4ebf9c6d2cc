"""The lake and the S3 source over real HTTP."""

import base64
import hashlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from memmc import s3
from memmc.errors import IdentityKeyError, IntegrityError, StorageError
from memmc.lake.audit import append, read_head, record_name
from memmc.lake.audit_check import verify_chain
from memmc.lake.schemas import INSTANCES
from memmc.lake.storage import Storage
from memmc.lake.stream import pixels_to_array
from memmc.lake.tables import Lake
from memmc.sources import folder_s3
from memmc.sources.folder_s3 import FetchFailed, fetch, list_objects

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("KEY_ID", "REQUEST_CHECKSUM_CALCULATION", "RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.fixture(scope="module")
def moto():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from moto.server import main; main(sys.argv[1:])"
    arguments = [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            pytest.fail("the S3 server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def bucket(moto, environment, request):
    environment.setenv("AWS_ENDPOINT_URL", moto)
    name = f"b{abs(hash(request.node.name)) % 10**9}"
    s3.client().create_bucket(Bucket=name)
    return name


def rows(start: int, num: int = 8) -> pa.Table:
    pixels = [np.full((4, 4), index, np.uint16).tobytes() for index in range(start, start + num)]
    keys = [f"{index:064x}" for index in range(start, start + num)]
    same = {
        "cohort": "a",
        "source_ref": "r",
        "outcome": "stored",
        "split": "train",
        "label": "normal",
        "ingest_run": "r",
    }
    sizes = {"height": 4, "width": 4, "channels": 1, "bits": 16}
    return pa.table(
        {
            **{name: [value] * num for name, value in same.items()},
            **{name: pa.array([value] * num, pa.int32()) for name, value in sizes.items()},
            "object_key": keys,
            "content_key": keys,
            "sop_instance_uid": [f"2.25.{index}" for index in range(start, start + num)],
            "size_bytes": [1] * num,
            "pixels": pa.array(pixels, pa.binary()),
            "ingested_at": [datetime.now(UTC)] * num,
        }
    )


def test_storage(bucket):
    storage = pickle.loads(pickle.dumps(Storage.open(f"s3://{bucket}/lake/")))
    storage.probe_conditional_put()
    assert storage.list() == []
    for index in range(3):
        storage.write(f"a/{index}", bytes([index]))
    assert storage.read("a/2") == b"\2" and storage.list("a") == ["a/0", "a/1", "a/2"] and storage.list("b") == []
    assert storage.exists("a/1") and not storage.exists("a")
    storage.delete("a/1")
    storage.delete("a/1")
    assert storage.list() == ["a/0", "a/2"]
    with pytest.raises(StorageError, match="nothing of this name"):
        storage.read("a/1")
    wins = []
    threads = [threading.Thread(target=lambda: wins.append(storage.create("once", b"x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 7 + [True]
    filesystem, root = storage.arrow_filesystem()
    with filesystem.open_input_stream(f"{root}/a/2") as file:
        assert file.read() == b"\2"
    with filesystem.open_output_stream(f"{root}/arrow") as file:
        file.write(b"exactly these bytes")
    assert storage.read("arrow") == b"exactly these bytes"
    with pytest.raises(StorageError, match="bucket does not exist"):
        Storage.open("s3://no-such-bucket-here").write("x", b"")


def test_tables(bucket):
    lake = Lake(f"s3://{bucket}/deep/lake")
    assert not lake.exists(INSTANCES)
    versions: list[int] = []

    def write(index: int) -> None:
        for step in range(3):
            versions.append(lake.append(INSTANCES, rows(100 * index + 10 * step), f"run-{index}-{step}"))

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(versions)) == 12
    assert lake.append(INSTANCES, rows(0), "run-0-0") in versions
    keys = lake.read(INSTANCES, ["object_key"])["object_key"].to_pylist()
    assert len(keys) == len(set(keys)) == 96
    assert lake.read(INSTANCES, ["object_key"], version=min(versions)).num_rows == 8
    stored = lake.read(
        INSTANCES, ["object_key", "pixels", "height", "width", "channels", "bits"], filter={"cohort": "a"}
    )
    expected = [int(key, 16) for key in stored["object_key"].to_pylist()]
    assert (pixels_to_array(stored)[:, 0, 0, 0] == expected).all()
    assert {entry["run"] for entry in lake.history(INSTANCES)} >= {"run-3-2", "run-0-0"}
    plain = DeltaTable(f"s3://{bucket}/deep/lake/{INSTANCES}", storage_options=lake.storage.delta_options())
    assert plain.to_pyarrow_table(columns=["cohort"]).num_rows == 96
    lake.check_key_id("k1")
    with pytest.raises(IdentityKeyError):
        lake.check_key_id("k2")


def test_the_audit_trail_is_one_chain(bucket):
    storage = Storage.open(f"s3://{bucket}/lake")
    failed: list[StorageError] = []

    def write(index: int) -> None:
        try:
            for step in range(10):
                append(storage, {"action": "score", "writer": index, "step": step})
        except StorageError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = verify_chain(storage)
    assert (failed, verdict.head.sequence, verdict.findings) == ([], 40, [])
    assert verdict.head == read_head(storage)
    storage.delete(record_name(40))
    assert [finding.sequence for finding in verify_chain(storage).findings] == [40]


def test_rot_on_the_server(bucket):
    lake = Lake(f"s3://{bucket}/lake")
    lake.append(INSTANCES, rows(0))
    file = lake.files(INSTANCES)[0]
    good = lake.storage.read(file.path)
    for position in range(4, len(good), max(1, len(good) // 25)):
        bad = bytearray(good)
        bad[position] ^= 16
        lake.storage.write(file.path, bytes(bad))
        with pytest.raises(IntegrityError, match=file.path):
            lake.read(INSTANCES, ["pixels", "bits"])


def test_source(bucket, monkeypatch):
    client = s3.client()
    names = ["in/a.dcm", "in/b//c", "in/ü #?.dcm", "in/.hidden", "input/no", "in/marker/", "in/../x"]
    for name in names:
        client.put_object(Bucket=bucket, Key=name, Body=b"" if name.endswith("/") else name.encode())
    monkeypatch.setattr(folder_s3, "S3_PAGE_KEYS", 7)
    for index in range(40):
        client.put_object(Bucket=bucket, Key=f"many/{index:05d}", Body=b"x")
    source = f"s3://{bucket}/in"
    objects = {obj.path: obj for obj in list_objects(source)}
    assert sorted(objects) == sorted(["a.dcm", "b//c", "ü #?.dcm", ".hidden", "../x"])
    assert list(list_objects(f"{source}/")) == list(objects.values())
    for path, obj in objects.items():
        assert fetch(source, obj, 100) == f"in/{path}".encode() and obj.size == len(f"in/{path}".encode())
    (one,) = list_objects(f"{source}/a.dcm")
    assert one.path == "a.dcm" and fetch(f"{source}/a.dcm", one, 100) == b"in/a.dcm"
    many = [obj.path for obj in list_objects(f"s3://{bucket}/many")]
    assert many == [f"{index:05d}" for index in range(40)]

    def reason(where: str, limit: int = 100) -> str:
        with pytest.raises(FetchFailed) as caught:
            fetch(where, objects["a.dcm"], limit)
        return caught.value.reason

    assert reason(source, 3) == "FILE_TOO_LARGE"
    assert reason(f"s3://{bucket}/i") == reason("s3://other/in") == "FILE_PATH_ESCAPE"
    client.put_object(Bucket=bucket, Key="in/a.dcm", Body=b"changed!")
    assert reason(source) == "FILE_CHANGED_DURING_READ"
    client.delete_object(Bucket=bucket, Key="in/a.dcm")
    assert reason(source) == "FILE_CHANGED_DURING_READ"
    with pytest.raises(StorageError, match="bucket does not exist"):
        list(list_objects("s3://no-such-bucket-here/x"))


class Faulty(BaseHTTPRequestHandler):
    """Answers as its server says: a status, after a number of 503s, or never."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.command, dict(self.headers)))
        if self.server.status == 0:
            time.sleep(self.server.delay_s)
            return
        ok = len(self.server.seen) > self.server.num_failures
        body = b"data" if ok and self.command == "GET" else b""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200 if ok else self.server.status)
        self.send_header("Content-Length", str(len(body) + (3 if ok and self.server.cut else 0)))
        self.end_headers()
        self.wfile.write(body)
        if ok and self.server.cut:
            self.server.cut = False
            self.close_connection = True

    do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(environment):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.seen, server.status, server.num_failures, server.delay_s, server.cut = [], 503, 0, 0.0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()


def test_a_storm_of_503_passes(faulty):
    faulty.num_failures = 5
    assert Storage.open("s3://b").read("x") == b"data"
    assert len(faulty.seen) == 6


def test_a_cut_body_is_fetched_again(faulty):
    faulty.cut = True
    assert Storage.open("s3://b").read("x") == b"data"
    assert len(faulty.seen) == 2


def test_a_refusal_is_not_retried(faulty):
    faulty.status, faulty.num_failures = 403, 99
    started = time.monotonic()
    with pytest.raises(StorageError, match="access refused"):
        Storage.open("s3://b").read("x")
    assert len(faulty.seen) == 1 and time.monotonic() - started < 10


def test_no_chunked_checksums_are_sent(faulty):
    Storage.open("s3://b").write("x", b"plain bytes")
    headers = {name.lower(): value for name, value in faulty.seen[-1][1].items()}
    assert headers["content-length"] == "11"
    assert headers["content-md5"] == base64.b64encode(hashlib.md5(b"plain bytes").digest()).decode()
    assert not any("trailer" in name or "chunked" in value for name, value in headers.items())


def test_a_silent_server_is_left_within_a_minute(faulty, environment):
    environment.setattr(s3, "READ_TIMEOUT_S", 1)
    environment.setattr(s3, "RETRY_BUDGET_S", 2.0)
    environment.setenv("AWS_REGION", "eu-central-1")  # another client than the one kept
    faulty.status, faulty.delay_s = 0, 10
    for call in (Storage.open("s3://b").read, lambda _: Lake("s3://b/lake").version(INSTANCES)):
        started = time.monotonic()
        with pytest.raises(StorageError):
            call("x")
        assert time.monotonic() - started < 30
