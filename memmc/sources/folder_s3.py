"""Objects of a local folder or of an S3 prefix: list every one, fetch one safely.

Every file counts, hidden or not, whatever its name; what cannot be an instance
is listed with a reason instead of being passed over. Nothing outside the root
is ever opened: each part of a path is opened from its parent, links refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit

import numpy as np

from memmc import s3
from memmc.errors import StorageError, UsageError
from memmc.sources.objects import (
    FILE_CHANGED_DURING_READ,
    FILE_NOT_REGULAR,
    FILE_PATH_ESCAPE,
    FILE_SYMLINK,
    FILE_TOO_LARGE,
    FILE_UNREADABLE,
    HEAD_BYTES,
    STORE_AUTH,
    STORE_TIMEOUT,
    Data,
    FetchFailed,
    Refuse,
    SourceObject,
    check_head,
    refuse_nothing,
)

READ_CHUNK_BYTES = 64 << 20
S3_PAGE_KEYS = 1000


def list_objects(source_uri: str) -> Iterator[SourceObject]:
    """Return every object under a source, folders in name order, in one pass.

    Args:
        source_uri: a folder or a file (path or ``file://``), or ``s3://bucket/prefix``: the object of that
            key and all under ``prefix/``.

    Raises:
        UsageError: the source is not there, or its URI is not understood.
        StorageError: the bucket cannot be listed (raised while iterating).
    """
    if source_uri.startswith("s3://"):
        return _list_s3(*_bucket_and_key(source_uri))
    root, single = local_root(source_uri)
    if single is None:
        return _list_folder(root, "")
    return iter([_local_object(root, single, os.lstat(os.path.join(root, single)))])  # noqa: PTH118 - bytes path


def fetch(source_uri: str, obj: SourceObject, max_bytes: int, refuse: Refuse = refuse_nothing) -> Data:
    """Return an object's bytes, all of them from the version that was listed.

    Args:
        source_uri: the source that listed the object.
        obj: what to fetch.
        max_bytes: larger objects are refused before they are read.
        refuse: is asked about a large object's head before the rest is read.

    Raises:
        FetchFailed: with a reason code.
    """
    if obj.problem is not None:
        raise FetchFailed(obj.problem)
    if obj.size > max_bytes:
        raise FetchFailed(FILE_TOO_LARGE)
    if obj.uri.startswith("s3://"):
        return _fetch_s3(source_uri, obj, max_bytes, refuse)
    return _fetch_local(source_uri, obj, max_bytes, refuse)


def _buffer(size: int) -> memoryview:
    """Return room for an object: nothing is joined or copied, and its pages are made as they are filled."""
    return np.empty(size, np.uint8).data


# --- local files; paths are bytes, since a file name need not be text -----------------------------------------


def local_root(source_uri: str) -> tuple[bytes, bytes | None]:
    """Return the real folder, and the file's name when the source is a single file.

    Raises:
        UsageError: it is not there.
    """
    if "://" in source_uri:
        parts = urlsplit(source_uri)
        if parts.scheme != "file" or parts.netloc not in {"", "localhost"}:
            raise UsageError(
                f"source of scheme '{parts.scheme}' not understood; give a path, or a file://, "
                "s3://, orthanc+https:// or dicomweb+https:// URI"
            )
        path = Path(os.fsdecode(unquote_to_bytes(parts.path)))
    else:
        path = Path(source_uri).expanduser()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise UsageError("the source is not there or cannot be read; check its path") from None
    return (os.fsencode(real), None) if real.is_dir() else (os.fsencode(real.parent), os.fsencode(real.name))


def _list_folder(root: bytes, folder: str) -> Iterator[SourceObject]:
    """Yield a folder's objects, depth first, by an explicit stack: depth is bounded by the disk, not by Python."""
    try:
        stack = [_entries(root)]
    except OSError:
        raise UsageError("the source folder cannot be read; check its permissions") from None
    prefix = len(root.rstrip(b"/")) + 1
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        relative = entry.path[prefix:]
        try:
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                stack.append(_entries(entry.path))
                continue
        except OSError:
            yield SourceObject(_text(relative), _file_uri(entry.path), 0, "", FILE_UNREADABLE)
            continue
        yield _local_object(root, relative, found)


def _entries(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    with os.scandir(folder) as found:
        return iter(sorted(found, key=lambda entry: entry.name))


def _local_object(root: bytes, relative: bytes, found: os.stat_result) -> SourceObject:
    problem = None
    if stat.S_ISLNK(found.st_mode):
        problem = FILE_SYMLINK
    elif not stat.S_ISREG(found.st_mode):
        problem = FILE_NOT_REGULAR
    uri = _file_uri(root.rstrip(b"/") + b"/" + relative)
    return SourceObject(_text(relative), uri, found.st_size, str(found.st_mtime_ns), problem)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _file_uri(path: bytes) -> str:
    return "file://" + quote(path)


def _fetch_local(source_uri: str, obj: SourceObject, max_bytes: int, refuse: Refuse) -> Data:
    try:
        root, _ = local_root(source_uri)
    except UsageError:
        raise FetchFailed(FILE_UNREADABLE) from None
    path = unquote_to_bytes(obj.uri.removeprefix("file://"))
    if not path.startswith(root.rstrip(b"/") + b"/"):
        raise FetchFailed(FILE_PATH_ESCAPE)
    parts = path[len(root.rstrip(b"/")) + 1 :].split(b"/")
    if any(part in {b"", b".", b".."} or b"\0" in part for part in parts):
        raise FetchFailed(FILE_PATH_ESCAPE)
    try:
        with opened(root, parts) as descriptor:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise FetchFailed(FILE_NOT_REGULAR)
            if (before.st_size, str(before.st_mtime_ns)) != (obj.size, obj.modified):
                raise FetchFailed(FILE_CHANGED_DURING_READ)
            data = _read_at_most(descriptor, min(before.st_size, max_bytes), refuse)
            after = os.fstat(descriptor)
    except FileNotFoundError:
        raise FetchFailed(FILE_CHANGED_DURING_READ) from None
    except OSError:
        raise FetchFailed(FILE_UNREADABLE) from None
    if len(data) != before.st_size or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise FetchFailed(FILE_CHANGED_DURING_READ)
    return data


@contextlib.contextmanager
def opened(root: bytes, parts: list[bytes]) -> Generator[int]:
    """Open ``root/parts`` part by part, so that no link swapped in meanwhile is followed."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            deeper = _open_part(part, os.O_DIRECTORY, folder)
            os.close(folder)
            folder = deeper
        descriptor = _open_part(parts[-1], os.O_NONBLOCK, folder)  # a FIFO must not block the open
    finally:
        os.close(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_part(part: bytes, flags: int, folder: int) -> int:
    found = os.stat(part, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        raise FetchFailed(FILE_SYMLINK)
    if not (stat.S_ISDIR(found.st_mode) if flags & os.O_DIRECTORY else stat.S_ISREG(found.st_mode)):
        raise FetchFailed(FILE_NOT_REGULAR)
    return os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)


def _read_at_most(descriptor: int, size: int, refuse: Refuse) -> memoryview:
    """Read up to `size` bytes; a byte more would be a file that grew, which the caller sees by its size."""
    check_head(os.pread(descriptor, HEAD_BYTES, 0), size, refuse)
    buffer, done = _buffer(size), 0
    while done < size:
        count = os.readv(descriptor, [buffer[done : done + READ_CHUNK_BYTES]])
        if not count:
            break
        done += count
    return buffer[:done]


# --- S3 -----------------------------------------------------------------------------------------------------------


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or "@" in bucket:
        raise UsageError("the source URI names no bucket; give s3://bucket/prefix")
    return bucket, key


def _list_s3(bucket: str, prefix: str) -> Iterator[SourceObject]:
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    if folder != prefix:
        # The first key that starts with the prefix is the prefix itself, if there is such an object.
        first = _page(bucket, prefix, {"MaxKeys": 1}).get("Contents", [])
        yield from (_s3_object(bucket, prefix, item) for item in first if item["Key"] == prefix)
    more: dict[str, Any] = {}
    while True:
        page = _page(bucket, folder, more)
        for item in page.get("Contents", []):
            if item["Size"] or not item["Key"].endswith("/"):  # an empty "folder" marker is no file
                yield _s3_object(bucket, folder, item)
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _s3_object(bucket: str, folder: str, item: dict[str, Any]) -> SourceObject:
    key = item["Key"]
    path = key.removeprefix(folder) or key.rpartition("/")[2]
    return SourceObject(path, f"s3://{bucket}/{key}", item["Size"], item["ETag"].strip('"'))


def _page(bucket: str, prefix: str, more: dict[str, Any]) -> dict[str, Any]:
    arguments = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": S3_PAGE_KEYS, **more}
    try:
        return s3.call(lambda client: client.list_objects_v2(**arguments))
    except StorageError as error:
        raise StorageError(f"the S3 source cannot be listed: {error}") from None


def _fetch_s3(source_uri: str, obj: SourceObject, max_bytes: int, refuse: Refuse) -> Data:
    bucket, key = _bucket_and_key(obj.uri)
    root_bucket, root = _bucket_and_key(source_uri)
    under = key == root or not root or key.startswith(root if root.endswith("/") else f"{root}/")
    if bucket != root_bucket or not under:
        raise FetchFailed(FILE_PATH_ESCAPE)

    def request(client: Any) -> memoryview:
        answer = client.get_object(Bucket=bucket, Key=key, IfMatch=obj.modified)
        if answer["ContentLength"] > max_bytes:
            answer["Body"].close()
            raise FetchFailed(FILE_TOO_LARGE)
        return _gathered(s3.read_chunks(answer), answer["ContentLength"], refuse)

    try:
        data = s3.call(request)
    except StorageError as error:
        raise FetchFailed(_reason(error)) from None
    if len(data) != obj.size:
        raise FetchFailed(FILE_CHANGED_DURING_READ)
    return data


def _gathered(chunks: Iterable[bytes], size: int, refuse: Refuse) -> memoryview:
    """Put the chunks of a body, which has its declared size, behind one another."""
    buffer, done = _buffer(size), 0
    for chunk in chunks:
        before, done = done, done + len(chunk)
        buffer[before:done] = chunk
        if before < HEAD_BYTES <= done:
            check_head(buffer, size, refuse)
    return buffer[:done]


def _reason(error: StorageError) -> str:
    if isinstance(error, s3.AbsentError | s3.AlreadyThereError):  # gone, or no longer the one that was listed
        return FILE_CHANGED_DURING_READ
    if isinstance(error, s3.S3Error) and error.code == "InvalidObjectState":  # archived, has to be restored first
        return FILE_UNREADABLE
    return STORE_AUTH if isinstance(error, s3.AccessRefusedError) else STORE_TIMEOUT
