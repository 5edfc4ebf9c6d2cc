"""A real Orthanc, dcmtk's storescu and `memmc ingest` in one network namespace; prints what happened as JSON.

Orthanc's DICOM port listens on every interface, so the whole scenario runs where loopback is the only one:
``unshare --net --pid --fork --kill-child --mount-proc sh -c 'ip link set lo up; exec python orthanc_scenario.py DIR'``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from dicom_instances import DX, dataset, encoded, texture

from memmc.config import load_config
from memmc.lake.tables import Lake
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.ingest import ingest

HTTP, DICOM = 8042, 4242
STUDIES, PER_STUDY = 20, 10
QUIET_SECONDS = 3
ROOT = "1.2.826.0.1.3680043.8.498.4711"
PASSWORD = "correct-horse-battery"
ORTHANC = f"orthanc+http://127.0.0.1:{HTTP}"
PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
SETTINGS = [
    "lake.uri=lake",
    "deid.text=class",  # these images are noise, not radiographs; reading text in them is another test's business
    "source.user=memmc",
    "source.password_file=password",
    f"source.quiet_seconds={QUIET_SECONDS}",
    "ingest.objects_per_task=10",
]
_KILLED = (
    "import json, sys; from memmc.config import load_config; from memmc.pipeline.ingest import ingest;"
    "ingest(load_config(overrides=json.loads(sys.argv[1])), sys.argv[2], 'cxr')"
)


class Server:
    """An Orthanc with its DICOMweb plugin and a password, over a folder."""

    def __init__(self, folder: Path, **more: object) -> None:
        folder.mkdir()
        self.config = folder / "orthanc.json"
        settings = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": HTTP,
            "DicomPort": DICOM,
            "DicomAet": "ORTHANC",
            "DicomAlwaysAllowStore": True,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"memmc": PASSWORD},
            "Plugins": [PLUGIN],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            **more,
        }
        self.config.write_text(json.dumps(settings))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{HTTP}", auth=("memmc", PASSWORD), trust_env=False)

    def __enter__(self) -> Server:
        log = self.config.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(["Orthanc", str(self.config)], stdout=log, stderr=log)
        until("Orthanc answers", lambda: answers(self.client))
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/system").status_code == 200
    except httpx.TransportError:
        return False


def until(what: str, done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


def write_instances(folder: Path) -> list[Path]:
    """Write valid DX objects, one after the other of study 0, then of study 1, and so on."""
    files: list[Path] = []
    for number in range(STUDIES * PER_STUDY):
        study = number // PER_STUDY
        uid = f"{ROOT}.3.{number + 1}"
        ds = dataset(
            texture(seed=number),
            SOPClassUID=DX,
            Modality="DX",
            PatientID=f"HOSPITAL-{study:04d}",
            PatientName="MUSTERMANN^ERIKA",
            AccessionNumber=f"ACC-4711-{study}",
            StudyInstanceUID=f"{ROOT}.1.{study + 1}",
            SeriesInstanceUID=f"{ROOT}.2.{study + 1}",
            SOPInstanceUID=uid,
        )
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = DX, uid
        files.append(folder / f"{number:04d}.dcm")
        files[-1].write_bytes(encoded(ds))
    return files


def send(files: list[Path]) -> None:
    subprocess.run(["storescu", "-aec", "ORTHANC", "127.0.0.1", str(DICOM), *map(str, files)], check=True)


def take(source: str = ORTHANC, cohort: str = "cxr", *overrides: str) -> dict[str, object]:
    return ingest(load_config(overrides=[*SETTINGS, *overrides]), source, cohort).as_dict()


def kill_an_ingest_half_way() -> None:
    """Kill -9 the driver and all its workers once new shards exist, before the commit."""
    before = len(list(Path("lake").glob("instances/**/*.parquet")))
    victim = subprocess.Popen([sys.executable, "-c", _KILLED, json.dumps(SETTINGS), ORTHANC], stdout=subprocess.DEVNULL)
    until(
        "shards of the ingest to kill",
        lambda: len(list(Path("lake").glob("instances/**/*.parquet"))) > before or victim.poll() is not None,
        120,
    )
    if victim.poll() is not None:
        raise RuntimeError("the ingest ended before it could be killed")
    process = psutil.Process(victim.pid)
    for one in [*process.children(recursive=True), process]:
        one.kill()
    victim.wait()


def resend_one(server: Server, file: Path) -> None:
    """Delete an instance and send it again: the same object to DICOM, another attachment to Orthanc."""
    uid = f"{ROOT}.3.{int(file.stem) + 1}"
    (found,) = server.client.post("/tools/lookup", content=uid).json()
    server.client.delete(f"/instances/{found['ID']}").raise_for_status()
    send([file])


def leaks(words: list[str]) -> list[str]:
    """Return the files of the lake and of our own state that hold one of the words."""
    return sorted(
        str(path)
        for root in ("lake", ".memmc")
        for path in Path(root).rglob("*")
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    )


def run() -> dict[str, object]:
    """Three rounds over `/changes`, one over DICOMweb, and an archive set up anew."""
    Path("password").write_text(PASSWORD + "\n")
    Path("dicom").mkdir()
    files = write_instances(Path("dicom"))
    quiet = QUIET_SECONDS + 1.5
    told: dict[str, object] = {}
    config = load_config(overrides=SETTINGS)
    with Server(Path("archive").absolute()) as server:
        with ray_cluster(config, Path.cwd() / ".memmc", training=False):
            send(files[:75])  # half of study 7
            time.sleep(quiet)
            told["first"] = take()
            told["first again"] = take()
            send(files[75:140])
            told["second, too early"] = take(ORTHANC, "cxr", "source.quiet_seconds=3600")
            time.sleep(quiet)
            told["second"] = take()
        send(files[140:])
        resend_one(server, files[0])
        time.sleep(quiet)
        kill_an_ingest_half_way()
    with server, ray_cluster(config, Path.cwd() / ".memmc", training=False):
        told["third"] = take()
        told["third again"] = take()
        told["web"] = take(f"dicomweb+http://127.0.0.1:{HTTP}/dicom-web", "web", "source.quiet_seconds=1")
        told["web again"] = take(f"dicomweb+http://127.0.0.1:{HTTP}/dicom-web", "web")
        told["archive"] = server.client.get("/statistics").json()
        server.__exit__()
        shutil.rmtree("archive")
        with Server(Path("archive").absolute()):
            send(files[:30])
            told["set up anew"] = take(ORTHANC, "cxr", "source.quiet_seconds=0")
    told["rows"] = {cohort: account_of(cohort) for cohort in ("cxr", "web")}
    told["leaks"] = leaks([ROOT, "MUSTERMANN", "HOSPITAL-00", "ACC-4711", PASSWORD])
    return told


def account_of(cohort: str) -> dict[str, object]:
    rows = Lake("lake").read("instances", ["object_key", "sop_instance_uid", "outcome"], filter={"cohort": cohort})
    table = rows.to_pylist()
    stored = [row["sop_instance_uid"] for row in table if row["outcome"] == "stored"]
    keys = {row["object_key"] for row in table}
    digest = hashlib.sha256("\n".join(sorted(stored)).encode()).hexdigest()
    return {"rows": len(table), "keys": len(keys), "stored": len(stored), "uids": len(set(stored)), "digest": digest}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    begun = time.monotonic()
    Path("told.json").write_text(json.dumps({**run(), "seconds": time.monotonic() - begun}))
