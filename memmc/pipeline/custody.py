"""How the identity key reaches a process: handed over in memory, or read from a file that its owner alone can read.

A handed-over key comes from the environment (`MEMMC_DEID_KEY`), from which it
is taken at once so that no child process inherits it, or from a flow that
resolved a secret. It never stands in a configuration, a parameter or a log.
"""

from __future__ import annotations

import stat
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from memmc.errors import IdentityKeyError

KEY_VARIABLE = "MEMMC_DEID_KEY"

_held: list[str] = []


def adopt(environment: MutableMapping[str, str]) -> None:
    """Take the key out of the environment, if it is there."""
    value = environment.pop(KEY_VARIABLE, None)
    if value is not None:
        hold(value)


def hold(value: str | None) -> None:
    """Keep a key for this process, in place of one held before; None forgets it."""
    _held.clear()
    if value is not None:
        _held.append(value)


@contextmanager
def holding(value: str) -> Generator[None]:
    """Keep a key for the length of a step."""
    before = list(_held)
    hold(value)
    try:
        yield
    finally:
        _held[:] = before


def handed_over() -> bytes | None:
    """Return the key as it was handed over, or None."""
    return _held[0].encode() if _held else None


def check_private(path: Path) -> str | None:
    """Refuse a key file that others than its owner may change; one that is not there passes.

    Returns:
        What to say when others may read it, as they may where a cluster mounts secrets for a group; else None.

    Raises:
        IdentityKeyError: with the command that mends it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return None
    if mode & 0o022:
        raise IdentityKeyError(
            f"the identity key's file can be changed by others (mode {mode:04o}); run 'chmod 600' on it, and "
            "make a new key (infra/docs/keys.md) if others had access"
        )
    if mode & 0o044:
        return f"Others can read the identity key's file (mode {mode:04o}): run 'chmod 600' on it."
    return None
