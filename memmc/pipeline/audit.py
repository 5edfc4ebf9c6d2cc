"""Who did what, when, with which version: one record of the audit trail per action (`memmc.lake.audit`).

Records hold cohorts, models, versions, counts and pseudonyms; never a path, a name or an error's text.
"""

from __future__ import annotations

import functools
import getpass
import inspect
import json
import logging
import os
import re
import socket
import subprocess
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import memmc
from memmc.config import Config
from memmc.errors import GateRefused, MemmcError, UsageError
from memmc.lake.audit import HEAD, Head, append, read_head
from memmc.lake.storage import Storage

logger = logging.getLogger(__name__)

Outcome = Literal["ok", "refused", "failed"]
P = ParamSpec("P")
R = TypeVar("R")

ACTOR_VARIABLE = "MEMMC_ACTOR"
VERIFIED_VARIABLE = "MEMMC_ACTOR_VERIFIED_BY"
_LONGEST = 16_384  # bytes of a subject
_UNFIT = re.compile(r"://|\\|\^|^[/~]|\.\./|[^\x20-\x7e]")
_COHORT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_ACTOR: ContextVar[tuple[str, str] | None] = ContextVar("actor", default=None)
_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def note(config: Config, action: str, *, outcome: Outcome = "ok", **subject: Any) -> Head:
    """Append one record to the lake's audit trail; see `note_in`."""
    return note_in(Storage.open(config.lake.uri), action, outcome=outcome, **subject)


def note_in(storage: Storage, action: str, *, outcome: Outcome = "ok", **subject: Any) -> Head:
    """Append one record to the audit trail of a lake, or of the identity vault.

    Args:
        storage: the place's.
        action: a verb: ``ingest``, ``promote``, ...
        outcome: ``ok``, ``refused`` (by a gate or a person) or ``failed``.
        subject: small JSON values: cohort, model, versions, counts, pseudonyms.

    Returns:
        The new end of the chain; kept elsewhere, it shows later that nothing before it was cut off or changed.

    Raises:
        ValueError: a value looks like a path, an address or a name in DICOM's form, or they are too long together.
        StorageError: the place cannot be written.
    """
    check_subject(subject)
    at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {
        "action": action,
        "outcome": outcome,
        "at": at,
        "subject": subject,
        **_who(),
        "software": dict(_version()),
    }
    return append(storage, record)


def has_trail(config: Config) -> bool:
    """Return whether anything was ever recorded in the lake."""
    return Storage.open(config.lake.uri).exists(HEAD)


def head_of(config: Config) -> str:
    """Return the end of the lake's audit trail as text, to be kept where who can write the lake cannot write."""
    return str(read_head(Storage.open(config.lake.uri)) or Head())


@contextmanager
def acting(actor: str, basis: str) -> Generator[None]:
    """Name who acts within the block; a platform's scheduler calls it.

    Args:
        actor: name of a deployment or service.
        basis: how that is known, as in `deployment`.
    """
    token = _ACTOR.set((actor, basis))
    try:
        yield
    finally:
        _ACTOR.reset(token)


def recorded(
    action: str, subject: Callable[[Any], Mapping[str, Any] | None]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a step, whose first argument is the configuration, so that each call leaves one record.

    Its `cohort` argument is recorded too. A call within another recorded one is part of it and leaves none; nor does
    a wrong call (`UsageError`) or one with `dry_run`, which did nothing.

    Args:
        action: as in `note`.
        subject: result -> what to record; None for a call that changed and showed nothing.
    """

    def decorate(step: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(step)

        @functools.wraps(step)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            if _RECORDING.get() or given.get("dry_run"):
                return step(*args, **kwargs)
            token = _RECORDING.set(True)
            try:
                result = step(*args, **kwargs)
            except BaseException as error:
                _note_failure(given, action, error)
                raise
            finally:
                _RECORDING.reset(token)
            found = subject(result)
            if found is not None:
                values: dict[str, Any] = {**_cohort(given), **found}
                note(given["config"], action, **values)
            return result

        return wrapper

    return decorate


def check_subject(subject: Mapping[str, Any]) -> None:
    """Refuse what may name a patient or a place.

    Raises:
        ValueError: saying which value, but not its text.
    """
    for name, value in subject.items():
        if any(_UNFIT.search(text) for text in _texts(value)):
            raise ValueError(f"audit: '{name}' looks like a path, an address or a name; record a pseudonym or a count")
    if len(json.dumps(subject)) > _LONGEST:
        raise ValueError(f"audit: the subject is longer than {_LONGEST} bytes; record counts")


def _texts(value: Any) -> Generator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _note_failure(given: Mapping[str, Any], action: str, error: BaseException) -> None:
    """Record a failure where there is a trail; the error itself matters more than its record."""
    config = given["config"]
    if isinstance(error, UsageError):
        return
    try:
        if not has_trail(config):
            return  # nothing was ever done here: a mistyped place is not made a lake
        outcome: Outcome = "refused" if isinstance(error, GateRefused) else "failed"
        found: dict[str, Any] = {"error": type(error).__name__, **_cohort(given)}
        note(config, action, outcome=outcome, **found)
    except MemmcError as failure:
        logger.warning(
            "the failure of %s could not be recorded in the audit trail (%s)", action, type(failure).__name__
        )


def _cohort(given: Mapping[str, Any]) -> dict[str, str]:
    cohort = given.get("cohort")
    return {"cohort": cohort} if isinstance(cohort, str) and _COHORT.fullmatch(cohort) else {}


def actor() -> str:
    """Return the name of who acts, as records give it."""
    return str(_who()["actor"])


def _who() -> dict[str, Any]:
    """Return who acts and how that is known; a name is proven only where the platform says what checked it."""
    acting_now = _ACTOR.get()
    stated = os.environ.get(ACTOR_VARIABLE)
    verified_by = os.environ.get(VERIFIED_VARIABLE) if stated else None
    if stated:
        actor, basis = stated, "stated"
    elif acting_now is not None:
        actor, basis = acting_now
    else:
        actor, basis = _system_user(), "os-user"
    return {"actor": actor, "actor_basis": basis, "actor_verified_by": verified_by, "host": socket.gethostname()}


def _system_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid-{os.getuid()}"


@functools.cache
def _version() -> tuple[tuple[str, Any], ...]:
    """Return the version and, in a git checkout, the commit and whether files differ from it."""
    root = Path(memmc.__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    status = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return (
        ("version", memmc.__version__),
        ("commit", commit),
        ("dirty", None if status is None else bool(status)),
    )


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
