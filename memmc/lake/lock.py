"""One writer at a time, on whatever machine: a lock that lies in the storage, and that no killed holder keeps.

Holders have numbers, each an object that is made once (`Storage.create`); the highest number holds. A holder writes its
object anew every few seconds. Who waits takes the next number when the object says that it was given back, or when it
has not changed for `SILENT_S` of the waiter's own clock, so that clocks need not agree.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
import uuid
from collections.abc import Generator

from memmc.errors import StorageError
from memmc.lake.refresh import refreshed
from memmc.lake.storage import Storage
from memmc.s3 import AbsentError

REFRESH_S = 10.0
SILENT_S = 90.0
_LOOK_S = 0.2
_FREE = b"free"
_NUMBER = re.compile(r"[0-9]{12}")


@contextlib.contextmanager
def locked(storage: Storage, folder: str) -> Generator[None]:
    """Hold the lock while the body runs; wait for whoever holds it.

    Args:
        storage: where it lies.
        folder: the lock's name, a folder of its own.

    Raises:
        StorageError: the place cannot be read or written.
    """
    owner = uuid.uuid4().hex
    name, beats = _take(storage, folder, owner), itertools.count()
    try:
        with refreshed(lambda: storage.write(name, f"{owner} {next(beats)}".encode()), REFRESH_S, "lock"):
            yield
    finally:
        with contextlib.suppress(StorageError):  # a lock that is not given back is followed when it falls silent
            storage.write(name, _FREE)


def _take(storage: Storage, folder: str, owner: str) -> str:
    """Return the name of the object that this caller has made and that no other follows."""
    known, since = ("", b""), time.monotonic()
    while True:
        found = _last(storage, folder)
        if found != known:
            known, since = found, time.monotonic()
        last, state = found
        if not last or state == _FREE or time.monotonic() - since > SILENT_S:
            name = f"{folder}/{int(last.rpartition('/')[2] or 0) + 1:012d}"
            if _made(storage, name, owner.encode()) and _only(storage, folder, name):
                return name
        else:
            time.sleep(_LOOK_S)


def _last(storage: Storage, folder: str) -> tuple[str, bytes]:
    """Return name and content of the highest number's object, empty where there is none."""
    while names := _numbers(storage, folder):
        with contextlib.suppress(AbsentError):  # a later holder has just removed it
            return names[-1], storage.read(names[-1])
    return "", b""


def _numbers(storage: Storage, folder: str) -> list[str]:
    """Return the holders' objects in order, and nothing else that lies there."""
    return [name for name in storage.list(folder) if _NUMBER.fullmatch(name.rpartition("/")[2])]


def _made(storage: Storage, name: str, data: bytes) -> bool:
    """Return whether this caller made the object; after a lost answer the store may call it another's."""
    if storage.create(name, data):
        return True
    with contextlib.suppress(AbsentError):
        return storage.read(name) == data
    return False


def _only(storage: Storage, folder: str, name: str) -> bool:
    """Remove the objects of earlier holders; return False, and remove this one, where a later one is there."""
    names = _numbers(storage, folder)
    mine = names[-1] == name
    for other in names:
        if other < name or (other == name and not mine):
            storage.delete(other)
    return mine
