"""Instances of an Orthanc server, over its REST interface.

``/changes`` numbers everything that ever arrived. A cursor says up to which number all instances are accounted for. It
is kept with the identifier found at that number: an Orthanc that was set up anew numbers from 1 again, and shows by
another identifier (or none) at that place that its numbers mean something else; then everything is listed again, which
costs time and nothing else, since accounted objects are known by their keys. Instances before the cursor that could not
be fetched are listed again by their identifiers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from urllib.parse import quote

from memmc.errors import StorageError
from memmc.sources.http import MAX_JSON_BYTES, Access, answers, ask, ask_bytes, get
from memmc.sources.objects import (
    FILE_CHANGED_DURING_READ,
    FILE_CHECKSUM,
    FILE_PATH_ESCAPE,
    FILE_TOO_LARGE,
    FILE_UNREADABLE,
    Cursor,
    Data,
    FetchFailed,
    IsNew,
    Listed,
    Listing,
    Refuse,
    SourceObject,
    refuse_nothing,
    unheard,
)

PAGE_CHANGES = 1000
LEAST_API_VERSION = 16  # Orthanc 1.10.1, the first that tells an attachment's identity and MD5 in one answer
_IDENTIFIER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")
_TIME = "%Y%m%dT%H%M%S"


@dataclass(frozen=True)
class Change:
    """One entry of ``/changes``."""

    number: int
    identifier: str
    is_instance: bool
    when: datetime


@dataclass(frozen=True)
class OrthancSource:
    """An Orthanc server; a `memmc.sources.objects.Source`.

    Attributes:
        uri: ``orthanc+http(s)://host:port``.
        url: the same as the server's URL.
        access: credentials and time limits.
        quiet_seconds: a study in which something arrived more recently is not complete, s.
    """

    has_cursor: ClassVar[bool] = True
    uri: str
    url: str
    access: Access
    quiet_seconds: float = 60.0

    def listing(self, cursor: Cursor | None, is_new: IsNew, listed: Listed = unheard) -> Listing:
        """List the instances that arrived after the cursor, and before them those that it names; see `Source.listing`.

        An instance that was deleted meanwhile is not listed. One that was sent again with other bytes is another
        object, since its attachment is.
        """
        self.check()
        after = self._known(cursor)
        changes = self._changes(after)
        # Below every number, so that the cursor stays where it is while the study of one of these is not complete.
        first: dict[str, int] = dict.fromkeys(cursor.again, 0) if cursor is not None and after else {}
        for change in changes:
            if change.is_instance:
                first.setdefault(change.identifier, change.number)
        found = self._instances(first, listed)
        new = {obj.path: series for obj, series in found if is_new(obj)}
        limit = self._quiet_since()
        busy = self._busy_series(set(new.values()), limit)
        pending = {path for path, series in new.items() if series in busy}
        # What is younger than the quiet time is looked at again, as a database with several writers may show a lower
        # number after a higher one.
        held = [first[path] for path in pending] + [change.number for change in changes if change.when > limit]
        stop = min(held, default=None)
        done = [change for change in changes if stop is None or change.number < stop]
        reached = Cursor(f"{done[-1].number} {done[-1].identifier}") if done else cursor if after else None
        objects = [obj for obj, _ in found if obj.path not in pending]
        return Listing(objects, pending=len(pending), cursor=reached, whole=after == 0)

    def fetch(self, obj: SourceObject, max_bytes: int, refuse: Refuse = refuse_nothing) -> Data:
        """Return an instance's file, equal to what Orthanc received by the MD5 it took then; see `Source.fetch`."""
        if not _IDENTIFIER.fullmatch(obj.path):
            raise FetchFailed(FILE_PATH_ESCAPE)
        if obj.size > max_bytes:
            raise FetchFailed(FILE_TOO_LARGE)
        place = f"{self.url}/instances/{obj.path}"
        data: Data | None = None
        try:
            data = get(self.access, f"{place}/file", max_bytes=max_bytes, refuse=refuse).body
        except FetchFailed as failure:
            if failure.reason != FILE_CHANGED_DURING_READ:
                raise
        info = _attachment(get(self.access, f"{place}/attachments/dicom/info", max_bytes=MAX_JSON_BYTES).body)
        if info.get("Uuid") != obj.modified:
            raise FetchFailed(FILE_CHANGED_DURING_READ)
        if data is None:  # the index knows the instance, its storage has lost the file
            raise FetchFailed(FILE_UNREADABLE)
        _check_bytes(data, obj.size, str(info.get("UncompressedMD5", "")))
        return data

    def check(self) -> str:
        """Return the server's version; see `Source.check`.

        Raises:
            StorageError: it does not answer, or is no Orthanc, or too old a one.
        """
        system = ask(self.access, f"{self.url}/system")
        if not isinstance(system, dict) or not isinstance(system.get("ApiVersion"), int):
            raise StorageError(
                "the source is no Orthanc server; its URI is orthanc+http(s)://host:port of the REST port"
            )
        if system["ApiVersion"] < LEAST_API_VERSION:
            raise StorageError(
                f"the Orthanc server's API version is {system['ApiVersion']}, at least {LEAST_API_VERSION} is needed: "
                "update it to Orthanc 1.10.1 or newer"
            )
        return f"Orthanc {system.get('Version', '')} answers"

    def _known(self, cursor: Cursor | None) -> int:
        """Return the number to go on from: the cursor's, or 0 when the server no longer has that change."""
        number, _, identifier = ("" if cursor is None else cursor.place).partition(" ")
        if not number.isdecimal() or int(number) < 1:
            return 0
        changes, _, _ = self._page(int(number) - 1, 1)
        return int(number) if any((c.number, c.identifier) == (int(number), identifier) for c in changes) else 0

    def _changes(self, after: int) -> list[Change]:
        changes: list[Change] = []
        while True:
            page, last, done = self._page(after, PAGE_CHANGES)
            changes += [change for change in page if change.number > after]
            if done or last <= after:
                return changes
            after = last

    def _page(self, since: int, limit: int) -> tuple[list[Change], int, bool]:
        """Return changes, the last number among them, and whether there are no later ones."""
        page = ask(self.access, f"{self.url}/changes", {"since": since, "limit": limit})
        try:
            changes = [_change(item) for item in page["Changes"]]
            return changes, int(page["Last"]), bool(page["Done"])
        except (KeyError, TypeError, ValueError):
            raise StorageError("the source's list of changes is not understood; is it an Orthanc server?") from None

    def _instances(self, identifiers: Collection[str], listed: Listed) -> list[tuple[SourceObject, str]]:
        """Return each instance that is still there, and its series."""
        found = answers(self._instance, identifiers, listed, "instances")
        return [item for item in found if item is not None]

    def _instance(self, identifier: str) -> tuple[SourceObject, str] | None:
        answer = self._resource("instances", identifier)
        if answer is None:
            return None
        try:
            size, attachment = int(answer["FileSize"]), str(answer["FileUuid"])
            series = _identifier(answer["ParentSeries"])
        except (KeyError, TypeError, ValueError):
            raise StorageError("an instance of the source is not described as Orthanc does it") from None
        return SourceObject(identifier, f"{self.url}/instances/{identifier}", size, attachment), series

    def _busy_series(self, series: set[str], limit: datetime) -> frozenset[str]:
        """Return the series whose study was changed after `limit`."""
        if not self.quiet_seconds or not series:
            return frozenset()
        parents = dict(zip(series, answers(self._study_of, series), strict=True))
        studies = sorted({study for study in parents.values() if study})
        changed = dict(zip(studies, answers(self._last_update, studies), strict=True))
        busy = {study for study, when in changed.items() if when is not None and when > limit}
        return frozenset(name for name, study in parents.items() if study in busy)

    def _quiet_since(self) -> datetime:
        """Return the time, by the server's own clock (UTC), after which nothing may have arrived."""
        now = ask_bytes(self.access, f"{self.url}/tools/now") or b""
        return _time(now.decode(errors="replace")) - timedelta(seconds=self.quiet_seconds)

    def _study_of(self, series: str) -> str | None:
        answer = self._resource("series", series)
        return None if answer is None else _identifier(answer.get("ParentStudy"))

    def _last_update(self, study: str) -> datetime | None:
        answer = self._resource("studies", study)
        return None if answer is None else _time(answer.get("LastUpdate"))

    def _resource(self, kind: str, identifier: str) -> dict[str, Any] | None:
        """Return a resource, or None when it was deleted."""
        answer = ask(self.access, f"{self.url}/{kind}/{quote(identifier)}")
        if answer is not None and not isinstance(answer, dict):
            raise StorageError("the source does not describe its objects as Orthanc does it")
        return answer


def _change(item: dict[str, Any]) -> Change:
    is_instance = item["ChangeType"] == "NewInstance"
    identifier = _identifier(item["ID"]) if is_instance else str(item["ID"])
    return Change(int(item["Seq"]), identifier, is_instance, _time(item["Date"]))


def _attachment(body: bytes | bytearray) -> dict[str, Any]:
    """Read what Orthanc knows of an instance's file."""
    try:
        info = json.loads(body)
    except (ValueError, RecursionError):
        info = None
    return info if isinstance(info, dict) else {}


def _identifier(text: Any) -> str:
    """Check what goes into a URL."""
    if not isinstance(text, str) or not _IDENTIFIER.fullmatch(text):
        raise StorageError("the source names an object in a way that Orthanc does not; is it an Orthanc server?")
    return text


def _time(text: Any) -> datetime:
    try:
        return datetime.strptime(str(text), _TIME).replace(tzinfo=UTC)
    except ValueError:
        raise StorageError("the source does not tell the time as Orthanc does it; is it an Orthanc server?") from None


def _check_bytes(data: Data, size: int, md5: str) -> None:
    if len(data) != size:
        raise FetchFailed(FILE_CHANGED_DURING_READ)
    if md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5.lower():
        raise FetchFailed(FILE_CHECKSUM)
