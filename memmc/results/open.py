"""Which archive a URI names."""

from __future__ import annotations

from collections.abc import Mapping

from memmc.config import PushConfig
from memmc.errors import UsageError
from memmc.results.archive import Archive
from memmc.results.dicomweb import DicomWebArchive
from memmc.sources.http import Access, server_url


def open_archive(settings: PushConfig, environment: Mapping[str, str]) -> Archive:
    """Return the archive of `push.uri`; nothing is asked of it yet.

    Raises:
        UsageError: no URI, or of a form that is not known.
        ConfigError: a file that the settings name cannot be read.
    """
    uri = settings.uri
    if not uri:
        raise UsageError("no archive is named; give --to URI, or set push.uri")
    delays_s = tuple(4.0**number for number in range(settings.tries - 1))
    access = Access.of(settings, environment, "push")
    if uri.startswith("dicomweb+"):
        place, url = server_url(uri, "push")
        return DicomWebArchive(place, url, access, delays_s)
    if uri.startswith(("dicom:", "dicom+tls:")):
        from memmc.results.dimse import DicomArchive

        return DicomArchive(uri, settings.ae_title, access, delays_s)
    raise UsageError("the push URI is not understood; expected dicomweb+https://..., dicom://... or dicom+tls://...")
