"""The Ray cluster a step runs on: a private one in this process tree, or one that is named."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from memmc.config import Config
from memmc.cores import cores
from memmc.errors import MemmcError, StorageError, UsageError
from memmc.pipeline.cluster_job import takes_jobs

# A Unix socket's path may hold 107 bytes; Ray puts up to 63 below its session's parent.
_LONGEST_SESSION_PARENT = 40
_OBJECT_STORE_BYTES = 2 << 30
_SPARE_CPUS = 2
_REMOVE_ATTEMPTS = 40
_ANSWER_S = 10.0  # of a cluster that is to be joined
_START_ATTEMPTS = 3  # Ray gives a node 30 s, which a machine under load may miss


def prepare_environment(home: Path, *, private: bool = True) -> None:
    """Set what Ray reads from the environment, before ray is imported.

    Ray opens ports on every interface whatever it is told, so even a private
    cluster asks for a token; one that is joined has its own ways. Children started at nice 15 (Ray's default) starve
    beside anything else on the machine.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's core prints an "error" on stderr for every actor pool; what fails comes back as an exception anyway.
        "RAY_BACKEND_LOG_LEVEL": "fatal",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if not private:
        return
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and not (
        os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        path = home / "ray_token"
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@contextmanager
def ray_cluster(config: Config, home: Path, *, training: bool = True) -> Generator[Any]:
    """Yield the ray module, connected; end the cluster only if this call began it.

    Args:
        config: `ray.address` names a cluster to join, else a local one is started.
        home: the working directory's `.memmc`.
        training: start the dashboard too, which Ray Train asks for the state of its controller, once a second and
            aloud; without it a cluster starts in two thirds of the time and half of the memory.

    Raises:
        UsageError: `ray.address` is that of a Jobs API.
        StorageError: the named cluster cannot be joined.
        MemmcError: a cluster of one's own does not start.
    """
    if takes_jobs(config.ray):
        raise UsageError(
            "ray.address is that of a Jobs API, to which a flow submits its steps; run with --flow, or name the "
            "cluster itself (auto, or HOST:6379) on one of its machines"
        )
    prepare_environment(home, private=config.ray.address is None)
    import ray

    if ray.is_initialized():
        with _own_errors(ray):
            yield ray
        return
    parent: Path | None = None
    if config.ray.address:
        _join(ray, config.ray.address)
    else:
        parent = _start(ray, config, home, training)
    try:
        import ray.data  # sets its own log levels when it is imported

        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.use_datasource_v2 = False
        with _own_errors(ray):
            yield ray
    finally:
        ray.shutdown()
        if parent is not None:
            _remove(parent)


def _join(ray: Any, address: str) -> None:
    """Connect to a cluster that is there."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        if place.hostname and place.port:  # Ray asks a place where nothing listens for more than five minutes
            socket.create_connection((place.hostname, place.port), _ANSWER_S).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # noqa: BLE001 - refused, of another version, without the token: Ray has no one kind
        raise StorageError(
            f"no Ray cluster could be joined at ray.address ({type(error).__name__}); check that it runs there, with "
            "the Ray and Python versions of this machine, and that RAY_AUTH_TOKEN_PATH names its token"
        ) from None


def _start(ray: Any, config: Config, home: Path, training: bool) -> Path:
    """Start a cluster in this process tree; return its session's folder."""
    failure = ""
    for _ in range(_START_ATTEMPTS):
        parent = _session_parent(home)
        try:
            ray.init(
                num_cpus=config.ray.num_cpus or cores() + _SPARE_CPUS,
                include_dashboard=training,
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=str(parent),
            )
            return parent
        except Exception as error:  # noqa: BLE001 - what Ray raises for a late node is no narrower
            ray.shutdown()
            _remove(parent)
            failure = type(error).__name__
    raise MemmcError(
        f"a Ray cluster did not start here in {_START_ATTEMPTS} attempts ({failure}); free memory or wait for other "
        "work to end, then run again"
    )


@contextmanager
def _own_errors(ray: Any) -> Generator[None]:
    """Let an error that a worker raised on purpose come out as itself, without Ray's wrapping."""
    try:
        yield
    except ray.exceptions.RayError as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, MemmcError):
            found = getattr(found, "cause", None) or found.__cause__
        if found is None:
            raise
        raise found from None


def tasks_at_once(config: Config) -> int | None:
    """Return how many tasks that fill a core should run at once: the cores of this machine; None on a named cluster.

    A private cluster has more logical CPUs than cores, for the sake of training.
    """
    return None if config.ray.address else cores()


def require_cpus(ray: Any, workers: int, use_gpu: bool) -> None:
    """Refuse at once what Ray would wait for without end.

    Training workers hold a CPU each for the whole run while data tasks need at least one more.

    Raises:
        MemmcError: naming what is there, what is needed and the settings to change.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if cpus < workers + 1:
        raise MemmcError(
            f"{workers} training workers need {workers + 1} CPUs, the cluster has {cpus}; "
            "lower train.num_workers or raise ray.num_cpus"
        )
    if use_gpu and gpus < workers:
        raise MemmcError(
            f"{workers} training workers need {workers} GPUs, the cluster has {gpus}; "
            "lower train.num_workers or set train.use_gpu=false"
        )


def _session_parent(home: Path) -> Path:
    """Make an empty folder for one Ray session, below `.memmc` when its path is short enough."""
    preferred = (home / "ray").absolute()
    if len(str(preferred)) + len("/xxxxxxxx") <= _LONGEST_SESSION_PARENT:
        preferred.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="", dir=preferred))
    return Path(tempfile.mkdtemp(prefix="memmc-"))


def _remove(folder: Path) -> None:
    """Remove a session's folder; its last processes may write for a moment after the shutdown."""
    for _ in range(_REMOVE_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.25)
