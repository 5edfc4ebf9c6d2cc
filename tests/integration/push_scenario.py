"""A real Orthanc that takes results, over DICOMweb and over its DICOM port; prints what happened as JSON.

Runs where loopback is the only interface; see orthanc_scenario.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import pushed_site
from orthanc_scenario import DICOM, HTTP, PASSWORD, Server, leaks, send, until
from pushed_site import FILMS, PushedSite

WEB = f"dicomweb+http://127.0.0.1:{HTTP}/dicom-web"
PORT = f"dicom://ORTHANC@127.0.0.1:{DICOM}"
KNOWN = {"DicomModalities": {"memmc": ["MEMMC", "127.0.0.1", 104]}, "DicomCheckCalledAet": True}
MEMMC = (sys.executable, "-m", "memmc.cli.main")


def command(site: PushedSite, to: str, *more: str) -> list[str]:
    credentials = ["--set", "push.user=memmc", "--set", "push.password_file=password"]
    return [*MEMMC, *site.arguments("--to", to, "--json", *credentials, *more)]


def pushed(site: PushedSite, to: str, *more: str) -> dict[str, object]:
    """Push as a process of its own; return what it says, with its exit status and all it printed."""
    done = subprocess.run(command(site, to, *more), capture_output=True, text=True, check=False)
    told = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return {**told, "status": done.returncode, "output": done.stdout + done.stderr}


def held(server: Server) -> dict[str, int]:
    """Return how many instances the archive holds by modality."""
    found = server.client.get("/instances", params={"expand": ""}).json()
    series = {each["ID"]: each["MainDicomTags"]["Modality"] for each in server.client.get("/series?expand").json()}
    return dict(Counter(series[each["ParentSeries"]] for each in found))


def results(server: Server, site: PushedSite, folder: Path) -> dict[str, object]:
    """Write the results that the archive holds as files; count whose patient is not that of the study's films."""
    folder.mkdir()
    strangers = 0
    for series in server.client.get("/series?expand").json():
        if series["MainDicomTags"]["Modality"] not in {"SR", "OT"}:
            continue
        study = server.client.get(f"/series/{series['ID']}/study").json()
        header = site.studies[study["MainDicomTags"]["StudyInstanceUID"]]
        for instance in series["Instances"]:
            tags = server.client.get(f"/instances/{instance}/simplified-tags").json()
            strangers += any(tags[name] != header[name] for name in ("PatientID", "PatientName", "AccessionNumber"))
            (folder / f"{instance}.dcm").write_bytes(server.client.get(f"/instances/{instance}/file").content)
    patients = len(server.client.get("/patients").json())
    return {"files": len(list(folder.iterdir())), "strangers": strangers, "patients": patients}


def kill_a_push_half_way(server: Server, site: PushedSite, to: str) -> None:
    before = server.client.get("/statistics").json()["CountInstances"]
    victim = subprocess.Popen(command(site, to), stdout=subprocess.DEVNULL)

    def some() -> bool:
        now = server.client.get("/statistics").json()["CountInstances"]
        return now >= before + FILMS // 2 or victim.poll() is not None

    until("results of the push to kill", some, 120)
    if victim.poll() is not None:
        raise RuntimeError("the push ended before it could be killed")
    victim.kill()
    victim.wait()


def run() -> dict[str, object]:
    """Over DICOMweb, again over the DICOM port, killed and repeated on each, a patient that differs."""
    Path("password").write_text(PASSWORD + "\n")
    site = pushed_site.make(Path.cwd())
    films = sorted(Path("in").glob("*.dcm"))
    told: dict[str, object] = {"films": FILMS, "studies": len(site.studies)}
    with Server(Path("archive").absolute(), **KNOWN) as server:
        told["no study yet"] = pushed(site, WEB)
        send(films)
        told["dry run"] = pushed(site, WEB, "--dry-run")
        kill_a_push_half_way(server, site, WEB)
        told["killed, web"] = held(server)
        told["web"] = pushed(site, WEB)
        told["held"] = held(server)
        told["port"] = pushed(site, PORT)
        told["results"] = results(server, site, Path("results").absolute())
        told["stranger's title"] = pushed(site, PORT, "--set", "push.ae_title=STRANGER")
        told["wrong title"] = pushed(site, PORT.replace("ORTHANC", "OTHER"))
        told["wrong password"] = pushed(site, WEB, "--set", "push.user=nobody")
    with Server(Path("second").absolute(), **KNOWN) as server:
        send(films)
        kill_a_push_half_way(server, site, PORT)
        told["killed, port"] = held(server)
        told["port, second archive"] = pushed(site, PORT)
        told["held, second archive"] = held(server)
        first = server.client.get("/patients?expand").json()[0]
        kept = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"]
        merge = {"Replace": {"PatientID": "MERGED"}, "Keep": kept, "Force": True, "KeepSource": False}
        changed = server.client.post(f"/patients/{first['ID']}/modify", json={**merge, "Synchronous": True})
        changed.raise_for_status()
        told["merged patient"] = pushed(site, WEB)
    told["leaks"] = leaks(["QUOXX", "Müßig", "Überweiser", "1.2.840.99999.7", PASSWORD])
    return told


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    begun = time.monotonic()
    Path("told.json").write_text(json.dumps({**run(), "seconds": time.monotonic() - begun}))
