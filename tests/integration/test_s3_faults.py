"""The lake and the source behind a server that refuses, resets, hangs, cuts and flips; moto behind a proxy of ours."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from test_lake_s3 import bucket, environment, moto, rows  # noqa: F401 - fixtures

from memmc import s3
from memmc.errors import IntegrityError, MemmcError, StorageError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.lake.vacuum import vacuum
from memmc.lake.verify import verify
from memmc.sources.folder_s3 import fetch, list_objects
from memmc.sources.objects import STORE_AUTH, STORE_TIMEOUT, FetchFailed

BENCHMARKS = Path(__file__).parents[2] / "infra" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from s3_fault_proxy import fault_proxy  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def proxy(moto, environment, bucket):  # noqa: F811
    with fault_proxy(moto) as running:
        environment.setenv("AWS_ENDPOINT_URL", running.uri)
        yield running


@pytest.fixture
def lake(proxy, bucket):  # noqa: F811
    lake = Lake(f"s3://{bucket}/lake")
    lake.append(INSTANCES, rows(0), "first")
    return lake


def keys(lake: Lake) -> list[int]:
    table = lake.read(INSTANCES, ["object_key", "pixels"])
    assert all(len(pixels) == 32 for pixels in table["pixels"].to_pylist())
    return sorted(int(key, 16) for key in table["object_key"].to_pylist())


@pytest.mark.parametrize("fault", ["503", "reset", "lost"])
def test_what_passes_by_itself_is_tried_again(lake, proxy, fault):
    """Four requests of ten fail; "lost" ones are done by the server, but their answer never comes."""
    proxy.plan(fault, share=0.4)
    lake.append(INSTANCES, rows(8), "second")
    assert keys(lake) == list(range(16))
    assert proxy.plan() > 4
    assert keys(lake) == list(range(16)) and not verify(lake).damages
    assert [commit["run"] for commit in lake.history(INSTANCES)][:2] == ["second", "first"]


def test_a_refusal_is_named_at_once(lake, proxy):
    proxy.plan("403")
    calls = [lambda: lake.version(INSTANCES), lambda: lake.exists(INSTANCES), lambda: lake.storage.list()]
    calls += [lambda: lake.storage.write("x", b"1"), lambda: lake.append(INSTANCES, rows(8))]
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StorageError, match="access refused"):
            call()
        assert time.monotonic() - began < 10


def test_a_cut_or_spoilt_body_never_becomes_a_row(lake, proxy, monkeypatch):
    monkeypatch.setattr(s3, "RETRY_BUDGET_S", 1.0)
    for fault in ("truncate", "flip"):
        for columns in (["object_key"], ["pixels"]):
            proxy.plan(fault, method="GET", path=".parquet")
            with pytest.raises((StorageError, IntegrityError)):
                lake.read(INSTANCES, columns)
    proxy.plan("truncate", method="GET", path=".parquet", first=1)  # once is not for ever
    assert keys(lake) == list(range(8))


def test_a_silent_server_is_bounded(lake, proxy, monkeypatch):
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1)
    monkeypatch.setattr(s3, "RETRY_BUDGET_S", 2.0)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")  # another client than the one kept
    file = lake.files(INSTANCES)[0].path
    proxy.plan("hang")
    calls = [lambda: lake.version(INSTANCES), lambda: lake.storage.read(file), lambda: lake.append(INSTANCES, rows(8))]
    for call in calls:
        began = time.monotonic()
        with pytest.raises(MemmcError):
            call()
        assert time.monotonic() - began < 6  # of 2 s and one more try; 30 s and 20 s give 50 s


def test_the_source(proxy, bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1)
    monkeypatch.setattr(s3, "RETRY_BUDGET_S", 2.0)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    s3.client().put_object(Bucket=bucket, Key="in/a.dcm", Body=b"x" * 1000)
    source = f"s3://{bucket}/in"
    for fault in ("503", "reset", "truncate"):
        proxy.plan(fault, share=0.4)
        (found,) = list_objects(source)
        assert fetch(source, found, 2000) == b"x" * 1000
    for fault, reason in (
        ("403", STORE_AUTH),
        ("503", STORE_TIMEOUT),
        ("truncate", STORE_TIMEOUT),
        ("hang", STORE_TIMEOUT),
    ):
        proxy.plan(fault)
        began = time.monotonic()
        with pytest.raises(FetchFailed) as caught:
            fetch(source, found, 2000)
        assert caught.value.reason == reason and time.monotonic() - began < 6
        with pytest.raises(StorageError, match="cannot be listed"):
            list(list_objects(source))


def test_a_shard_spoilt_on_its_way_there_never_becomes_a_row(lake, proxy):
    """Real stores refuse it by its Content-MD5; moto keeps it, and the reader refuses it by its digest."""
    proxy.plan("flip", method="PUT", path=".parquet", first=1)
    lake.append(INSTANCES, rows(8), "spoilt")
    assert proxy.plan() == 1
    with pytest.raises(IntegrityError):
        lake.read(INSTANCES, ["object_key", "pixels"])
    assert len(verify(lake).damages) == 1


def test_unfinished_uploads_are_swept(lake, bucket):  # noqa: F811
    begun = s3.client().create_multipart_upload(Bucket=bucket, Key="lake/training/checkpoint")
    other = s3.client().create_multipart_upload(Bucket=bucket, Key="other/lake")
    storage = lake.storage
    assert storage.uploads(datetime(2000, 1, 1, tzinfo=UTC)) == []
    assert vacuum(lake, 0, dry_run=True).uploads == vacuum(lake, 0).uploads == ["lake/training/checkpoint"]
    left = s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [item["UploadId"] for item in left] == [other["UploadId"]] != [begun["UploadId"]]
    assert keys(lake) == list(range(8))


def test_killed_at_a_request_and_vacuumed_meanwhile():
    script = BENCHMARKS / "lake_stress.py"
    done = subprocess.run(
        [sys.executable, str(script), "--short"], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 points, nothing wrong" in done.stdout and "12 of 12 commits present, 0 live shards" in done.stdout
