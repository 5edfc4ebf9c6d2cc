"""Results to a DICOMweb server: QIDO-RS finds the study (PS3.18 10.6), STOW-RS stores (PS3.18 10.5)."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset

from memmc.errors import StorageError
from memmc.results.archive import HEADER, OBJECT_REFUSED, header_among
from memmc.sources.dicomweb import ACCEPT_JSON
from memmc.sources.http import MAX_JSON_BYTES, Access, get, post
from memmc.sources.objects import FILE_CHANGED_DURING_READ, STORE_AUTH, STORE_TIMEOUT, STORE_TLS, FetchFailed

REFERENCED_SOP_SEQUENCE = "00081199"
REFERENCED_SOP_INSTANCE_UID = "00081155"
SOP_INSTANCE_UID = "00080018"
_STORED = frozenset({200, 202, 409})  # 202: some were not, or were changed; 409: none was; the body says which
_FAILURES = {
    STORE_AUTH: "the archive refuses access (STORE_AUTH); check push.user and its password or token",
    STORE_TIMEOUT: "the archive does not answer (STORE_TIMEOUT); check push.uri, the network and push.ca_file, then "
    "call again: what is there already is not sent twice",
    STORE_TLS: "the archive's certificate is not to be trusted (STORE_TLS); check push.uri's host name, the server's "
    "certificate and push.ca_file",
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
        self._search("/studies", {"limit": 1})
        return "a DICOMweb server answers"

    def study(self, study_uid: str) -> Dataset | None:
        """Search for the study by its UID; see `Archive.study`."""
        found = self._search("/studies", {"StudyInstanceUID": study_uid, "includefield": ",".join(HEADER)})
        try:
            return header_among(map(Dataset.from_json, found), study_uid)
        except (ValueError, TypeError, LookupError, AttributeError):  # their text quotes the answer
            raise StorageError(_OTHERWISE) from None

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """Search within the series; see `Archive.present`."""
        found = self._search(f"/studies/{study_uid}/series/{series_uid}/instances", {})
        return {uid for match in found for uid in _values(match, SOP_INSTANCE_UID)}

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """Store in one transaction; see `Archive.send`."""
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
            raise StorageError(_FAILURES.get(failure.reason, _OTHERWISE)) from None
        asked = [str(each.SOPInstanceUID) for each in objects]
        if status not in _STORED:
            return dict.fromkeys(asked, OBJECT_REFUSED)
        stored = _stored(answer)
        return {uid: OBJECT_REFUSED for uid in asked if uid not in stored}

    def close(self) -> None:
        """Leave the connections to the process."""

    def _search(self, path: str, params: dict[str, str | int]) -> list[dict[str, Any]]:
        try:
            body = get(self.access, self.url + path, max_bytes=MAX_JSON_BYTES, accept=ACCEPT_JSON, params=params).body
            found = json.loads(body) if body else []
        except FetchFailed as failure:
            if failure.reason == FILE_CHANGED_DURING_READ:  # 404: no such series
                return []
            raise StorageError(_FAILURES.get(failure.reason, _OTHERWISE)) from None
        except (ValueError, RecursionError):
            raise StorageError(_OTHERWISE) from None
        if not isinstance(found, list) or not all(isinstance(match, dict) for match in found):
            raise StorageError(_OTHERWISE)
        return found


def encoded(result: Dataset) -> bytes:
    """Return an object as a file of PS3.10."""
    buffer = io.BytesIO()
    result.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _stored(answer: bytes) -> set[str]:
    """Return the SOP Instance UIDs that a store's answer names as stored (PS3.18 I.2)."""
    try:
        found = json.loads(answer)
        items = found.get(REFERENCED_SOP_SEQUENCE, {}).get("Value", [])
        return {uid for item in items for uid in _values(item, REFERENCED_SOP_INSTANCE_UID)}
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise StorageError(_OTHERWISE) from None


def _values(match: dict[str, Any], tag: str) -> list[str]:
    attribute = match.get(tag)
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return [str(value).strip() for value in values] if isinstance(values, list) else []
