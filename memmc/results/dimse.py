"""Results to an archive's DICOM port: C-FIND finds the study (PS3.4 C.4.1), C-STORE stores (PS3.4 B.2)."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom import _config as network
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,  # pyright: ignore[reportAttributeAccessIssue] - made when imported
    SecondaryCaptureImageStorage,  # pyright: ignore[reportAttributeAccessIssue]
    StudyRootQueryRetrieveInformationModelFind,  # pyright: ignore[reportAttributeAccessIssue]
    Verification,  # pyright: ignore[reportAttributeAccessIssue]
)

from memmc.errors import ConfigError, StorageError, UsageError
from memmc.results.archive import DUPLICATE_SOP_INSTANCE, HEADER, OBJECT_REFUSED, NoAnswerError, headers_among
from memmc.sources.http import Access

T = TypeVar("T")

_PLACE = re.compile(
    r"dicom(?P<tls>\+tls)?://(?P<title>[A-Za-z0-9_. -]{1,16})@"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(?P<port>\d{1,5})/?"
)
_PENDING = frozenset({0xFF00, 0xFF01})
_NO_ROOM = range(0xA700, 0xA800)  # out of resources: later, perhaps
# 0, with a warning (some attribute changed or left out), or there before.
_STORED = frozenset({0x0000, 0xB000, 0xB006, 0xB007, DUPLICATE_SOP_INSTANCE})
_TRANSIENT = 2  # result of a rejected association (PS3.8 9.3.4): busy, not unwilling


class _GoneError(Exception):
    """The archive is not there, is silent, or has no room: it may be tried again."""


class DicomArchive:
    """The DICOM port of an archive; a `memmc.results.archive.Archive`.

    One association is held and opened anew when it breaks.

    Args:
        place: ``dicom://AETITLE@host:port``, or ``dicom+tls://...``.
        ae_title: our own.
        access: its time limits and certificates; DICOM has no password.
        delays_s: between tries, s.

    Raises:
        UsageError: the place is not of that form.
    """

    def __init__(self, place: str, ae_title: str, access: Access, delays_s: Sequence[float]) -> None:
        match = _PLACE.fullmatch(place)
        if match is None or int(match["port"]) > 65_535:
            raise UsageError("the push URI is not understood; expected dicom://AETITLE@host:port, or dicom+tls://...")
        self.place, self._delays_s = place.rstrip("/"), tuple(delays_s)
        self._title, self._host, self._port = match["title"], match["host"].strip("[]"), int(match["port"])
        self._context = _tls(access.ca_pem) if match["tls"] else None
        # It logs the names that an archive answers with, and the objects sent.
        network.LOG_REQUEST_IDENTIFIERS = network.LOG_RESPONSE_IDENTIFIERS = False
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
        self._entity = AE(ae_title=ae_title)
        self._entity.connection_timeout = self._entity.acse_timeout = access.connect_seconds
        self._entity.dimse_timeout = access.answer_seconds
        self._entity.network_timeout = None  # ours ends it; between objects it may be idle
        for kind in (
            Verification,
            StudyRootQueryRetrieveInformationModelFind,
            ComprehensiveSRStorage,
            SecondaryCaptureImageStorage,
        ):
            self._entity.add_requested_context(kind, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        self._association: Association | None = None

    def check(self) -> str:
        """C-ECHO; see `Archive.check`."""

        def echo(association: Association) -> str:
            _status(association.send_c_echo())
            return "a DICOM archive answers"

        return self._tried(echo)

    def headers(self, study_uid: str) -> list[Dataset]:
        """C-FIND at the level of studies; see `Archive.headers`. Names come in the character set of each answer."""
        keys = Dataset()
        for keyword in HEADER:
            setattr(keys, keyword, "")
        keys.StudyInstanceUID, keys.QueryRetrieveLevel, keys.SpecificCharacterSet = study_uid, "STUDY", "ISO_IR 192"
        found = self._find(keys)
        for answer in found:
            answer.decode()
        return headers_among(found, study_uid)

    def present(self, study_uid: str, series_uid: str) -> set[str]:
        """C-FIND at the level of instances; see `Taker.present`."""
        keys = Dataset()
        keys.QueryRetrieveLevel, keys.SOPInstanceUID = "IMAGE", ""
        keys.StudyInstanceUID, keys.SeriesInstanceUID = study_uid, series_uid
        return {str(match.SOPInstanceUID) for match in self._find(keys) if "SOPInstanceUID" in match}

    def send(self, objects: Sequence[Dataset]) -> dict[str, str]:
        """C-STORE, one after the other; see `Taker.send`."""
        refused: dict[str, str] = {}
        for each in objects:

            def store(association: Association, each: Dataset = each) -> bool:
                status = _status(association.send_c_store(each))
                if status in _NO_ROOM:
                    raise _GoneError
                return status in _STORED

            if not self._tried(store):
                refused[str(each.SOPInstanceUID)] = OBJECT_REFUSED
        return refused

    def close(self) -> None:
        """Release the association."""
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._association = None

    def _find(self, keys: Dataset) -> list[Dataset]:
        def find(association: Association) -> list[Dataset]:
            found: list[Dataset] = []
            for answer, match in association.send_c_find(keys, StudyRootQueryRetrieveInformationModelFind):
                status = _status(answer)
                if status in _PENDING and match is not None:
                    found.append(match)
                elif status in _NO_ROOM:
                    raise _GoneError
                elif status:
                    raise StorageError(
                        f"the archive refuses to search (C-FIND status {status:04X}); check that it lets push.ae_title "
                        "query, and its log"
                    )
            return found

        return self._tried(find)

    def _tried(self, work: Callable[[Association], T]) -> T:
        """Do something on the association, on a new one and again where the archive goes away meanwhile."""
        for delay in (*self._delays_s, None):
            try:
                return work(self._connected())
            except ValueError:  # pynetdicom's: no context was agreed for it
                raise StorageError(
                    "the archive does not take what it is asked (verification, Study Root queries, Comprehensive SR or "
                    "Secondary Capture storage); let it accept them from push.ae_title, or choose push.objects"
                ) from None
            except (_GoneError, RuntimeError):  # pynetdicom's: the association has just died
                if self._association is not None:
                    self._association.abort()
                self._association = None
            if delay is not None:
                time.sleep(delay)
        raise NoAnswerError(
            "the archive does not answer, or ends the association (STORE_TIMEOUT); check push.uri, the network and "
            "push.ca_file, that it lets push.ae_title query and store, and its log, then call again: what is there "
            "already is not sent twice"
        )

    def _connected(self) -> Association:
        if self._association is not None and self._association.is_established:
            return self._association
        secured = (self._context, self._host) if self._context else None
        made = self._entity.associate(
            self._host,
            self._port,
            ae_title=self._title,
            tls_args=secured,
            evt_handlers=[(evt.EVT_CONN_OPEN, _send_at_once)],  # pyright: ignore[reportArgumentType] - a wrong hint there
        )
        if made.is_rejected and getattr(made.acceptor.primitive, "result", None) != _TRANSIENT:
            raise StorageError(
                "the archive rejects the association; let it know push.ae_title and this host, and check its own AE "
                "title in push.uri"
            )
        if not made.is_established:
            raise _GoneError
        self._association = made
        return made


def _send_at_once(event: evt.Event) -> None:
    """Let no small message wait for the acknowledgement of the one before: 40 ms each, otherwise."""
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _tls(ca_pem: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cadata=ca_pem)
    except (ssl.SSLError, ValueError):
        raise ConfigError("push.ca_file holds no certificate in PEM") from None


def _status(answer: Dataset) -> int:
    """Return the status of an answer; without one the connection broke."""
    if "Status" not in answer:
        raise _GoneError
    return cast(int, answer.Status)
