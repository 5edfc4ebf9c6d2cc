"""The places where something of a patient could have been left, each a plane with its files."""

from __future__ import annotations

import base64
import json
import os
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from memmc.errors import StorageError, UsageError
from memmc.lake.storage import Storage

_TEMPORARY_PREFIX = "memmc-"
_STATE_PLANES = (("mlflow", "mlflow"), ("mlartifacts", "mlflow"), ("models", "mlflow"), ("ray", "ray"))
_PAGE = 200
API_COLLECTIONS: Final = (
    "logs",
    "flow_runs",
    "task_runs",
    "flows",
    "deployments",
    "artifacts",
    "work_pools",
    "work_queues",
    "variables",
    "automations",
    "block_documents",
)
"""Collections of a Prefect server that are read through its `/filter` routes; its events are read besides."""

_EVENTS_A_PAGE = 50  # the most that the server gives at once
_ALL_EVENTS = {"occurred": {"since": "1970-01-01T00:00:00Z"}, "order": "ASC"}


@dataclass(frozen=True)
class Item:
    """One file or object of a plane.

    Attributes:
        plane: name of the plane.
        name: relative to the plane's root, POSIX; may itself hold an identifier.
        size: bytes.
        path: where it lies on this machine, or None for an object of `storage`.
        storage: the S3 prefix that holds it.
    """

    plane: str
    name: str
    size: int
    path: Path | None
    storage: Storage | None = None


def local_items(plane: str, root: Path) -> Iterator[Item]:
    """Yield every regular file under a folder (or the file itself); links, sockets and devices by their names only."""
    if not root.exists():
        return
    if root.is_file():
        yield Item(plane, root.name, root.stat().st_size, root)
        return
    for folder, folders, files in os.walk(root):
        for name in sorted(files + folders):
            path = Path(folder) / name
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            regular = stat.S_ISREG(status.st_mode)
            shown = path.relative_to(root).as_posix() + (f" -> {path.readlink()}" if path.is_symlink() else "")
            yield Item(plane, shown, status.st_size if regular else 0, path if regular else None)


def place_items(plane: str, uri: str) -> Iterator[Item]:
    """Yield what lies at a path, ``file://`` or ``s3://`` URI.

    Raises:
        StorageError: a bucket cannot be listed.
    """
    storage = Storage.open(uri)
    local = storage.local_path()
    if local is not None:
        yield from local_items(plane, local)
        return
    yield from (Item(plane, name, 0, None, storage) for name in storage.list())


def state_items(home: Path) -> Iterator[Item]:
    """Yield the embedded state: folders of Prefect, MLflow and Ray, what else lies beside them, temporary folders."""
    prefect = Path(os.environ.get("PREFECT_HOME") or home / "prefect")
    yield from local_items("prefect", prefect)
    for entry in sorted(home.iterdir()) if home.is_dir() else ():
        if entry.absolute() != prefect.absolute():
            plane = next((plane for start, plane in _STATE_PLANES if entry.name.startswith(start)), "state")
            yield from local_items(plane, entry)
    for entry in sorted(Path(tempfile.gettempdir()).glob(f"{_TEMPORARY_PREFIX}*")):
        yield from local_items("temporary", entry)


def api_pages(url: str) -> Iterator[tuple[str, bytes]]:
    """Yield everything a Prefect server shows, page by page: the collection and the answer's bytes.

    Args:
        url: its API, ending in ``/api``; credentials come from PREFECT_API_AUTH_STRING or PREFECT_API_KEY.

    Raises:
        StorageError: it cannot be reached, or refuses.
    """
    for collection in API_COLLECTIONS:
        offset = 0
        while True:
            page = _ask(f"{url.rstrip('/')}/{collection}/filter", {"limit": _PAGE, "offset": offset})
            rows: list[Any] = json.loads(page)
            if rows:
                yield collection, _both_forms(page, rows)
            if len(rows) < _PAGE:
                break
            offset += len(rows)
    yield from _event_pages(f"{url.rstrip('/')}/events/filter")


def _event_pages(url: str) -> Iterator[tuple[str, bytes]]:
    """Yield all events; the server names the next page by a token."""
    page = _ask(url, {"filter": _ALL_EVENTS, "limit": _EVENTS_A_PAGE})
    while True:
        found: dict[str, Any] = json.loads(page)
        if found["events"]:
            yield "events", _both_forms(page, found["events"])
        _, _, token = str(found.get("next_page") or "").partition("page-token=")
        if not token:
            return
        # At the address that was given: the server's own name for itself may be one that only it can reach.
        page = _ask(f"{url}/next?page-token={quote(token, safe='')}")


def _both_forms(page: bytes, rows: list[Any]) -> bytes:
    """Return text as it travelled and as it is stored."""
    return page + b"\n" + json.dumps(rows, ensure_ascii=False).encode("utf-8", "replace")


def _ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    """Send a body by POST, or ask by GET without one."""
    if not url.startswith(("http://", "https://")):
        raise UsageError("the Prefect API's address is http:// or https://; check --prefect-api")
    headers = {"Content-Type": "application/json"}
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise StorageError(
            f"the Prefect API answers {error.code}; check PREFECT_API_AUTH_STRING and --prefect-api"
        ) from None
    except OSError:
        raise StorageError("the Prefect API cannot be reached; check --prefect-api and that its server runs") from None
