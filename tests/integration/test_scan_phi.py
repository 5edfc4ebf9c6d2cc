"""No identifier and no key on any plane: real ingest, flow, training and Prefect API, then a search that is proven."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from memmc.dicom.read import Instance
from memmc.dicom.vault import seal_originals
from memmc.lake.storage import Storage
from memmc.pipeline.vault import make_keys, read_public_key, write_entries

pytestmark = pytest.mark.slow

KEY = secrets.token_hex(32)
COUNT = 12
ROOT = Path(__file__).parents[2]
# Makes a Secret block in the embedded server of a working directory; the key comes on standard input.
MAKE_SECRET = """
import sys
from pathlib import Path
from flows.embedded import await_server, prepare
prepare(Path(".memmc").absolute()); await_server()
from prefect.blocks.system import Secret
Secret(value=sys.stdin.read()).save("memmc-key", overwrite=True)
"""


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMMC_", "PREFECT_", "RAY_"))}
    return kept | more


def memmc(*arguments: str, cwd: Path, status: int = 0, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "memmc.cli.main", *arguments, "--json"],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout)


def plant(source: Path, target: Path, number: int) -> list[str]:
    """Copy an object with identifiers in name, header, sequences, private and unknown elements; return them."""
    mark = f"PLANTQ{number:03d}Z"
    dataset = pydicom.dcmread(source)
    dataset.preamble = f"PRE{mark}".encode().ljust(128, b"\0")
    nested = Dataset()
    nested.PatientName, nested.InstitutionAddress, nested.PatientID = f"NAME{mark}^SQ", f"ADDR{mark}", f"SQID{mark}"
    dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = f"NAME{mark}^JÖRG", f"MRN{mark}", f"ACC{mark}"
    dataset.InstitutionName, dataset.StationName = f"INST{mark}", f"ST{mark}"
    dataset.ReferencedPatientSequence, dataset.RequestAttributesSequence = [nested], [nested]
    dataset.PatientBirthDate, dataset.OtherPatientIDs = f"19{number + 10:02d}0704", f"OTH{mark}"
    dataset.Manufacturer, dataset.BodyPartExamined = f"MANU{mark}", f"BODY{mark}"
    dataset.add_new(0x00091010, "LO", f"PRIV{mark}")
    dataset.add_new(0x00091011, "UN", f"UNKN{mark}".encode())
    dataset.file_meta.SourceApplicationEntityTitle = f"AE{mark}"
    folder = target / f"DIR{mark}"
    folder.mkdir(parents=True)
    dataset.save_as(folder / f"FILE{mark}.dcm")
    prefixes = "PRE NAME ADDR SQID MRN ACC INST ST OTH MANU BODY PRIV UNKN AE DIR FILE"
    return [f"{name}{mark}" for name in prefixes.split()] + [dataset.PatientBirthDate, dataset.StudyInstanceUID]


@contextmanager
def prefect_api(home: Path) -> Iterator[tuple[str, str]]:
    from flows.server import LocalServer

    server = LocalServer(home / "prefect")
    try:
        server.wait(180)
        yield server.url, server.auth
    finally:
        server.stop()


def log_line(url: str, auth: str, text: str) -> None:
    """Send a log line, as a careless task would."""
    send(f"{url}/logs/", auth, [{"name": "x", "level": 20, "message": text, "timestamp": "2026-01-01T00:00:00Z"}])


def events(url: str, auth: str, text: str) -> None:
    """Send more events than a page holds, the oldest of them two years old and with a text in its payload."""
    made = [
        {
            "id": f"00000000-0000-4000-8000-{number:012d}",
            "occurred": f"{2026 - 2 * (not number)}-01-01T00:00:{number % 60:02d}Z",
            "event": "memmc.test",
            "resource": {"prefect.resource.id": f"memmc.{number}"},
            "payload": {"note": text if not number else "nothing"},
        }
        for number in range(120)
    ]
    send(f"{url}/events", auth, made)


def send(url: str, auth: str, body: list[dict]) -> None:
    headers = {
        "Content-Type": "application/json",
        "Authorization": "Basic " + base64.b64encode(auth.encode()).decode(),
    }
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60).close()


def wait_for_event(scan: Callable[[], dict], file: str) -> dict:
    """Scan until a file shows a hit: the server stores events some time after it took them."""
    for _ in range(6):
        found = scan()
        if any(hit["file"] == file for hit in found["hits"]):
            return found
        time.sleep(3)
    raise AssertionError(f"no hit in {file}: {found['hits']}")


def test_no_identifier_and_no_key_on_any_plane(workspace, tmp_path):
    root = workspace.root
    originals = sorted(path for path in workspace.hospital.dicom_dir.rglob("*.dcm") if path.stat().st_size > 50_000)
    planted = [value for n in range(COUNT) for value in plant(originals[n], tmp_path / "in", n)]
    (tmp_path / "list.txt").write_text(
        "\n".join([*planted, KEY, KEY.encode().hex(), base64.b64encode(KEY.encode()).decode()])
    )
    made = subprocess.run(
        [sys.executable, "-c", MAKE_SECRET], cwd=root, env=clean_environment(), input=KEY, text=True, check=False
    )
    assert made.returncode == 0
    account = memmc(
        *("ingest", str(tmp_path / "in"), "--cohort", "planted", "--lake", "lake-flow", "--flow"),
        *("--set", "deid.key_secret=memmc-key"),
        cwd=root,
    )
    assert account["seen"] == COUNT and account["stored"] > COUNT // 2

    asked = ["scan-phi", "--identifiers", str(tmp_path / "list.txt"), "--dicom", str(tmp_path / "in")]
    asked += ["--dicom", str(workspace.hospital.dicom_dir), "--lake", "lake-flow", "--path", "lake"]
    with prefect_api(root / ".memmc") as (url, auth):
        given = {"PREFECT_API_AUTH_STRING": auth}
        clean = memmc(*asked, "--prefect-api", url, cwd=root, **given)
        assert (clean["num_hits"], clean["found"], clean["planted"]) == (0, 8, 8), clean["hits"]
        assert {"lake", "prefect", "mlflow", "prefect-api", "path 1"} <= set(clean["planes"])
        assert clean["identifiers"] > 500
        # The negative control: a careless log line and event are found by the API and in the database behind it.
        log_line(url, auth, f"could not read {planted[1].lower()}")
        events(url, auth, f"of {planted[2]}")
        leaky = wait_for_event(lambda: memmc(*asked, "--prefect-api", url, cwd=root, status=1, **given), "events")
        assert {hit["plane"] for hit in leaky["hits"]} == {"prefect-api", "prefect"}
        assert {hit["file"] for hit in leaky["hits"] if hit["plane"] == "prefect-api"} == {"logs", "events"}
        assert not any(value.lower() in json.dumps(leaky).lower() for value in planted)


def test_of_real_objects_nothing_stays(tmp_path):
    """With the folder of real objects that MEMMC_TEST_DATA names."""
    data = Path(os.environ.get("MEMMC_TEST_DATA") or ROOT.parent / "shared" / "data")
    hospital, canary = data / "dicom-hospital", data / "dicom-poison" / "canary.dcm"
    if not hospital.is_dir() or not canary.is_file():
        pytest.skip("no dicom-hospital and dicom-poison in MEMMC_TEST_DATA or ../shared/data")
    with (hospital / "phi.csv").open(newline="") as file:
        assert sum(1 for _ in csv.reader(file)) > 300
    scope = ("--set", "select.modalities=CR,DX,CT", "--lake", "lake", "--cohort", "real")
    first = memmc("ingest", str(hospital / "dicom"), *scope, cwd=tmp_path)
    second = memmc("ingest", str(canary), *scope, cwd=tmp_path)
    assert (first["seen"], second["seen"]) == (48, 1)
    (tmp_path / "originals").mkdir()
    (tmp_path / "originals" / "canary.dcm").write_bytes(canary.read_bytes())
    asked = ["scan-phi", "--identifiers", str(hospital / "phi.csv"), "--dicom", str(hospital / "dicom")]
    asked += ["--dicom", str(tmp_path / "originals"), "--lake", "lake"]
    found = memmc(*asked, cwd=tmp_path)
    assert (found["num_hits"], found["found"]) == (0, 8)
    assert found["identifiers"] > 1000


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server of its own."""
    from moto.server import ThreadedMotoServer

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/hospital", method="PUT")).close()
    yield "s3://hospital"
    server.stop()


def test_a_bucket_is_searched_and_holds_a_vault(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("QUOXX^ANNE\nMRN7QUOXX\n")
    storage = Storage.open(f"{bucket}/lake")
    storage.write("instances/_delta_log/0.json", b'{"note": "nothing"}')
    asked = (
        "scan-phi",
        "--identifiers",
        str(tmp_path / "list.txt"),
        "--lake",
        f"{bucket}/lake",
        "--path",
        f"{bucket}/v",
    )
    make_keys(tmp_path / "private.pem", tmp_path / "public.pem", None)
    vault, public = Storage.open(f"{bucket}/v"), read_public_key(tmp_path / "public.pem")
    entry = {"sop_instance_uid": "2.25.1", "object_uid": "2.25.1", "patient_key": "0" * 64, "study_uid": "2.25.2"}
    entry |= {"content_key": "1" * 64}
    sealed = seal_originals(instance("MRN7QUOXX"), "2.25.1", public)
    write_entries(vault, public, [{**entry, "sealed": sealed, "ingest_run": "r", "ingested_at": datetime.now(UTC)}])
    clean = memmc(*asked, cwd=tmp_path)
    assert (clean["num_hits"], clean["planes"]["lake"]["files"], clean["planes"]["path 1"]["files"]) == (0, 1, 1)
    storage.write("logs/run.gz", gzip.compress(b"lost " + "quoxx, anne".encode("utf-16-le")))
    found = memmc(*asked, cwd=tmp_path, status=1)["hits"]
    assert {(hit["plane"], hit["file"], hit["encoding"]) for hit in found} == {("lake", "logs/run.gz", "utf-16le")}
    (tmp_path / "uids").write_text("2.25.1\n")
    opened = memmc(
        *("vault", "resolve", "--uids", str(tmp_path / "uids"), "--private-key-file", str(tmp_path / "private.pem")),
        *("--set", f"deid.vault_uri={bucket}/v"),
        cwd=tmp_path,
    )
    assert opened["originals"]["2.25.1"]["patient_id"] == "MRN7QUOXX"
    assert json.loads(vault.read(opened["audit"]))["subject"]["found"] == 1


def instance(patient: str) -> Instance:
    """The parsed header of an object that holds little else."""
    whole = Dataset()
    whole.SOPClassUID, whole.SOPInstanceUID, whole.PatientID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3", patient
    return Instance(whole, "1.2.840.10008.1.2.1", True, memoryview(b""), None, False)
