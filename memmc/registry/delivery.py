"""Bring entries to the tracking store from a thread of its own, so that no step of a training waits for a server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memmc.errors import StorageError
from memmc.registry.spool import FILES, Spool, left_behind

logger = logging.getLogger(__name__)

Entry = Mapping[str, Any]
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 10.0


class RefusedError(StorageError):
    """The store answered that it will never take this entry, as when its run was deleted."""


class Delivery:
    """Entries on their way to one store; each goes through a spool, and in order.

    The thread lives as long as something waits. An entry may be sent twice, where its answer was lost: metrics of the
    same step, time and value are one to MLflow, artifacts are overwritten by themselves.

    Attributes:
        lost: values that were neither delivered nor kept: the disk was full, or the store refused them for good.
    """

    def __init__(self, folder: Path, send: Callable[[Entry, Path], None]) -> None:
        """Prepare; nothing is made before the first entry.

        Args:
            folder: where spools lie.
            send: delivers one entry, whose kept files lie under the folder given; raises StorageError to be asked again
                later, `RefusedError` to be asked never again.
        """
        self.lost = 0
        self._folder, self._send = folder, send
        self._spool: Spool | None = None
        self._changed = threading.Condition()
        self._running = self._hurry = self._failing = False

    @property
    def waiting(self) -> int:
        """How many values and artifacts of this process are not delivered yet."""
        with self._changed:
            return self._spool.waiting if self._spool else 0

    def put(self, entry: dict[str, Any], file: Path | None = None) -> None:
        """Take an entry; returns as soon as it is in the spool's file.

        Args:
            entry: JSON values with `run` and `count`.
            file: file or folder that belongs to it; copied.
        """
        with self._changed:
            try:
                self._spool = self._spool or Spool.begin(self._folder, str(entry["run"]))
                kept = {"file": self._spool.keep(file)} if file else {}
                self._spool.append({**entry, **kept})
            except OSError as error:
                if not self.lost:  # said once
                    why = error.strerror
                    logger.warning("values for the tracking store are lost (%s); check the disk under .memmc", why)
                self.lost += int(entry["count"])
                return
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, daemon=True, name="tracking").start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is delivered; return whether it is."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def replay(self) -> int:
        """Deliver what processes that are gone have left; return how many values and artifacts.

        Raises:
            StorageError: the store does not answer; what is left stays.
        """
        done = 0
        for folder in left_behind(self._folder):
            try:
                spool = Spool(folder)
            except OSError:
                continue  # its process is at work
            try:
                while (found := spool.next()) is not None:
                    entry, end = found
                    done += self._deliver(spool, entry)
                    spool.delivered(entry, end)
            finally:
                spool.close()
        return done

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while (spool := self._spool) is not None:
            with self._changed:
                found = spool.next()
                if found is None:
                    spool.close()
                    self._spool, self._running = None, False
                    self._changed.notify_all()
                    return
            entry, end = found
            try:
                self._deliver(spool, entry)
            except StorageError as error:
                self._fail(spool, error)
                self._rest(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            pause = _FIRST_PAUSE_S
            with self._changed:
                spool.delivered(entry, end)
                if self._failing:
                    self._failing = False
                    logger.info("the tracking store answers again; %d values and artifacts follow", spool.waiting)

    def _deliver(self, spool: Spool, entry: Entry) -> int:
        """Send one entry; return how many values of it the store has now."""
        try:
            self._send(entry, spool.folder / FILES / str(entry.get("file", "")))
        except RefusedError as error:
            self.lost += int(entry["count"])
            logger.warning("%s; %d values of run %s are dropped", error, entry["count"], entry["run"])
            return 0
        return int(entry["count"])

    def _fail(self, spool: Spool, error: StorageError) -> None:
        if not self._failing:
            self._failing = True
            spool.persist()
            logger.warning("%s; work goes on, what is logged is kept and sent when it answers", error)

    def _rest(self, pause_s: float) -> None:
        """Wait a while, or until `flush` asks for a try at once."""
        end = time.monotonic() + pause_s
        with self._changed:
            self._changed.wait_for(lambda: self._hurry, max(0.0, end - time.monotonic()))
            self._hurry = False
