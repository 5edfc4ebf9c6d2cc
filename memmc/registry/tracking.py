"""Runs, parameters and metrics in MLflow: an SQLite file beside the work, or a server.

MLflow is imported when a connection is opened, never before: it costs seconds
and reads its settings from the environment at import.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from memmc.config import TrackingConfig
from memmc.errors import ConfigError, StorageError
from memmc.registry.delivery import Delivery, Entry, RefusedError
from memmc.registry.spool import VALUES_AT_ONCE

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")

# Set only where the user has not: no telemetry, and a server that is down costs seconds to a minute and a half instead
# of the four to sixteen minutes that MLflow's own seven retries take.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for the one JSON object
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
# For the first call: whether anybody answers is known within seconds.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
_REFUSED = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # the run is gone, or was deleted
_LAST_WAIT_S = 60.0
_ASK_EVERY_S = 5.0
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000


def open_tracking(config: TrackingConfig, home: Path) -> Tracking:
    """Open the tracking store; one SQLite file and a folder under `home` when the configuration names none.

    Args:
        home: the working directory's `.memmc`; made when absent.

    Raises:
        ConfigError: `tracking.uri` is neither a database nor an HTTP(S) server.
        StorageError: the store cannot be reached or opened.
    """
    home = home.absolute()
    uri = config.uri or f"sqlite:///{home / 'mlflow.db'}"
    scheme = re.split(r"[:+]", uri, maxsplit=1)[0]
    if scheme not in _SCHEMES:
        raise ConfigError(f"tracking.uri begins with '{scheme}:'; expected one of {', '.join(_SCHEMES)}")
    home.mkdir(parents=True, exist_ok=True)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Tracking(uri, home)


class Tracking:
    """One tracking store.

    What is logged while training runs is taken at once and never raises: it goes through a file
    (`memmc.registry.spool`) to a thread that writes it, in order, as soon as the store answers; what a process that
    died has left, `replay` sends.

    Attributes:
        uri: of the store.
        home: folder of the embedded state; downloaded models are kept under it.
    """

    def __init__(self, uri: str, home: Path) -> None:
        import mlflow

        self.uri = uri
        self.home = home
        self._delivery = Delivery(home / "spool" / hashlib.sha256(uri.encode()).hexdigest()[:12], self._send)
        self._wait_s = _LAST_WAIT_S
        # MLflow's SQL registry looks logged models up through the process-wide URI, whatever a client was given.
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        with _environment(_IMPATIENT), self.reaching("opened"):
            self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._client.search_experiments(max_results=1)

    @property
    def client(self) -> MlflowClient:
        """The MLflow client, with this store as the process-wide one."""
        import mlflow

        if mlflow.get_tracking_uri() != self.uri:
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_registry_uri(self.uri)
        return self._client

    @property
    def place(self) -> str:
        """The URI without credentials, fit for a message."""
        return re.sub(r"//[^/@]*@", "//", self.uri)

    def start_run(
        self,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """Begin a run; return its id.

        Args:
            experiment: `memmc/<cohort>`; made when absent.
            params: flat names; values are written as text.

        Raises:
            StorageError: the store cannot be reached.
        """
        from mlflow.entities import Param

        with self.reaching("written"):
            run = self.client.create_run(
                self._experiment_id(experiment),
                tags={name: value[:_TAG_LENGTH] for name, value in (tags or {}).items()},
                run_name=run_name,
            )
            written = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in (params or {}).items()]
            for part in _batched(written, _PARAMS_PER_CALL):
                self.client.log_batch(run.info.run_id, params=part)
        return run.info.run_id

    @property
    def waiting(self) -> int:
        """Values and artifacts that were logged here and the store does not have yet."""
        return self._delivery.waiting

    @property
    def lost(self) -> int:
        """Values and artifacts that the store refused for good, or that a full disk could not keep."""
        return self._delivery.lost

    def log_metrics(self, run_id: str, points: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log `(step, {name: value})` points in as few calls as MLflow allows; returns at once."""
        now_ms = int(time.time() * 1000)
        values = [(name, float(value), now_ms, step) for step, point in points for name, value in point.items()]
        for part in _batched(values, VALUES_AT_ONCE):
            self._delivery.put({"run": run_id, "kind": "metrics", "count": len(part), "values": part})

    def log_artifact(self, run_id: str, file: Path, folder: str | None = None) -> None:
        """Attach one file, as it is now, to a run; returns when it is copied."""
        self._delivery.put({"run": run_id, "kind": "artifact", "count": 1, "folder": folder}, file)

    def log_artifacts(self, run_id: str, files: Path, folder: str | None = None) -> None:
        """Attach everything in the folder `files`, as it is now, to a run; returns when it is copied."""
        self.log_artifact(run_id, files, folder)

    def log_text(self, run_id: str, texts: Mapping[str, str], folder: str | None = None) -> None:
        """Attach small text files, name -> content, to a run."""
        with tempfile.TemporaryDirectory(prefix="memmc-") as aside:
            for name, text in texts.items():
                Path(aside, name).write_text(text, encoding="utf-8")
            self.log_artifacts(run_id, Path(aside), folder)

    def describe_version(self, run_id: str, name: str, version: str, text: str) -> None:
        """Set the Markdown that MLflow shows beside a version of a model; `run_id` is the run that made it."""
        self._delivery.put(
            {"run": run_id, "kind": "describe", "count": 1, "name": name, "version": version, "text": text}
        )

    def read_text(self, run_id: str, path: str) -> str | None:
        """Return a text artifact of a run, None where it has none of this path.

        Raises:
            StorageError: the store or its artifacts cannot be reached.
        """
        self.flush()
        with tempfile.TemporaryDirectory(prefix="memmc-") as aside, self.reaching("read"):
            listed = self.client.list_artifacts(run_id, path.rpartition("/")[0])
            if path not in {entry.path for entry in listed}:
                return None
            return Path(self.client.download_artifacts(run_id, path, aside)).read_text(encoding="utf-8")

    def flush(self) -> bool:
        """Wait a while until the store has all that was logged; return whether it has."""
        return self._delivery.flush(self._wait_s)

    def end_run(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """Close a run, after all that was logged; waits a while for a store that does not answer."""
        ended = int(time.time() * 1000)
        self._delivery.put({"run": run_id, "kind": "end", "count": 1, "status": status, "at": ended})
        if not self.flush():
            self._wait_s = 1.0  # the runs that end after this one do not each wait
            logger.warning(
                "%d values of run %s and others wait for the tracking store %s; the next training here sends them, "
                "or 'memmc tracking replay'",
                *(self.waiting, run_id, self.place),
            )

    def resume_run(self, run_id: str) -> None:
        """Open a run again that another process began.

        Raises:
            StorageError: the store cannot be reached.
        """
        with self.reaching("written"):
            self.client.update_run(run_id, status="RUNNING")

    def replay(self) -> int:
        """Send what processes that are gone could not send; return how many values and artifacts.

        Raises:
            StorageError: the store cannot be reached; all stays.
        """
        return self._delivery.replay()

    def wait_for_store(self, minutes: float, say: Callable[[str], None]) -> None:
        """Return as soon as the store answers.

        Args:
            minutes: how long to wait for it, min.
            say: told once that it is waited for.

        Raises:
            StorageError: it did not answer in that time.
        """
        end, said = time.monotonic() + 60 * minutes, False
        while True:
            try:
                with self.reaching("reached"):
                    self.client.search_experiments(max_results=1)
                return
            except StorageError as error:
                if time.monotonic() + _ASK_EVERY_S > end:
                    raise
                if not said:
                    say(f"{error}; waiting up to {minutes:g} min for it")
                said = True
                time.sleep(_ASK_EVERY_S)

    def metric_history(self, run_id: str | None, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a run's metric, in order of steps; empty for an unknown run.

        Raises:
            StorageError: the store cannot be reached.
        """
        if run_id is None:
            return []
        self.flush()
        with self.reaching("read"):
            return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, name))

    @contextmanager
    def reaching(self, purpose: str) -> Generator[None]:
        """Turn MLflow's and the database's failures into StorageError.

        Raises:
            StorageError: with the store's place, the kind of failure and what to check.
        """
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
            kind = getattr(error, "error_code", None) or type(error).__name__
            raise StorageError(
                f"the tracking store {self.place} could not be {purpose} ({kind}); "
                "check tracking.uri and that its server runs"
            ) from error

    def _send(self, entry: Entry, files: Path) -> None:
        """Write one spooled entry to the store; see `Delivery`."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        run_id, kind = str(entry["run"]), entry["kind"]
        try:
            with self.reaching("written"):
                if kind == "metrics":
                    self.client.log_batch(run_id, metrics=[Metric(*value) for value in entry["values"]])
                elif kind == "artifact":
                    self.client.log_artifacts(run_id, str(files), entry["folder"])
                elif kind == "describe":
                    self.client.update_model_version(entry["name"], entry["version"], entry["text"])
                else:
                    self.client.set_terminated(run_id, str(entry["status"]), entry["at"])
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, MlflowException) and cause.error_code in _REFUSED:
                raise RefusedError(f"the tracking store {self.place} refused a write ({cause.error_code})") from cause
            raise

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        remote = self.uri.startswith("http")
        try:
            return self.client.create_experiment(
                name, artifact_location=None if remote else (self.home / "mlartifacts").as_uri()
            )
        except MlflowException:
            # Another process may have made it meanwhile.
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id


@contextmanager
def _environment(settings: Mapping[str, str]) -> Generator[None]:
    """Set variables that MLflow reads at each request, for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _batched(values: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
