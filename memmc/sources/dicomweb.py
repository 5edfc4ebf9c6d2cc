"""Instances of a DICOMweb server: QIDO-RS lists them (PS3.18 10.6), WADO-RS gives them whole (PS3.18 10.4).

An instance is asked for as it is stored, a PS3.10 file in one part of a multipart answer, so pixel data comes with it
and no bulk data is asked for apart. Its bytes go to the sandbox unparsed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from memmc.errors import StorageError
from memmc.sources.http import Access, answers, ask, get
from memmc.sources.objects import (
    FILE_PATH_ESCAPE,
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

PAGE_RESULTS = 500
ACCEPT_JSON = "application/dicom+json, application/json;q=0.9"
ACCEPT_FILE = 'multipart/related; type="application/dicom"; transfer-syntax=*'
STUDY_INSTANCE_UID = "0020000D"
SERIES_INSTANCE_UID = "0020000E"
SOP_INSTANCE_UID = "00080018"
NUMBER_OF_STUDY_RELATED_INSTANCES = "00201208"
_ENVELOPE_BYTES = 1 << 16  # room for the boundaries and headers around one part
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_BOUNDARY = re.compile(r'boundary\s*=\s*(?:"([^"]+)"|([^\s;,"]+))', re.IGNORECASE)

Match = dict[str, Any]


@dataclass(frozen=True)
class DicomWebSource:
    """A DICOMweb server; a `memmc.sources.objects.Source`.

    Attributes:
        uri: ``dicomweb+http(s)://host:port/path``.
        url: the same as the URL of the service root.
        access: credentials and time limits.
        quiet_seconds: how long a study with new instances is watched before it counts as complete, s.
        modalities: only studies with one of these Modalities in Study (0008,0061); all when empty.
        study_dates: only studies of this Study Date (0008,0020) or range of dates.
    """

    has_cursor: ClassVar[bool] = False
    uri: str
    url: str
    access: Access
    quiet_seconds: float = 60.0
    modalities: tuple[str, ...] = ()
    study_dates: str | None = None

    def listing(self, cursor: Cursor | None, is_new: IsNew, listed: Listed = unheard) -> Listing:
        """List every instance; see `Source.listing`.

        QIDO-RS does not say when a study last changed, so studies with new instances are looked at twice,
        `quiet_seconds` apart; one that has grown or shrunk stays pending.
        """
        studies = self._all_instances(self._studies(), listed, "studies")
        new = {uid: [obj.path for obj in found if is_new(obj)] for uid, found in studies.items()}
        watched = [uid for uid, paths in new.items() if paths] if self.quiet_seconds else []
        if watched:
            time.sleep(self.quiet_seconds)
        pending: set[str] = set()
        for uid, found in self._all_instances(dict.fromkeys(watched), listed, "studies looked at again").items():
            if found != studies[uid]:
                pending.update(new[uid])
        objects = [obj for found in studies.values() for obj in found if obj.path not in pending]
        return Listing(objects, pending=len(pending))

    def fetch(self, obj: SourceObject, max_bytes: int, refuse: Refuse = refuse_nothing) -> Data:
        """Return an instance's file; see `Source.fetch`."""
        if obj.problem is not None:
            raise FetchFailed(obj.problem)
        uids = obj.path.split("/")
        if len(uids) != 3 or not all(_UID.fullmatch(uid) for uid in uids):
            raise FetchFailed(FILE_PATH_ESCAPE)
        answer = get(self.access, self._place(*uids), max_bytes=max_bytes + _ENVELOPE_BYTES, accept=ACCEPT_FILE)
        if not answer.content_type.lower().startswith("multipart/"):
            return answer.body
        return only_part(answer.body, answer.content_type)

    def check(self) -> str:
        """Ask for one study; see `Source.check`."""
        found = self._page("/studies", {"limit": 1})
        return f"a DICOMweb server answers{'' if found else ' and has no study'}"

    def _studies(self) -> dict[str, int | None]:
        """Return Study Instance UID -> number of instances, where the server says it."""
        dates = {"StudyDate": self.study_dates} if self.study_dates else {}
        studies: dict[str, int | None] = {}
        for modality in self.modalities or (None,):
            filters = {**dates, **({"ModalitiesInStudy": modality} if modality else {})}
            for match in self._matches("/studies", filters, None):
                uid = value_of(match, STUDY_INSTANCE_UID)
                if uid is None or not _UID.fullmatch(uid):
                    raise StorageError("the source lists a study without a Study Instance UID (0020,000D)")
                count = value_of(match, NUMBER_OF_STUDY_RELATED_INSTANCES)
                studies.setdefault(uid, int(count) if count and count.isdecimal() else None)
        return studies

    def _all_instances(
        self, counts: Mapping[str, int | None], listed: Listed, what: str
    ) -> dict[str, list[SourceObject]]:
        """Return the instances of each study, the studies in the order of `counts`."""
        found = answers(lambda study: self._instances(study, counts[study]), counts, listed, what)
        return dict(zip(counts, found, strict=True))

    def _instances(self, study: str, count: int | None) -> list[SourceObject]:
        """Return a study's instances in the order of their UIDs; none when it was deleted meanwhile."""
        found: dict[str, SourceObject] = {}
        for match in self._matches(f"/studies/{study}/instances", {}, count):
            uids = [study, value_of(match, SERIES_INSTANCE_UID) or "", value_of(match, SOP_INSTANCE_UID) or ""]
            problem = None if all(_UID.fullmatch(uid) for uid in uids) else FILE_PATH_ESCAPE
            path = "/".join(uids)
            found[path] = SourceObject(path, self._place(*uids) if problem is None else "", 0, "", problem)
        return sorted(found.values(), key=lambda obj: obj.path)

    def _matches(self, path: str, filters: dict[str, str], count: int | None) -> Iterator[Match]:
        """Yield all results of a search; `count`, where it is known, spares the last request."""
        return matches(
            lambda offset: self._page(path, {**filters, "limit": PAGE_RESULTS, "offset": offset}),
            "narrow its listing with source.study_dates or source.modalities",
            count,
        )

    def _page(self, path: str, params: dict[str, str | int]) -> list[Match]:
        page = ask(self.access, self.url + path, params, ACCEPT_JSON)
        if page is None:
            return []
        if not isinstance(page, list) or not all(isinstance(match, dict) for match in page):
            raise StorageError(
                "the source does not answer as QIDO-RS; its URI names the DICOMweb root, without /studies"
            )
        return page

    def _place(self, study: str, series: str, instance: str) -> str:
        return f"{self.url}/studies/{study}/series/{series}/instances/{instance}"


def matches(page: Callable[[int], list[Match]], remedy: str, count: int | None = None) -> Iterator[Match]:
    """Yield all results of a search, page by page.

    A server may give shorter pages than asked for (PS3.18 8.3.4.4), or give the first page again whatever
    the offset; so the end is a page that brings nothing new, or `count` results.

    Args:
        page: offset -> at most `PAGE_RESULTS` results.
        remedy: what to do about a server of which neither is to be had.

    Raises:
        StorageError: the server gives the same full page whatever the offset.
    """
    seen: set[str] = set()
    received = 0
    while count is None or len(seen) < count:
        found = page(received)
        fresh = [match for match in found if _identity(match) not in seen]
        if not fresh and len(found) >= PAGE_RESULTS:
            raise StorageError(
                f"the server ignores 'offset' and gives the same {len(found)} results for ever; {remedy}"
            )
        if not fresh:
            return
        seen.update(_identity(match) for match in fresh)
        received += len(found)
        yield from fresh


def only_part(body: bytes | bytearray, content_type: str) -> Data:
    """Return the content of a multipart body's one part (RFC 2046 5.1.1).

    Raises:
        FetchFailed: FILE_UNREADABLE when it is not one part, or not all of it.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise FetchFailed(FILE_UNREADABLE)
    delimiter = b"--" + (found[1] or found[2]).encode()
    begin = body.find(delimiter)
    end = body.rfind(b"\r\n" + delimiter + b"--")
    head = body.find(b"\r\n\r\n", begin)
    if begin < 0 or not begin < head < end or body.find(b"\r\n" + delimiter, head + 2, end + 2) >= 0:
        raise FetchFailed(FILE_UNREADABLE)
    return memoryview(body)[head + 4 : end]


def value_of(match: Match, tag: str) -> str | None:
    """Return the first value of an attribute in the DICOM JSON Model (PS3.18 F.2)."""
    attribute = match.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return str(values[0]).strip() if isinstance(values, list) and values else None


def _identity(match: Match) -> str:
    return "/".join(value_of(match, tag) or "" for tag in (STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SOP_INSTANCE_UID))
