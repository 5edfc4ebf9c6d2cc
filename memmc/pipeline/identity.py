"""The identity key: who may turn pseudonyms back into paths. It is never in the lake."""

from __future__ import annotations

import os
import secrets
import uuid
from pathlib import Path

from memmc.config import Config
from memmc.dicom.deidentify import load_key, parse_key
from memmc.errors import IdentityKeyError
from memmc.pipeline.custody import check_private, handed_over
from memmc.pipeline.progress import Progress, Silent

_THROW_AWAY = "deid.key"


def home_directory() -> Path:
    """Return the working directory's `.memmc`: all state of the embedded mode but the lake."""
    return Path.cwd() / ".memmc"


def identity_key(config: Config, home: Path, progress: Progress | None = None) -> bytes:
    """Return the identity key; make a throw-away one when none is handed over or named.

    Raises:
        IdentityKeyError: the named file cannot be read, can be changed by others, or the key is too short.
    """
    key = _given_key(config, progress)
    if key is not None:
        return key
    path = home / _THROW_AWAY
    if not path.exists() and _made(path):
        (progress or Silent()).message(
            f"No deid.key_file given: made a throw-away identity key, {path.relative_to(Path.cwd())}. "
            "Keep it: this lake's pseudonyms cannot be continued without it."
        )
    return load_key(str(path))


def _made(path: Path) -> bool:
    """Make a key, whole or not at all; return False where another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def key_for_preview(config: Config, home: Path, progress: Progress | None = None) -> bytes:
    """Return the identity key; where the caller holds none, one that is forgotten. Nothing is written.

    Raises:
        IdentityKeyError: as `identity_key`.
    """
    return held_key(config, home, progress) or secrets.token_bytes(32)


def held_key(config: Config, home: Path, progress: Progress | None = None) -> bytes | None:
    """Return the identity key if the caller holds one; never make one.

    Raises:
        IdentityKeyError: as `identity_key`.
    """
    key = _given_key(config, progress)
    if key is not None:
        return key
    path = home / _THROW_AWAY
    return load_key(str(path)) if path.exists() else None


def _given_key(config: Config, progress: Progress | None = None) -> bytes | None:
    handed = handed_over()
    if handed is not None:
        return parse_key(handed)
    if config.deid.key_secret is not None:
        raise IdentityKeyError(
            "deid.key_secret names a Prefect Secret block, which only a flow can read; run with --flow, or hand the "
            "key over as MEMMC_DEID_KEY or deid.key_file"
        )
    if config.deid.key_file is None:
        return None
    if (warning := check_private(Path(config.deid.key_file))) and progress:
        progress.message(warning)
    return load_key(config.deid.key_file)
