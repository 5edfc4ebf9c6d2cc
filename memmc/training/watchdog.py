"""Ends a process whose work has stopped, so that what waits for it fails instead of waiting for ever."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Watchdog:
    """Expects a beat every `seconds`, from the first beat on.

    Args:
        seconds: longest silence, s.
        on_silence: called once, from a thread; kills this process when absent, since a thread that hangs cannot be
            ended in another way.
    """

    def __init__(self, seconds: float, on_silence: Callable[[], None] | None = None) -> None:
        self._seconds = seconds
        self._on_silence = on_silence or self._kill
        self._last_s: float | None = None
        self._over = threading.Event()

    def beat(self) -> None:
        """Say that work goes on."""
        self._last_s = time.monotonic()

    @contextmanager
    def guarding(self) -> Generator[Watchdog]:
        """Watch within the block."""
        thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    @contextmanager
    def away(self) -> Generator[None]:
        """Expect no beat within the block: an upload takes as long as it takes."""
        self._last_s = None
        try:
            yield
        finally:
            self.beat()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 10, 5.0)):
            last_s = self._last_s
            if last_s is not None and time.monotonic() - last_s > self._seconds:
                self._on_silence()
                return

    def _kill(self) -> None:
        logger.error("no training step for %.0f s (train.hung_seconds); this worker ends itself", self._seconds)
        os.kill(os.getpid(), signal.SIGKILL)
