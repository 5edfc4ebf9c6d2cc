"""How far a run is, and how fast: time that all workers agree on, and the share of it spent on waiting for batches."""

from __future__ import annotations

import time
from collections.abc import Iterator

from memmc.config import TrainConfig
from memmc.errors import TrainingError
from memmc.training.checkpoint import RunState
from memmc.training.feed import Batch
from memmc.training.peers import Sync


class Clock:
    """Progress of the run, equal on all ranks: rank 0's time, carried on at its pace between two words."""

    def __init__(self, config: TrainConfig, sync: Sync, state: RunState) -> None:
        self._sync = sync
        self._max_steps, self._max_seconds = config.max_steps, config.max_minutes * 60.0
        self._start = time.monotonic() - state.elapsed_s
        self._agreed_s, self._agreed_step, self._pace_s = state.elapsed_s, state.step, 0.0

    @property
    def own_s(self) -> float:
        """Wall time of the run as this worker sees it, over all attempts, s."""
        return time.monotonic() - self._start

    def agree(self, step: int) -> float:
        """Take rank 0's elapsed time and return it; every rank must call this at the same steps."""
        now_s = self._sync.broadcast_float(self.own_s)
        if step > self._agreed_step:
            self._pace_s = max(now_s - self._agreed_s, 0.0) / (step - self._agreed_step)
        self._agreed_s, self._agreed_step = now_s, step
        return now_s

    def progress(self, step: int) -> float:
        """Return the share of the run that is over, the larger of steps and time; 1 or more ends it."""
        elapsed_s = self._agreed_s + self._pace_s * (step - self._agreed_step)
        return max(step / self._max_steps, elapsed_s / self._max_seconds)

    def final_s(self, step: int) -> float:
        """Return the time to keep of a run that is over: where time has ended it, enough for it to stay so, s."""
        by_time = step < self._max_steps and self.progress(step) >= 1.0
        return max(self.own_s, self._max_seconds) if by_time else self.own_s


class Window:
    """Batches, and the time spent on them since the last log entry."""

    def __init__(self, stream: Iterator[Batch], images: int) -> None:
        self._stream, self._images = stream, images
        self._start, self._waited_s = time.monotonic(), 0.0

    def next_batch(self) -> Batch:
        """Return the next batch.

        Raises:
            TrainingError: there is none.
        """
        began = time.monotonic()
        batch = next(self._stream, None)
        if batch is None:
            raise TrainingError("the batches came to an end; are there training images?")
        self._waited_s += time.monotonic() - began
        return batch

    def close(self, images: int) -> dict[str, float]:
        """Return the rates of the window and begin the next one."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rates = {"images_per_s": (images - self._images) / seconds, "data_wait": self._waited_s / seconds}
        self._images, self._start, self._waited_s = images, now, 0.0
        return rates
