"""Up to where a source is accounted for: kept in the very commits that account for it, so the two cannot disagree.

Objects that failed for a reason that may pass are not accounted for; the cursor that goes beyond them names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memmc.dicom.deidentify import object_key, open_path, seal_path
from memmc.errors import IdentityKeyError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.sources.objects import Cursor

MOST_AGAIN = 1000  # objects that a cursor names, as it stands in the log
_FIELD = "cursor"
_LOOKS = (8, 64, None)  # commits to look back over; the wanted one is mostly among the last


def cursor_entry(
    key: bytes, source: str, cohort: str, cursor: Cursor | None, failed: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what to add to the metadata of the commit that accounts for the objects before `cursor`.

    Nothing where too many objects are to be listed again: then the cursor before stands.

    Args:
        failed: paths of objects that are not accounted for.
    """
    if cursor is None:
        return {}
    again = dict.fromkeys([*cursor.again, *failed])
    if len(again) > MOST_AGAIN:
        return {}
    sealed = seal_path(key, "\n".join([cursor.place, *again]))
    return {_FIELD: {"of": _name(key, source, cohort), "sealed": sealed}}


def last_cursor(lake: Lake, key: bytes, source: str, cohort: str) -> Cursor | None:
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


def _opened(key: bytes, sealed: str) -> Cursor | None:
    try:
        place, *again = open_path(key, sealed).split("\n")
    except IdentityKeyError:
        return None
    return Cursor(place, tuple(again))
