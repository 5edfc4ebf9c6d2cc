"""One hospital, one lake and one Ray cluster for all tests of the whole way."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from operation_plant import RayHead

from memmc.config import Config, load_config
from memmc.cores import cores
from memmc.phantom.hospital import HospitalSummary, write_hospital
from memmc.pipeline.results import IngestResult, TrainResult

NUM_NORMAL, NUM_ABNORMAL, NUM_BROKEN = 150, 12, 7


@dataclass(frozen=True)
class Workspace:
    """A working directory with a generated hospital, ingested and trained on."""

    root: Path
    config: Config
    hospital: HospitalSummary
    ingested: IngestResult
    trained: TrainResult


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> HospitalSummary:
    """A small simulated hospital."""
    out = tmp_path_factory.mktemp("h") / "hospital"
    return write_hospital(
        out,
        num_normal=NUM_NORMAL,
        num_abnormal=NUM_ABNORMAL,
        num_broken=NUM_BROKEN,
        seed=5,
        workers=cores(),
    )


@pytest.fixture(scope="session")
def settings() -> list[str]:
    """Settings that keep the tests short and leave enough normals to calibrate on."""
    return [
        "lake.uri=lake",
        "train.max_minutes=0.5",
        "train.checkpoint_seconds=5",
        "split.train=0.5",
        "split.calibrate=0.3",
        "split.test=0.2",
        "evaluate.bootstrap=200",
    ]


@pytest.fixture(scope="session")
def workspace(
    tmp_path_factory: pytest.TempPathFactory, hospital: HospitalSummary, settings: list[str]
) -> Iterator[Workspace]:
    """Ingest and train once, in a working directory of its own, on a Ray cluster that stays up."""
    from memmc.pipeline.cluster import ray_cluster
    from memmc.pipeline.ingest import ingest
    from memmc.pipeline.train import train

    root, before = tmp_path_factory.mktemp("w"), Path.cwd()
    os.chdir(root)
    try:
        config = load_config(overrides=settings)
        with ray_cluster(config, root / ".memmc"):
            account = ingest(config, str(hospital.dicom_dir), "cxr", labels_file=str(hospital.labels_csv))
            trained = train(config, "cxr")
            yield Workspace(root, config, hospital, account, trained)
    finally:
        os.chdir(before)


@pytest.fixture
def inside(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace, as the current directory."""
    monkeypatch.chdir(workspace.root)
    return workspace


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The embedded mode's folder with its server up, and the environment of a process that uses it.

    One for all tests: Prefect keeps services for the process's life (concurrency
    slots, logs, events) that go on asking the first server they have known. They
    send what is left when the process ends, so the server ends after it, by itself.
    """
    from flows import embedded

    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("PREFECT_"):
                patch.delenv(name)
        before = dict(os.environ)
        home = tmp_path_factory.mktemp("flows") / ".memmc"
        embedded.prepare(home)
        embedded.await_server()
        used = {name: value for name, value in os.environ.items() if before.get(name) != value}
        for name in used:
            del os.environ[name]
    atexit.unregister(embedded._started.pop().stop)
    return home, used


@pytest.fixture
def home(prefect_server: tuple[Path, dict[str, str]]) -> Iterator[Path]:
    """The embedded mode's folder; flows of this process run on its server, until the test is over."""
    folder, environment = prefect_server
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # Not before: prefect makes its home directory when it is imported.
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
        yield folder
    refresh_global_settings_context()


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray cluster that this process is not part of, with a Jobs API."""
    head = RayHead(tmp_path_factory.mktemp("ray"), num_cpus=4)
    yield head
    head.stop()
