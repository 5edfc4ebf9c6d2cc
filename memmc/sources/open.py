"""Which source a URI names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote_to_bytes

from memmc.config import SourceConfig
from memmc.errors import DataError, UsageError
from memmc.sources.archive import fetch_member, is_zip, list_members
from memmc.sources.dicomweb import DicomWebSource
from memmc.sources.folder_s3 import fetch, list_objects, local_root
from memmc.sources.http import Access, server_url
from memmc.sources.objects import (
    Cursor,
    Data,
    IsNew,
    Listed,
    Listing,
    Refuse,
    Source,
    SourceObject,
    refuse_nothing,
    unheard,
)
from memmc.sources.orthanc import OrthancSource

TOLD_EVERY = 1000  # objects of a folder or prefix


@dataclass(frozen=True)
class FileSource:
    """A folder, a file, a ZIP file or an S3 prefix; a `memmc.sources.objects.Source`."""

    has_cursor: ClassVar[bool] = False
    uri: str
    settings: SourceConfig

    def listing(self, cursor: Cursor | None, is_new: IsNew, listed: Listed = unheard) -> Listing:
        """List every object, and the members of ZIP files that are to be opened; see `Source.listing`."""
        objects: list[SourceObject] = []
        for obj in self._objects():
            objects.append(obj)
            if len(objects) % TOLD_EVERY == 0:
                listed(len(objects), f"{len(objects)} objects")
        return Listing(objects)

    def check(self) -> str:
        """Look for a first object; see `Source.check`."""
        return "empty" if next(self._objects(), None) is None else "can be listed"

    def fetch(self, obj: SourceObject, max_bytes: int, refuse: Refuse = refuse_nothing) -> Data:
        """Return an object's bytes; see `Source.fetch`."""
        if obj.uri.startswith("file://") and "#" in obj.uri:
            return fetch_member(obj, max_bytes, self.settings.archive_members, refuse)
        return fetch(self.uri, obj, max_bytes, refuse)

    def _objects(self) -> Iterator[SourceObject]:
        if self.uri.startswith("s3://"):
            yield from list_objects(self.uri)
            return
        root, single = local_root(self.uri)
        if single is not None and is_zip(path := root.rstrip(b"/") + b"/" + single):
            yield from list_members(path, self.settings)
            return
        for obj in list_objects(self.uri):
            yield from self._opened(obj) if self.settings.open_archives and obj.problem is None else [obj]

    def _opened(self, obj: SourceObject) -> Iterator[SourceObject]:
        """Yield the members of a ZIP file; itself when it is none, or one that is refused."""
        path = unquote_to_bytes(obj.uri.removeprefix("file://"))
        members = [obj]
        if is_zip(path):
            with contextlib.suppress(DataError):
                members = list(list_members(path, self.settings, f"{obj.path}!/"))
        yield from members


def open_source(uri: str, settings: SourceConfig, environment: Mapping[str, str]) -> Source:
    """Return the source that a URI names; nothing is asked of a server yet.

    Args:
        uri: a folder, file or ZIP file (path or ``file://``), ``s3://bucket/prefix``,
            ``orthanc+http(s)://host:port`` or ``dicomweb+http(s)://host:port/path``.
        settings: section `source` of the configuration.
        environment: may hold the password.

    Raises:
        UsageError: a server's URI is not understood, or holds a user or password; a ZIP file that lies in a bucket.
        ConfigError: a file of credentials cannot be read.
    """
    scheme = uri.partition("://")[0].lower()
    if scheme in {"orthanc+http", "orthanc+https"}:
        name, url = server_url(uri)
        return OrthancSource(name, url, Access.of(settings, environment), settings.quiet_seconds)
    if scheme in {"dicomweb+http", "dicomweb+https"}:
        name, url = server_url(uri)
        access = Access.of(settings, environment)
        return DicomWebSource(name, url, access, settings.quiet_seconds, settings.modalities, settings.study_dates)
    if scheme == "s3" and (settings.open_archives or uri.lower().endswith(".zip")):
        raise UsageError(
            "ZIP files are opened where they lie on a local path alone, and the source is a bucket "
            "(s3://, source.open_archives or a name ending in .zip); copy them to a folder, or upload what they hold"
        )
    return FileSource(uri if "://" in uri else str(Path(uri).absolute()), settings)
