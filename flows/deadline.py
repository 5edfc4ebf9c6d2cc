"""A time limit on a step: what runs in this process is interrupted, a Ray job is stopped."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from memmc.errors import DeadlineError


class _ExpiredError(TimeoutError):
    """The limit of this module, and no other."""


@contextmanager
def time_limit(minutes: float | None) -> Generator[None]:
    """Interrupt what is done within once it has taken so long; None sets no limit.

    In the main thread a signal interrupts waiting too; in others it comes
    between two lines of Python.

    Raises:
        DeadlineError: the time was up.
    """
    from prefect.utilities.timeout import timeout

    try:
        with timeout(None if minutes is None else 60 * minutes, _ExpiredError):
            yield
    except _ExpiredError:
        raise DeadlineError(
            f"the step took longer than operate.deadline_minutes ({minutes:g}) and was stopped; what it has committed "
            "stays, and another run goes on from there. Raise the limit if this repeats"
        ) from None
