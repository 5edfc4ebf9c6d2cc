"""A step's progress as Prefect artifacts, sent from a thread of its own: a slow server cannot hold up the step."""

from __future__ import annotations

import contextvars
import logging
import threading
import uuid
from types import TracebackType
from typing import Self

from flows.naming import artifact_key
from memmc.pipeline.progress import Progress

logger = logging.getLogger(__name__)

_EVERY_S = 2.0
_LAST_WORD_S = 10.0


class PrefectProgress:
    """One progress artifact per stage, brought up to date at most every two seconds; messages go to the run's log.

    Stages that begin and end between two updates leave no artifact. Must be
    entered inside a flow or task run.
    """

    def __init__(self, key: str, every_s: float = _EVERY_S) -> None:
        from prefect import get_run_logger

        self._key, self._every_s = key, every_s
        self._log = get_run_logger()
        self._name, self._percent, self._note = "", 0.0, ""
        self._artifact: tuple[str, uuid.UUID] | None = None
        self._sent: tuple[str, float, str] | None = None
        self._lost = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        context = contextvars.copy_context()  # artifacts find their run in it
        self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True, name="prefect-progress")
        self._total: float | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with self._lock:
                self._percent = 100.0
        self._stopped.set()
        self._thread.join(_LAST_WORD_S)

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage; the one before it is finished."""
        with self._lock:
            self._name, self._total, self._percent, self._note = name, total, 0.0, ""
        self._log.info("%s%s", name, "" if total is None else f": {total:g}")

    def advance(self, done: float, note: str = "") -> None:
        """Note the course of the current stage."""
        with self._lock:
            self._note = note
            if self._total:
                self._percent = min(100.0, max(0.0, 100.0 * done / self._total))

    def message(self, text: str) -> None:
        """Write one line into the run's log."""
        self._log.info("%s", text)

    def _work(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._send()
        self._send()

    def _send(self) -> None:
        import httpx
        from prefect.exceptions import PrefectException

        with self._lock:
            now = (self._name, self._percent, self._note)
        if not now[0] or now == self._sent:
            return
        try:
            self._publish(*now)
            self._sent = now
        except (httpx.HTTPError, PrefectException, OSError) as error:
            if not self._lost:
                logger.warning("progress could not be sent to the Prefect server (%s)", type(error).__name__)
            self._lost = True

    def _publish(self, name: str, percent: float, note: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        text = f"{name}: {note}" if note else name
        if self._artifact is None or self._artifact[0] != name:
            if self._artifact is not None:
                update_progress_artifact(self._artifact[1], progress=100.0)
            made = create_progress_artifact(percent, key=artifact_key(self._key, name), description=text)
            if isinstance(made, uuid.UUID):  # always, in a thread without an event loop
                self._artifact = (name, made)
        else:
            update_progress_artifact(self._artifact[1], progress=percent, description=text)


class Both:
    """Tells two listeners."""

    def __init__(self, first: Progress, second: Progress) -> None:
        self._listeners = (first, second)

    def stage(self, name: str, total: float | None = None) -> None:
        """Begin a stage."""
        for listener in self._listeners:
            listener.stage(name, total)

    def advance(self, done: float, note: str = "") -> None:
        """Move the current stage."""
        for listener in self._listeners:
            listener.advance(done, note)

    def message(self, text: str) -> None:
        """Pass a line on."""
        for listener in self._listeners:
            listener.message(text)
