"""Up to where a source is accounted for: kept in the very commits that account for it, so the two cannot disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memmc.dicom.deidentify import object_key, open_path, seal_path
from memmc.errors import IdentityKeyError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake

_FIELD = "cursor"
_LOOKS = (8, 64, None)  # commits to look back over; the wanted one is mostly among the last


def cursor_entry(key: bytes, source: str, cohort: str, cursor: str | None) -> dict[str, Any]:
    """Return what to add to the metadata of the commit that accounts for the objects before `cursor`."""
    return {} if cursor is None else {_FIELD: {"of": _name(key, source, cohort), "sealed": seal_path(key, cursor)}}


def last_cursor(lake: Lake, key: bytes, source: str, cohort: str) -> str | None:
    """Return the newest cursor committed for a source and cohort.

    None when there is none, when the log no longer reaches back to it, or when the table was restored to an older
    version since, which took rows back that a cursor speaks for: then the source is listed from its beginning.
    """
    if not lake.exists(INSTANCES):
        return None
    name = _name(key, source, cohort)
    for limit in _LOOKS:
        entries = lake.history(INSTANCES, limit)
        for entry in entries:
            if entry["operation"] == "RESTORE":
                return None
            found = entry["metadata"].get(_FIELD)
            if isinstance(found, Mapping) and found.get("of") == name:
                return _opened(key, str(found.get("sealed")))
        if limit is None or len(entries) < limit:
            return None
    return None


def _name(key: bytes, source: str, cohort: str) -> str:
    return object_key(key, source, cohort, 0, _FIELD)[:32]


def _opened(key: bytes, sealed: str) -> str | None:
    try:
        return open_path(key, sealed)
    except IdentityKeyError:
        return None
