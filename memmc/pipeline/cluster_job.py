"""One step as a job on a Ray cluster, through the cluster's Jobs API: submitted once, followed, stopped on demand.

The job runs the same `memmc` command, with `--json`. Of its log only lines of
`progress_lines` and its result are read: the rest stays on the cluster. What
the cluster's dashboard shows of a job (command, environment, metadata) holds
no credentials and no key; those are the cluster's own (infra/docs/faults.md).

A job is named by the caller, so that one who was killed finds it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import queue
import re
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from memmc import errors
from memmc.config import RayConfig
from memmc.errors import ConfigError, MemmcError, StorageError
from memmc.pipeline.audit import ACTOR_VARIABLE, actor
from memmc.pipeline.progress import Progress
from memmc.pipeline.progress_lines import LINES, VARIABLE, json_object, pass_on
from memmc.pipeline.results import Result

_TRIES = 9  # jobs of one name; more have not helped
_POLL_S = 2.0
_PATIENCE_S = 300.0  # with a Jobs API that does not answer; a head node restarts in less
_REQUEST_S = 30.0
_LAST_LINES_S = 10.0

R = TypeVar("R", bound=Result)


def takes_jobs(ray: RayConfig) -> bool:
    """Say whether `ray.address` is that of a Jobs API, and not of a cluster to join."""
    return (ray.address or "").startswith(("http://", "https://"))


def run_job(ray: RayConfig, name: str, arguments: Sequence[str], kind: type[R], progress: Progress) -> R:
    """Run a `memmc` command on the cluster and return its result.

    A job of this name that is under way, or that has succeeded, is taken for
    this call's; one that failed or was stopped is followed by another. Left by a
    signal or a time limit, the job is stopped; left by an error it goes on, and
    the next call of the same name joins it.

    Args:
        ray: names the Jobs API.
        name: of the job; letters, digits and dashes.
        arguments: of `memmc`; the cluster's dashboard shows them.
        kind: of the result.
        progress: told what the job says.

    Raises:
        MemmcError: what the step raised there, by its name; or that the job ended without a word.
        StorageError: the Jobs API cannot be reached, or has lost the job.
        ConfigError: it refuses the token.
    """
    client = _Client(ray)
    try:
        job = _join(client, ray, name, arguments, progress)
        status = _follow(client, job, progress)
    except BaseException as left:
        if not isinstance(left, Exception):
            client.stop_all(f"{name}-")
        raise
    return _outcome(client.log(job), status, job, kind)


def stop_jobs(ray: RayConfig, prefix: str) -> int:
    """Stop the jobs whose names begin so, and are under way; return how many.

    Raises:
        StorageError: the Jobs API cannot be reached.
        ConfigError: it refuses the token.
    """
    return _Client(ray).stop_all(prefix)


def count_jobs(ray: RayConfig) -> int:
    """Return how many jobs the cluster knows, and so that it answers and takes the token.

    Raises:
        StorageError: the Jobs API cannot be reached.
        ConfigError: it refuses the token.
    """
    return len(_Client(ray).jobs())


def _join(client: _Client, ray: RayConfig, name: str, arguments: Sequence[str], progress: Progress) -> str:
    """Return the job of this name that is to be followed; submit one where there is none."""
    for number in range(1, _TRIES + 1):
        job = f"{name}-{number}"
        status = client.status(job)
        if status is None:
            client.submit(job, _command(ray, arguments))
            progress.message(f"Ray job {job} submitted")
            return job
        if status not in {"FAILED", "STOPPED"}:
            progress.message(f"Ray job {job} joined; it is {status}")
            return job
    raise MemmcError(f"{_TRIES} Ray jobs {name} have failed or were stopped; begin another run once the cause is known")


def _command(ray: RayConfig, arguments: Sequence[str]) -> str:
    """Return the job's shell line; variables set here spare the workers a runtime environment of their own.

    Who acts over there, for the audit trail, is who acts here.
    """
    variables = shlex.join((f"{VARIABLE}={LINES}", f"{ACTOR_VARIABLE}={actor()}"))
    command = f"exec env {variables} {ray.job_command} {shlex.join(arguments)}"
    return f"cd {shlex.quote(ray.job_directory)} && {command}" if ray.job_directory else command


def _follow(client: _Client, job: str, progress: Progress) -> str:
    """Pass the job's progress on until it has ended; return how."""
    tail = _Tail(client, job)
    heard = time.monotonic()
    while True:
        for line in tail.lines(_POLL_S):
            pass_on(line, progress)
        try:
            status = client.status(job)
        except StorageError:
            if time.monotonic() - heard > _PATIENCE_S:
                raise
            continue
        heard = time.monotonic()
        if status is None:
            raise StorageError(f"the Ray cluster no longer knows job {job}: its head node began anew; run again")
        if status in {"SUCCEEDED", "FAILED", "STOPPED"}:
            for line in tail.last_lines(_LAST_LINES_S):
                pass_on(line, progress)
            return status


def _outcome(log: str, status: str, job: str, kind: type[R]) -> R:
    """Return the result that stands in a log, or raise the error that does; the last such line counts."""
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for found in filter(None, map(json_object, reversed(log.splitlines()))):
        if status == "SUCCEEDED" and found.keys() == fields:
            return kind(**found)
        if found.keys() == {"error", "message"}:
            raise _named(str(found["error"]))(str(found["message"]))
    if status == "STOPPED":
        raise MemmcError(f"Ray job {job} was stopped on the cluster; run again to go on")
    raise MemmcError(
        f"Ray job {job} ended as {status} without a result or an error of memmc's own; its log stays on the cluster, "
        f"as it may hold patient data: `ray job logs {job}` there"
    )


def _named(name: str) -> type[MemmcError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, MemmcError) else MemmcError


class _Client:
    """The Jobs API, with a time limit on every request, and errors of ours.

    The token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH and travels as a header.
    """

    def __init__(self, ray: RayConfig) -> None:
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                options.setdefault("timeout", _REQUEST_S)
                return super()._do_request(method, endpoint, **options)

        # Ray lets these go before an address that is given.
        for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(variable, None)
        self.ray = self._ask(Client, ray.address, verify=ray.ca_file or True)

    def submit(self, job: str, command: str) -> None:
        """Begin a job; that another caller was first is as good. A cluster that has just begun is waited for."""
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self._ask(self.ray.submit_job, entrypoint=command, submission_id=job)
                return
            except StorageError:
                if self.status(job) is not None:
                    return
                if time.monotonic() > end:
                    raise
            time.sleep(_POLL_S)

    def status(self, job: str) -> str | None:
        """Return the job's status; None if the cluster does not know it."""
        try:
            return str(self._ask(self.ray.get_job_status, job).value)
        except _UnknownJobError:
            return None

    def stop_all(self, prefix: str) -> int:
        """Have the jobs stopped whose names begin so; return how many were under way."""
        return sum(bool(self._ask(self.ray.stop_job, job)) for job in self.jobs() if job.startswith(prefix))

    def jobs(self) -> list[str]:
        """Return the names of all jobs."""
        return [job.submission_id for job in self._ask(self.ray.list_jobs) if job.submission_id]

    def log(self, job: str) -> str:
        """Return what the job has written."""
        return str(self._ask(self.ray.get_job_logs, job))

    def _ask(self, question: Any, *arguments: Any, **options: Any) -> Any:
        """Ask; the answers of the Jobs API are errors of the tree, without its text, which quotes the command."""
        import requests
        from ray.exceptions import AuthenticationError

        failure: MemmcError
        try:
            return question(*arguments, **options)
        except AuthenticationError:
            failure = ConfigError(
                "the Ray cluster refuses the token; give the cluster's in RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            )
        except (requests.RequestException, OSError) as error:
            failure = StorageError(
                f"the Ray cluster's Jobs API does not answer ({type(error).__name__}); check ray.address"
            )
        except RuntimeError as error:
            found = re.search(r"status code (\d{3})", str(error))
            code = found.group(1) if found else "no status"
            failure = (
                _UnknownJobError() if code == "404" else StorageError(f"the Ray cluster's Jobs API failed ({code})")
            )
        raise failure


class _UnknownJobError(StorageError):
    """The cluster knows no such job."""


class _Tail:
    """Follows a job's log in a thread of its own; begins again where it was when the connection is lost."""

    def __init__(self, client: _Client, job: str) -> None:
        self._client, self._job = client, job
        self._queue = queue.SimpleQueue[str]()
        self._thread = threading.Thread(target=self._work, daemon=True, name="ray-job-log")
        self._rest, self._passed = "", 0
        self._ended = False
        self._thread.start()

    def lines(self, wait_s: float) -> Iterator[str]:
        """Yield what has come, for so long, s."""
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            try:
                chunk = self._queue.get(timeout=left)
            except queue.Empty:
                return
            *whole, self._rest = (self._rest + chunk).split("\n")
            yield from whole

    def last_lines(self, wait_s: float) -> Iterator[str]:
        """Yield what is left of an ended job."""
        self._ended = True
        self._thread.join(wait_s)
        while not self._queue.empty():
            yield from self.lines(0.1)

    def _work(self) -> None:
        while True:
            try:
                asyncio.run(self._read())
                return
            except Exception:  # noqa: BLE001 - any loss of the connection; the job's status is asked elsewhere
                if self._ended:
                    return
                time.sleep(_POLL_S)

    async def _read(self) -> None:
        """Read on from where the last reading ended; the cluster sends a log from its beginning."""
        position = 0
        async for chunk in self._client.ray.tail_job_logs(self._job):
            fresh = chunk[max(0, self._passed - position) :]
            position += len(chunk)
            if fresh:
                self._queue.put(fresh)
                self._passed = position
