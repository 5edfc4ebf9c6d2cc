"""What works on this machine, and the fix for what does not. Each check does the thing it speaks of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from packaging.version import Version

from memmc.config import Config
from memmc.cores import cores
from memmc.errors import MemmcError
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.cluster_job import count_jobs, takes_jobs
from memmc.pipeline.identity import home_directory
from memmc.pipeline.prefect_server import look_at_server
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Check, DoctorResult

# Releases that pip would install together and that do not work together: name, first bad version, what breaks.
_BROKEN_FROM = (
    ("fastapi", "0.151", "the Prefect server dies at start"),
    ("sqlalchemy", "2.1", "the Prefect scheduler never creates a run"),
)
_PACKAGES = ("torch", "ray", "prefect", "mlflow", "deltalake", "pyarrow", "pydicom", "s3fs")
_LEAST_DISK_BYTES = 5 << 30
_LEAST_MEMORY_BYTES = 6 << 30

Finding = tuple[str, str]
"""What was found, and the fix; an empty fix means that all is well."""


def examine(config: Config, progress: Progress | None = None, source: str | None = None) -> DoctorResult:
    """Run every check; none stops the others.

    Args:
        source: a source of objects to look at too, as `memmc ingest` takes it.
    """
    progress = progress or Silent()
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("packages", _packages),
        ("memory and disk", _room),
        ("graphics processor", _gpu),
        ("decoders", _decoders),
        ("text reading", _text),
        ("lake", lambda: _lake(config)),
        ("ray", lambda: _ray(config)),
        ("prefect", _prefect),
        ("mlflow", lambda: _mlflow(config)),
    ]
    if source is not None:
        checks.append(("source", lambda: look_at_source(config, source)))
    if config.push.uri is not None:
        checks.append(("archive", lambda: look_at_archive(config)))
    progress.stage("doctor", len(checks))
    results: list[Check] = []
    for number, (name, check) in enumerate(checks, start=1):
        progress.advance(number - 1, name)
        try:
            found, fix = check()
        except MemmcError as error:
            found, fix = "does not work", str(error)
        except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
            found, fix = (
                f"{type(error).__name__}",
                "run `make setup` again; if it stays, the message is: " + str(error)[:300],
            )
        results.append(Check(name=name, ok=not fix, found=found, fix=fix))
    return DoctorResult(healthy=all(check.ok for check in results), checks=results)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return found, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"


def _packages() -> Finding:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    for name, first_bad, effect in _BROKEN_FROM:
        if Version(importlib.metadata.version(name)) >= Version(first_bad):
            return found, f"{name} {importlib.metadata.version(name)}: {effect}; install with -c constraints.txt"
    return found, ""


def _room() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = shutil.disk_usage(Path.cwd()).free
    found = f"{cores()} cores, {memory >> 30} GiB memory, {disk >> 30} GiB disk free here"
    if memory < _LEAST_MEMORY_BYTES:
        return found, f"at least {_LEAST_MEMORY_BYTES >> 30} GiB of memory are needed"
    return found, "" if disk >= _LEAST_DISK_BYTES else f"free {_LEAST_DISK_BYTES >> 30} GiB of disk"


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", ""
    return "none: training and scoring use the CPU", ""


def _decoders() -> Finding:
    from memmc.dicom.decode import decoder_status

    status = decoder_status()
    missing = [name for name, available in status.items() if not available]
    found = f"{len(status) - len(missing)} of {len(status)} transfer syntaxes"
    return found, f"no decoder for {', '.join(missing)}; run `make setup` again" if missing else ""


def _text() -> Finding:
    from memmc.dicom.text import text_reading_available

    available = text_reading_available()
    return "yes" if available else "no", "" if available else "run `make setup` again, or set deid.text=class"


def _lake(config: Config) -> Finding:
    from memmc.lake.storage import Storage

    storage = Storage.open(config.lake.uri)
    name = "_doctor/probe"
    storage.write(name, b"memmc")
    whole = storage.read(name) == b"memmc"
    storage.delete(name)
    if not whole:
        return "read back other bytes than were written", "use another store for lake.uri"
    if storage.is_s3:
        storage.probe_conditional_put()
        return "S3: write, read, delete and conditional create work", ""
    return "local: write, read and delete work", ""


def look_at_source(config: Config, source: str) -> Finding:
    """Ask a source whether it can be listed, with the credentials and limits of section `source`."""
    from memmc.sources.open import open_source

    return open_source(source, config.source, os.environ).check(), ""


def look_at_archive(config: Config) -> Finding:
    """Ask the archive that takes results whether it answers."""
    from memmc.results.open import open_archive

    with closing(open_archive(config.push, os.environ)) as archive:
        return archive.check(), ""


def _ray(config: Config) -> Finding:
    if takes_jobs(config.ray):
        return f"the Jobs API answers; it knows {count_jobs(config.ray)} jobs", ""
    with ray_cluster(config, home_directory()) as ray:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        answered = ray.get(ray.remote(num_cpus=1)(platform.node).remote())
    fix = "" if cpus >= config.train.num_workers + 1 else "raise ray.num_cpus or lower train.num_workers"
    return f"{cpus} CPUs; a task ran" + ("" if answered else " but came back empty"), fix


def _prefect() -> Finding:
    """Import the server in a process of its own: a wrong FastAPI shows only then."""
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home_directory() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from prefect.server.api.server import create_app; create_app()"],
        env=environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return "the server does not start", f"install with -c constraints.txt; it said: {last[0][:200]}"
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return "the server loads; flows run in-process", ""
    server = look_at_server(url, os.environ)
    return f"the server loads; flows run on the one that is set, with {server.workers} workers", server.fix()


def _mlflow(config: Config) -> Finding:
    from memmc.registry.tracking import open_tracking

    tracking = open_tracking(config.tracking, home_directory())
    return f"tracking store answers ({tracking.place})", ""
