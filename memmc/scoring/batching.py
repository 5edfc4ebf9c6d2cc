"""How many images to judge together: found by trying, at the start."""

from __future__ import annotations

import time
from collections.abc import Callable

SMALLEST, LARGEST = 8, 256
GAIN = 1.05  # a doubling that brings less is not worth its memory
MEMORY_SHARE = 0.25  # of what is free, for the work of one batch


def find_batch_size(
    run: Callable[[int], object],
    *,
    smallest: int = SMALLEST,
    largest: int = LARGEST,
    memory: Callable[[], tuple[float, float]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the batch size after which doubling no longer raises the rate, or no longer fits.

    Args:
        run: does the work of one batch of the given size.
        smallest: tried first.
        largest: never exceeded.
        memory: bytes that the last `run` took at its peak, and bytes that are free; unbounded when absent.
        clock: in s.
    """
    run(smallest)  # the first batch pays for what is set up once
    best, best_rate, size = smallest, 0.0, smallest
    while size <= largest:
        try:
            rate = size / min(_seconds(run, size, clock) for _ in range(2))
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            break
        if rate < GAIN * best_rate:
            break
        best, best_rate = size, rate
        if memory is not None:
            taken, free = memory()
            if 2 * taken > MEMORY_SHARE * free:
                break
        size *= 2
    return best


def _seconds(run: Callable[[int], object], size: int, clock: Callable[[], float]) -> float:
    began = clock()
    run(size)
    return max(clock() - began, 1e-9)
