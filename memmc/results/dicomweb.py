"""Results to a DICOMweb server: QIDO-RS finds the study (PS3.18 10.6), STOW-RS stores (PS3.18 10.5)."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset

from memmc.errors import StorageError
from memmc.results.archive import DUPLICATE_SOP_INSTANCE, HEADER, OBJECT_REFUSED, NoAnswerError, headers_among
from memmc.sources.dicomweb import ACCEPT_JSON, PAGE_RESULTS, SOP_INSTANCE_UID, Match, matches, value_of
from memmc.sources.http import MAX_JSON_BYTES, Access, get, post
from memmc.sources.objects import (
    FILE_CHANGED_DURING_READ,
    FILE_UNREADABLE,
    STORE_AUTH,
    STORE_TIMEOUT,
    STORE_TLS,
    FetchFailed,
)

REFERENCED_SOP_SEQUENCE, FAILED_SOP_SEQUENCE = "00081199", "00081198"
REFERENCED_SOP_INSTANCE_UID, FAILURE_REASON = "00081155", "00081197"
_STORED = frozenset({200, 202, 409})  # 202: some were not, or were changed; 409: none was; the body says which
_NO_SERVICE = frozenset({404, 405, 406, 415})  # no STOW-RS there, or not of our media type
_REFUSALS = {
    STORE_AUTH: "the archive refuses access (STORE_AUTH); check push.user and its password or token",
    STORE_TLS: "the archive's certificate is not to be trusted (STORE_TLS); check push.uri's host name, the server's "
    "certificate and push.ca_file",
}
_NO_ANSWER = {
    STORE_TIMEOUT: "the archive does not answer (STORE_TIMEOUT); check push.uri, the network and push.ca_file, then "
    "call again: what is there already is not sent twice",
    FILE_UNREADABLE: "the archive fails (its own error, several times); see its log, then call again: what is there "
    "already is not sent twice",
}
_OTHERWISE = "the archive answers as no DICOMweb server does; push.uri names the root of its service, without /studies"


@dataclass(frozen=True)
class DicomWebArchive:
    """A DICOMweb server; a `memmc.results.archive.Archive`.

    Attributes:
        place: ``dicomweb+http(s)://host:port/path``.
        url: the same as the URL of the service root.
        access: credentials and time limits.
        delays_s: between tries to store, s.
    """

    place: str
    url: str
    access: Access
    delays_s: tuple[float, ...]

    def check(self) -> str:
        """Ask for one study; see `Archive.check`."""
        self._page("/studies", {"limit": 1})
        return "a DICOMweb server answers"

    def headers(self, study_uid: str) -> list[Dataset]:
        """Search for the study by its UID; see `Archive.headers`. JSON is Unicode, whatever (0008,0005) says in it."""
        found = self._page("/studies", {"StudyInstanceUID": study_uid, "includefield": ",".join(HEADER)})
        try:
            return headers_among(map(Dataset.from_json, found), study_uid)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):  # their text quotes the answer
            raise StorageError(_OTHERWISE) from None

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """Search within the series; see `Taker.present`."""
        path = f"/studies/{study_uid}/series/{series_uid}/instances"
        found = matches(
            lambda offset: self._page(path, {"limit": PAGE_RESULTS, "offset": offset}, absent=True),
            "see its documentation for searches within a series",
        )
        return {uid for match in found if (uid := value_of(match, SOP_INSTANCE_UID))}

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """Store in one transaction; see `Taker.send`."""
        boundary = uuid.uuid4().hex
        body = b"".join(
            b"--%s\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % (boundary.encode(), encoded(each))
            for each in objects
        )
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        url = f"{self.url}/studies/{objects[0].StudyInstanceUID}"
        try:
            status, answer = post(
                self.access,
                url,
                body + b"--%s--\r\n" % boundary.encode(),
                content_type=kind,
                accept=ACCEPT_JSON,
                delays_s=self.delays_s,
            )
        except FetchFailed as failure:
            raise _error(failure) from None
        if status in _NO_SERVICE:
            raise StorageError(_OTHERWISE)
        asked = [str(each.SOPInstanceUID) for each in objects]
        stored = _stored(answer) if status in _STORED else set[str]()
        return {uid: OBJECT_REFUSED for uid in asked if uid not in stored}

    def close(self) -> None:
        """Leave the connections to the process."""

    def _page(self, path: str, params: dict[str, str | int], *, absent: bool = False) -> list[Match]:
        """Return one page of a search; nothing where there is no such place and it may be `absent`."""
        try:
            body = get(self.access, self.url + path, max_bytes=MAX_JSON_BYTES, accept=ACCEPT_JSON, params=params).body
            found = json.loads(body) if body else []
        except FetchFailed as failure:
            if absent and failure.reason == FILE_CHANGED_DURING_READ:  # 404
                return []
            raise _error(failure) from None
        except (ValueError, RecursionError):
            raise StorageError(_OTHERWISE) from None
        if not isinstance(found, list) or not all(isinstance(match, dict) for match in found):
            raise StorageError(_OTHERWISE)
        return found


def _error(failure: FetchFailed) -> StorageError:
    if failure.reason in _NO_ANSWER:
        return NoAnswerError(_NO_ANSWER[failure.reason])
    return StorageError(_REFUSALS.get(failure.reason, _OTHERWISE))


def encoded(result: Dataset) -> bytes:
    """Return an object as a file of PS3.10."""
    buffer = io.BytesIO()
    result.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _stored(answer: bytes) -> set[str]:
    """Return the SOP Instance UIDs that a store's answer names as there: stored, or there before (PS3.18 I.2)."""
    try:
        found = json.loads(answer)
        done = found.get(REFERENCED_SOP_SEQUENCE, {}).get("Value", [])
        failed = found.get(FAILED_SOP_SEQUENCE, {}).get("Value", [])
        done += [item for item in failed if value_of(item, FAILURE_REASON) == str(DUPLICATE_SOP_INSTANCE)]
        return {uid for item in done if (uid := value_of(item, REFERENCED_SOP_INSTANCE_UID))}
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise StorageError(_OTHERWISE) from None
