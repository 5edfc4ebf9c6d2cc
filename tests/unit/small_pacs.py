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
    """

    studies: dict[str, dict[str, str]]
    charset: str = "ISO_IR 100"
    statuses: list[int | str] = field(default_factory=list)
    objects: dict[str, Dataset] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    finds: list[int] = field(default_factory=list)
    port: int = 0

    def place(self, tls: bool = False) -> str:
        return f"dicom{'+tls' if tls else ''}://PACS@127.0.0.1:{self.port}"

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        keys = event.identifier
        self.asked.append(keys.QueryRetrieveLevel)
        if self.finds:
            yield self.finds.pop(0), None
            return
        if keys.QueryRetrieveLevel == "IMAGE":
            for each in self.objects.values():
                if each.SeriesInstanceUID == keys.SeriesInstanceUID:
                    found = Dataset()
                    found.SOPInstanceUID, found.QueryRetrieveLevel = each.SOPInstanceUID, "IMAGE"
                    yield 0xFF00, found
            return
        header = self.studies.get(str(keys.StudyInstanceUID))
        if header is not None:
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
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers, ssl_context=tls)
    pacs.port = server.socket.getsockname()[1]
    try:
        yield pacs
    finally:
        server.shutdown()
