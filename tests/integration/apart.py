"""Scenarios with a real Orthanc (Debian's), each in a network namespace of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
APART = ["unshare", *([] if os.getuid() == 0 else ["-r"]), "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
LOOPBACK = "ip link set lo up && exec "


def played(scenario: str, folder: Path) -> dict[str, Any]:
    """Run a scenario of this folder, which leaves `told.json`; return that, and what it printed as `output`.

    Skips the test where Orthanc or a namespace is not to be had: its DICOM port listens on every interface.
    """
    missing = [name for name in ("Orthanc", "storescu", "unshare", "ip") if shutil.which(name, path=_path()) is None]
    if missing or not PLUGIN.exists():
        pytest.skip(
            f"needs the Debian packages orthanc, orthanc-dicomweb, dcmtk, iproute2: no {missing or PLUGIN.name}"
        )
    if subprocess.run([*APART, "sh", "-c", LOOPBACK + "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a network namespace of its own (unshare --net), as Orthanc's DICOM port listens everywhere")
    file = Path(__file__).with_name(scenario)
    command = [*APART, "sh", "-c", f'{LOOPBACK} "$0" "$@"', sys.executable, str(file), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MEMMC_", "RAY_"))}
    done = subprocess.run(
        command, env={**environment, "PATH": _path()}, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "told.json").read_text())
    print(f"scenario: {found['seconds']:.0f} s")
    found["output"] = done.stdout + done.stderr
    return found


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
