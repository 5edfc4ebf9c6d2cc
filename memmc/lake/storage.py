"""One seam for bytes: a folder of the local file system, or a prefix of an S3 bucket.

S3 takes its endpoint, region and credentials from the standard ``AWS_*``
environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...), so a `Storage`
holds nothing but its URI, may be pickled, and connects where it is used.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from memmc import s3
from memmc.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pyarrow import fs

_TEMPORARY = ".tmp-"
_UNFINISHED = (f"{_TEMPORARY}*", "_commit_*.json.tmp")  # ours, and those of the deltalake package


@dataclass(frozen=True)
class Storage:
    """A place for bytes under names relative to it (POSIX, no ``..``).

    Attributes:
        uri: absolute local path, or ``s3://bucket/prefix``; no trailing slash.
    """

    uri: str

    @classmethod
    def open(cls, uri: str | Path) -> Storage:
        """Return the storage at a local path, ``file://`` or ``s3://`` URI; nothing is created or contacted.

        Raises:
            UsageError: another scheme, a host in ``file://``, an S3 URI without a bucket, or a ``..`` in a prefix.
        """
        text = str(uri)
        scheme, separator, _ = text.partition("://")
        if not separator:
            if not text:
                raise UsageError("empty storage URI; give a path, file:// or s3:// URI")
            return cls(str(Path(text).expanduser().absolute()))
        parts = urlsplit(text)
        if scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
            return cls(str(Path(unquote(parts.path)).absolute()))
        if scheme == "s3" and parts.netloc and "@" not in parts.netloc and not (parts.query or parts.fragment):
            key = parts.path.strip("/")
            if not key or _is_relative(key):
                return cls(f"s3://{parts.netloc}/{key}".rstrip("/"))
        raise UsageError(
            f"storage URI of scheme '{scheme}' not understood; give a path, file:///path or s3://bucket/prefix"
        )

    @property
    def is_s3(self) -> bool:
        """True for a prefix of a bucket."""
        return self.uri.startswith("s3://")

    def join(self, rel: str) -> str:
        """Return the absolute path or URI of a relative name."""
        return f"{self.uri}/{_checked(rel)}"

    def local_path(self, rel: str | None = None) -> Path | None:
        """Return the local path of a relative name (the root without one), or None on S3."""
        if self.is_s3:
            return None
        return Path(self.uri) / _checked(rel) if rel is not None else Path(self.uri)

    def read(self, rel: str) -> bytes:
        """Return an object's bytes.

        Raises:
            StorageError: absent, or the place cannot be read.
        """
        path = self.local_path(rel)
        if path is None:
            return s3.call(lambda client: s3.read_body(client.get_object(**self._key(rel))))
        with _local_errors("read"):
            return path.read_bytes()

    def read_range(self, rel: str, start: int, length: int) -> tuple[bytes, int]:
        """Return some bytes of an object, and its size.

        Args:
            start: first byte; a negative one counts from the end.
            length: bytes, fewer where the object ends.

        Raises:
            StorageError: absent, or the place cannot be read.
        """
        path = self.local_path(rel)
        if path is None:
            return self._read_s3_range(rel, start, length)
        with _local_errors("read"), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size + start) if start < 0 else start)
            return file.read(length), size

    def write(self, rel: str, data: bytes) -> None:
        """Write an object whole: after a crash it holds its old bytes, or all of `data`.

        Raises:
            StorageError: the place cannot be written.
        """
        path = self.local_path(rel)
        if path is None:
            s3.call(lambda client: client.put_object(**self._key(rel), **_body(data)))
            return
        with _local_errors("write"), self._aside(path, data) as temporary:
            temporary.replace(path)

    def create(self, rel: str, data: bytes) -> bool:
        """Write an object that is not there yet; of several callers one gets True.

        Returns:
            True when this call made the object, False when it was there before.

        Raises:
            StorageError: the place cannot be written.
        """
        path = self.local_path(rel)
        try:
            if path is None:
                s3.call(lambda client: client.put_object(**self._key(rel), **_body(data), IfNoneMatch="*"))
            else:
                with _local_errors("write"), self._aside(path, data) as temporary:
                    os.link(temporary, path)
        except s3.AlreadyThereError:
            return False
        return True

    def exists(self, rel: str) -> bool:
        """Return whether an object of this name is there."""
        path = self.local_path(rel)
        if path is not None:
            return path.is_file()
        try:
            s3.call(lambda client: client.head_object(**self._key(rel)))
        except s3.AbsentError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Return the names of all objects under a folder, sorted; unfinished local writes are left out."""
        root = self.local_path(prefix or None)
        if root is None:
            return sorted(self._list_s3(prefix))
        with _local_errors("read"):
            found = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith(_TEMPORARY))
            return sorted(path.relative_to(self.uri).as_posix() for path in found)

    def delete(self, rel: str) -> None:
        """Remove an object; one that is not there is no error."""
        path = self.local_path(rel)
        if path is None:
            s3.call(lambda client: client.delete_object(**self._key(rel)))
            return
        with _local_errors("write"):
            path.unlink(missing_ok=True)

    def persist(self, rel: str) -> None:
        """Make a local object that another library wrote survive a power cut; S3 needs nothing."""
        path = self.local_path(rel)
        if path is not None and path.exists():
            with _local_errors("write"):
                _fsync(path)
                _fsync(path.parent)

    def unfinished(self, before: float) -> list[str]:
        """Return local files that a killed writer left aside, last written before a time (s since 1970), by name."""
        root = self.local_path()
        if root is None:
            return []
        found: list[str] = []
        with _local_errors("read"):
            for path in (path for pattern in _UNFINISHED for path in root.rglob(pattern)):
                with contextlib.suppress(FileNotFoundError):  # its writer has just finished it
                    if path.stat().st_mtime < before:
                        found.append(path.relative_to(root).as_posix())
        return sorted(found)

    def uploads(self, before: datetime) -> list[tuple[str, str]]:
        """Return key and id of S3 multipart uploads under this prefix that were begun before a time and not ended."""
        if not self.is_s3:
            return []
        where = self._key("_")
        found: list[tuple[str, str]] = []
        more: dict[str, str] = {}
        while True:
            page = s3.call(
                lambda client, more=more: client.list_multipart_uploads(
                    Bucket=where["Bucket"], Prefix=where["Key"].removesuffix("_"), **more
                )
            )
            begun = [item for item in page.get("Uploads", ()) if item["Initiated"] < before]
            found += [(item["Key"], item["UploadId"]) for item in begun]
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, key: str, upload: str) -> None:
        """End an unfinished S3 multipart upload; its parts are freed."""
        bucket = self._key("_")["Bucket"]
        with contextlib.suppress(s3.AbsentError):  # its writer, or another sweep, has ended it
            s3.call(lambda client: client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload))

    def delta_options(self) -> dict[str, str]:
        """Return `storage_options` for the deltalake package; empty for local paths."""
        if not self.is_s3:
            return {}
        s3.prepare_environment()
        options = {
            "AWS_REGION": s3.region(),
            "conditional_put": "etag",  # a commit is one PUT with If-None-Match
            "connect_timeout": f"{s3.CONNECT_TIMEOUT_S}s",
            "timeout": f"{s3.READ_TIMEOUT_S}s",
            "max_retries": "10",  # within the timeout that follows
            "retry_timeout": f"{s3.RETRY_BUDGET_S:.0f}s",
        }
        endpoint = s3.endpoint()
        if endpoint:
            options["AWS_ENDPOINT_URL"] = endpoint
            options["AWS_ALLOW_HTTP"] = str(endpoint.startswith("http://")).lower()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            if os.environ.get(name):
                options[name] = os.environ[name]
        return options

    def arrow_filesystem(self) -> tuple[fs.FileSystem, str]:
        """Return an Arrow file system and this storage's root in it (absolute path, or ``bucket/prefix``)."""
        from pyarrow import fs

        if not self.is_s3:
            return fs.LocalFileSystem(), self.uri
        s3.prepare_environment()
        endpoint = urlsplit(s3.endpoint() or "")
        return (
            fs.S3FileSystem(
                region=s3.region(),
                connect_timeout=s3.CONNECT_TIMEOUT_S,
                request_timeout=s3.READ_TIMEOUT_S,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
                **({"scheme": endpoint.scheme, "endpoint_override": endpoint.netloc} if endpoint.netloc else {}),
            ),
            self.uri.removeprefix("s3://"),
        )

    def probe_conditional_put(self) -> None:
        """Check that the store refuses to overwrite when asked to; commits rely on it.

        Raises:
            StorageError: the second of two conditional writes was accepted, or the place cannot be written.
        """
        rel = f"_probe/{uuid.uuid4().hex}"
        try:
            # After a lost answer the store may say that an object is there which is ours.
            made = self.create(rel, b"1") or self.read(rel) == b"1"
            if not made or self.create(rel, b"2") or self.read(rel) != b"1":
                raise StorageError(
                    "S3 storage ignores If-None-Match on PUT, so two writers could overwrite each other's commit; "
                    "use a store that supports conditional writes"
                )
        finally:
            self.delete(rel)

    def _key(self, rel: str) -> dict[str, str]:
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": f"{prefix}/{_checked(rel)}".lstrip("/")}

    def _read_s3_range(self, rel: str, start: int, length: int) -> tuple[bytes, int]:
        asked = f"bytes={start}" if start < 0 else f"bytes={start}-{start + length - 1}"

        def request(client: Any) -> tuple[bytes, int]:
            answer = client.get_object(**self._key(rel), Range=asked)
            size = int(str(answer.get("ContentRange", "/0")).rpartition("/")[2]) or answer["ContentLength"]
            return s3.read_body(answer)[:length], size

        return s3.call(request)

    def _list_s3(self, prefix: str) -> Iterator[str]:
        where = self._key(prefix) if prefix else self._key("_")
        folder = f"{where['Key']}/" if prefix else where["Key"].removesuffix("_")
        root = self._key("_")["Key"].removesuffix("_")
        token: dict[str, str] = {}
        while True:
            page = s3.call(
                lambda client, more=token: client.list_objects_v2(Bucket=where["Bucket"], Prefix=folder, **more)
            )
            yield from (item["Key"].removeprefix(root) for item in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    @contextlib.contextmanager
    def _aside(self, path: Path, data: bytes) -> Generator[Path]:
        """Write durably beside `path`; the body moves the file into place, then the folder is made durable."""
        if not path.parent.is_dir():
            self._make_folder(path.parent)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and its parents durably; a new root is open to its owner alone."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(mode=0o700 if path == Path(self.uri) else 0o777, exist_ok=True)
            _fsync(path.parent)


def _body(data: bytes) -> dict[str, Any]:
    """Return a body with the checksum that every S3 server compares before it stores anything."""
    return {"Body": data, "ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}


def _is_relative(rel: str) -> bool:
    return (
        bool(rel)
        and "\0" not in rel
        and not rel.startswith("/")
        and not {"..", ".", ""} & set(rel.rstrip("/").split("/"))
    )


def _checked(rel: str) -> str:
    if not _is_relative(rel):
        raise StorageError("storage name leaves its root or is empty; names are relative, without '..'")
    return str(PurePosixPath(rel))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _local_errors(verb: str) -> Generator[None]:
    try:
        yield
    except FileExistsError:
        raise s3.AlreadyThereError("local storage: an object of this name is already there") from None
    except FileNotFoundError:
        raise s3.AbsentError(f"local storage: cannot {verb}, nothing of this name is there; check the URI") from None
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        advice = "free space and run again" if full else "check the folder's permissions and the disk"
        raise StorageError(f"local storage: cannot {verb} ({error.strerror}); {advice}") from None
