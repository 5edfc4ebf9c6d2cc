"""The Delta log, read entry by entry: who committed what.

`DeltaTable.history` numbers commits from its snapshot's version but may list later ones, which gives them too low a
version; so the entries themselves are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from memmc.lake.storage import Storage
from memmc.s3 import AbsentError


def entry_name(table: str, version: int) -> str:
    """Return the name of a commit's entry, relative to the lake's root."""
    return f"{table}/_delta_log/{version:020d}.json"


def begun(storage: Storage, table: str) -> bool:
    """Return whether a table has been made; the log of one whose oldest entries were cleaned up counts too."""
    return any(name.endswith((".json", ".checkpoint.parquet")) for name in storage.list(f"{table}/_delta_log"))


def commits(storage: Storage, table: str, newest: int, limit: int | None = None) -> list[dict[str, Any]]:
    """Return commits from `newest` backwards, until the first that the log no longer holds.

    Returns:
        For each: version, timestamp (ms since 1970), operation, run, step, metadata, and the numbers of shards and
        rows that it added and of shards that it removed.
    """
    found: list[dict[str, Any]] = []
    for version in range(newest, -1, -1):
        actions = _actions(storage, table, version) if limit is None or len(found) < limit else None
        if actions is None:
            break
        info = _first(actions, "commitInfo")
        adds = [action["add"] for action in actions if "add" in action]
        found.append(
            {
                "version": version,
                "timestamp": info.get("timestamp"),
                "operation": info.get("operation"),
                "run": info.get("run"),
                "step": int(info.get("step", 0)),
                "metadata": json.loads(info.get("metadata") or "{}"),
                "shards_added": len(adds),
                "rows_added": sum(json.loads(add.get("stats") or "{}").get("numRecords", 0) for add in adds),
                "shards_removed": sum("remove" in action for action in actions),
            }
        )
    return found


def find_commit(storage: Storage, table: str, versions: Iterable[int], marks: Mapping[str, str]) -> int | None:
    """Return the first of the versions whose commit carries the marks."""
    for version in versions:
        info = _first(_actions(storage, table, version) or [], "commitInfo")
        if all(info.get(name) == value for name, value in marks.items()):
            return version
    return None


def audit_heads(storage: Storage, table: str) -> list[tuple[int, str]]:
    """Return, of the commits that the log holds, version and the end of the audit trail at their time."""
    found: list[tuple[int, str]] = []
    for name in storage.list(f"{table}/_delta_log"):
        version = name.rpartition("/")[2].removesuffix(".json")
        if len(version) == 20 and version.isdigit():
            info = _first(_actions(storage, table, int(version)) or [], "commitInfo")
            found += [(int(version), info["audit"])] if isinstance(info.get("audit"), str) else []
    return found


def _actions(storage: Storage, table: str, version: int) -> list[dict[str, Any]] | None:
    """Return the actions of one commit, or None when the log no longer holds it."""
    try:
        lines = storage.read(entry_name(table, version)).splitlines()
    except AbsentError:
        return None
    return [json.loads(line) for line in lines if line.strip()]


def _first(actions: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((action[kind] for action in actions if kind in action), {})
