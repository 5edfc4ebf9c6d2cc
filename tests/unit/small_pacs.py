"""A DICOM archive of a few studies on a real association: what real ones do rarely and a test must see always."""

from __future__ import annotations

import io
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite
from pynetdicom import AE, DEFAULT_TRANSFER_SYNTAXES, evt
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    SecondaryCaptureImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

STORAGE = (ComprehensiveSRStorage, SecondaryCaptureImageStorage)


@dataclass
class SmallPacs:
    """What an archive holds, what it does wrong, and what it was asked.

    Attributes:
        studies: headers by Study Instance UID, texts in `charset`.
        statuses: of the next C-STOREs, instead of success; "abort" ends the association.
        objects: files that were stored, by SOP Instance UID.
        images: study and series of the originals, by SOP Instance UID.
        more: other headers that it gives for any study it has.
        chokes: SOP Instance UIDs that it never has room for.
        busy: associations that it rejects for now.
    """

    studies: dict[str, dict[str, str]]
    charset: str = "ISO_IR 100"
    statuses: list[int | str] = field(default_factory=list)
    objects: dict[str, Dataset] = field(default_factory=dict)
    images: dict[str, tuple[str, str]] = field(default_factory=dict)
    more: list[dict[str, str]] = field(default_factory=list)
    chokes: set[str] = field(default_factory=set)
    busy: int = 0
    asked: list[str] = field(default_factory=list)
    finds: list[int] = field(default_factory=list)
    port: int = 0

    def place(self, tls: bool = False) -> str:
        return f"dicom{'+tls' if tls else ''}://PACS@127.0.0.1:{self.port}"

    def let_in(self, event: evt.Event) -> None:
        """Reject an association for now, as an archive does at its limit."""
        if self.busy:
            self.busy -= 1
            event.assoc.acse.send_reject(2, 3, 2)  # transient, by the service provider, local limit exceeded
            event.assoc.kill()

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        keys = event.identifier
        self.asked.append(keys.QueryRetrieveLevel)
        if self.finds:
            yield self.finds.pop(0), None
            return
        if keys.QueryRetrieveLevel == "IMAGE":
            held = {uid: (made.StudyInstanceUID, made.SeriesInstanceUID) for uid, made in self.objects.items()}
            for uid, place in {**self.images, **held}.items():
                if place == (keys.StudyInstanceUID, keys.SeriesInstanceUID):
                    found = Dataset()
                    found.SOPInstanceUID, found.QueryRetrieveLevel = uid, "IMAGE"
                    yield 0xFF00, found
            return
        known = self.studies.get(str(keys.StudyInstanceUID))
        for header in [known, *self.more] if known is not None else []:
            found = Dataset()
            found.SpecificCharacterSet, found.QueryRetrieveLevel = self.charset, "STUDY"
            for keyword, value in header.items():
                setattr(found, keyword, value)
            yield 0xFF00, found

    def store(self, event: evt.Event) -> int:
        status = self.statuses.pop(0) if self.statuses else 0
        if status == "abort":
            event.assoc.abort()
            return 0xC000
        assert isinstance(status, int)
        if event.request.AffectedSOPInstanceUID in self.chokes:
            return 0xA700
        if status == 0 or status >> 12 == 0xB:
            buffer = io.BytesIO()
            made = event.dataset
            made.file_meta = event.file_meta
            dcmwrite(buffer, made, enforce_file_format=True)
            self.objects[str(made.SOPInstanceUID)] = dcmread(io.BytesIO(buffer.getvalue()))
        return status


@contextmanager
def listening(
    pacs: SmallPacs,
    tls: ssl.SSLContext | None = None,
    storage: Iterable[str] = STORAGE,
    known: str | None = None,
    syntaxes: Sequence[str] = DEFAULT_TRANSFER_SYNTAXES,
) -> Iterator[SmallPacs]:
    """Serve an archive on a free port of this machine; `known` is the only AE title that it lets in."""
    entity = AE(ae_title="PACS")
    entity.require_called_aet = True
    entity.require_calling_aet = [known] if known else []
    for kind in (Verification, StudyRootQueryRetrieveInformationModelFind, *storage):
        entity.add_supported_context(kind, list(syntaxes))
    handlers = [(evt.EVT_C_FIND, pacs.find), (evt.EVT_C_STORE, pacs.store), (evt.EVT_C_ECHO, lambda _event: 0)]
    handlers += [(evt.EVT_REQUESTED, pacs.let_in)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers, ssl_context=tls)
    pacs.port = server.socket.getsockname()[1]
    try:
        yield pacs
    finally:
        running = server.active_associations
        for association in running:  # of a client that has not released it yet
            association.abort()
        server.shutdown()
        for association in running:
            association.join(10)
