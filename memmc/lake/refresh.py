"""What has to be written anew, while work goes on, for others to see that it does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator

from memmc.errors import StorageError


@contextlib.contextmanager
def refreshed(write: Callable[[], None], every_s: float, name: str) -> Generator[None]:
    """Call `write` at intervals while the body runs, never before it has waited, and not after the body has ended.

    Args:
        write: says that the work goes on; where the store fails, the next call may find it again.
        every_s: from the end of one call to the next, s.
        name: of the thread.
    """
    over = threading.Event()

    def keep_writing() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(StorageError):
                write()

    thread = threading.Thread(target=keep_writing, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
