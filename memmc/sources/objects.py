"""What every source gives: objects listed, objects fetched, reasons why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

FILE_SYMLINK = "FILE_SYMLINK"
FILE_NOT_REGULAR = "FILE_NOT_REGULAR"
FILE_PATH_ESCAPE = "FILE_PATH_ESCAPE"
FILE_TOO_LARGE = "FILE_TOO_LARGE"
FILE_UNREADABLE = "FILE_UNREADABLE"
FILE_CHANGED_DURING_READ = "FILE_CHANGED_DURING_READ"
FILE_CHECKSUM = "FILE_CHECKSUM"  # not the bytes that the archive received, by its own MD5
FILE_ENCRYPTED = "FILE_ENCRYPTED"  # a ZIP member that asks for a password
FILE_ARCHIVE_LIMIT = "FILE_ARCHIVE_LIMIT"  # a ZIP member that inflates beyond source.archive_ratio or archive_bytes
FILE_ARCHIVE_METHOD = "FILE_ARCHIVE_METHOD"  # a ZIP member compressed otherwise than by deflate
FILE_ARCHIVE_DAMAGED = "FILE_ARCHIVE_DAMAGED"  # a ZIP member that overlaps another, or does not inflate to its CRC
STORE_AUTH = "STORE_AUTH"
STORE_TIMEOUT = "STORE_TIMEOUT"
STORE_TLS = "STORE_TLS"  # no certificate to trust: another host's, one of an unknown authority, or one out of date

STORE_FAILURES = frozenset({STORE_AUTH, STORE_TIMEOUT, STORE_TLS})
"""Reasons that may be the place's as well as one object's."""

RETRIABLE = STORE_FAILURES | {FILE_UNREADABLE, FILE_CHANGED_DURING_READ, FILE_CHECKSUM}
"""Reasons that may pass by themselves; the next run tries the object again."""


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One listed object.

    Attributes:
        path: name relative to the source, POSIX; bytes that are not UTF-8 are written as ``\\xNN``. The instance's
            identifier in an Orthanc, its three UIDs in a DICOMweb server.
        uri: exact place: ``file://`` (percent-encoded; ``#`` and an offset for a ZIP member), ``s3://`` or a URL.
        size: bytes; 0 where the source does not say (DICOMweb).
        modified: what changes when the bytes do: modification time (ns since 1970) of a file, entity tag of an S3
            object, CRC of a ZIP member, attachment of an Orthanc instance; empty where the source has nothing of
            the kind (DICOMweb).
        problem: reason code why it cannot be fetched, or None.
    """

    path: str
    uri: str
    size: int
    modified: str
    problem: str | None = None


class FetchFailed(Exception):
    """One object could not be fetched; holds a reason code and nothing else."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def retriable(self) -> bool:
        """True when a later attempt may succeed."""
        return self.reason in RETRIABLE


@dataclass(frozen=True)
class Cursor:
    """Up to where a source is accounted for.

    Attributes:
        place: in the source's own words, one line.
        again: paths of objects before it that could not be fetched.
    """

    place: str
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a source holds now, or holds beyond a cursor.

    Attributes:
        objects: in a fixed order.
        pending: new objects of studies that are not complete yet; a later listing gives them.
        cursor: where the next listing may begin once `objects` are accounted for; None when it lists all again.
        whole: every object of the source is listed, not only those beyond a cursor.
    """

    objects: list[SourceObject]
    pending: int = 0
    cursor: Cursor | None = None
    whole: bool = True


IsNew = Callable[[SourceObject], bool]
"""Says of a listed object whether no run has accounted for it."""

Data = bytes | bytearray | memoryview
"""An object's bytes, in whatever holds them without another copy."""

Refuse = Callable[[bytes], str | None]
"""Says by an object's first `HEAD_BYTES` for what reason it cannot be an instance; None where it may be one."""

LARGE_BYTES = 64 << 20  # hardly a radiograph is larger
HEAD_BYTES = 1 << 10


def refuse_nothing(head: bytes) -> str | None:
    """Let every head pass."""


def check_head(head: Data, size: int, refuse: Refuse) -> None:
    """Give a large object up by its head, before the rest of it is in memory.

    Raises:
        FetchFailed: the reason that `refuse` names.
    """
    reason = refuse(bytes(head[:HEAD_BYTES])) if size > LARGE_BYTES else None
    if reason is not None:
        raise FetchFailed(reason)


Listed = Callable[[int, str], None]
"""Is told how much is listed so far, as a number and in words without names."""


def unheard(done: int, note: str) -> None:
    """Tell nobody."""


class Source(Protocol):
    """A place that objects come from. Holds no open connection and may be pickled; never log it.

    Attributes:
        has_cursor: a listing may begin where an earlier one ended.
    """

    has_cursor: ClassVar[bool]

    @property
    def uri(self) -> str:
        """The place, without credentials; part of every object's key."""
        ...

    def listing(self, cursor: Cursor | None, is_new: IsNew, listed: Listed = unheard) -> Listing:
        """List the objects.

        Args:
            cursor: what the last listing whose objects were committed gave, and what of it is to be listed again; None
                lists all, as does a source without a cursor.
            is_new: spares questions about objects that are accounted for.
            listed: hears how far the listing is.

        Raises:
            UsageError: the source is not there, or its URI is not understood.
            StorageError: the place does not answer, or refuses.
            DataError: an archive that is no ZIP or holds too much.
        """
        ...

    def check(self) -> str:
        """Return a few words on what answers, without listing it.

        Raises:
            UsageError, StorageError, DataError: as `listing`.
        """
        ...

    def fetch(self, obj: SourceObject, max_bytes: int, refuse: Refuse = refuse_nothing) -> Data:
        """Return an object's bytes, all of them from the version that was listed.

        Args:
            obj: what to fetch.
            max_bytes: larger objects are refused before they are read.
            refuse: is asked about the head of an object of more than `LARGE_BYTES` before the rest is read; a
                DICOMweb server's parts are not looked into.

        Raises:
            FetchFailed: with a reason code; `STORE_*` when the place refuses or does not answer.
        """
        ...
