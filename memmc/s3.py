"""The S3 client and its errors; endpoint, region and credentials come from the ``AWS_*`` environment."""

from __future__ import annotations

import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from memmc.errors import StorageError

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
RETRY_BUDGET_S = 30.0
LEAST_RATE = 64 << 10  # bytes per second, below which a body is given up
DEFAULT_REGION = "us-east-1"

_CLIENT_ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def prepare_environment() -> None:
    """Ask for checksums only where the S3 API demands them; call before any S3 client is made.

    The default, trailing checksums in a chunked body, is refused with status
    411 by several S3-compatible servers, and some store the framing as data.
    """
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


def endpoint() -> str | None:
    """Return the endpoint URL that the environment names, or None for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region() -> str:
    """Return the region that the environment names."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or DEFAULT_REGION


def client() -> Any:
    """Return this process's botocore S3 client for the current environment."""
    prepare_environment()
    return _client(os.getpid(), tuple(os.environ.get(name) for name in _CLIENT_ENVIRONMENT))


@functools.lru_cache(maxsize=8)
def _client(_pid: int, _environment: tuple[str | None, ...]) -> Any:
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client(
        "s3",
        region_name=region(),
        endpoint_url=endpoint(),
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1, "mode": "standard"},  # `call` retries, within one budget
            s3={"addressing_style": "path" if endpoint() else "auto"},
        ),
    )


class S3Error(StorageError):
    """The server refused; `code` is its word for why."""

    code = ""


class AbsentError(S3Error):
    """Nothing of this name is there."""


class AlreadyThereError(S3Error):
    """An object of this name is already there, or is not the one that was asked for."""


class AccessRefusedError(S3Error):
    """These credentials, or none, may not do this."""


def call(request: Callable[[Any], Any]) -> Any:
    """Run one request on the client; retry, with jitter, what may pass by itself.

    That is 5xx, 409, 429, a connection that fails or is reset, and a body that is cut. The last try begins within
    `RETRY_BUDGET_S` and ends at the latest with the timeouts, so that a silent server costs less than a minute.

    Raises:
        StorageError: refused (`AccessRefusedError`), absent (`AbsentError`), there already (`AlreadyThereError`), no
            answer, or any other answer (`S3Error`).
    """
    from botocore.exceptions import BotoCoreError, ClientError

    deadline, pause = time.monotonic() + RETRY_BUDGET_S, 0.2
    while True:
        try:
            return request(client())
        except ClientError as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code = str(error.response.get("Error", {}).get("Code", ""))
            again = status >= 500 or status in {409, 429} or code in _AGAIN
            failure = _refused(status, code)
        except BotoCoreError as error:
            again = isinstance(error, _passing())
            failure = _unreachable(type(error).__name__)
        if not again or time.monotonic() + pause > deadline:
            raise failure
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, 5.0)


def read_body(answer: Mapping[str, Any]) -> bytes:
    """Return the body of an answer to `get_object`; see `read_chunks`."""
    return b"".join(read_chunks(answer))


def read_chunks(answer: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the body of an answer to `get_object` as it comes; one that drips is given up, however steadily it does.

    It may take `READ_TIMEOUT_S`, and more by its size at `LEAST_RATE`.

    Raises:
        botocore.exceptions.BotoCoreError: which `call` knows.
    """
    from botocore.response import StreamingBody

    size = answer.get("ContentLength")
    deadline = time.monotonic() + READ_TIMEOUT_S + (size or 0) / LEAST_RATE
    with answer["Body"] as stream:
        yield from StreamingBody(_Arriving(stream, deadline), size).iter_chunks(_CHUNK_BYTES)


class _Arriving:
    """A stream that gives what has come, instead of waiting for all that was asked for."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, size: int) -> bytes:
        from urllib3.exceptions import ReadTimeoutError

        if time.monotonic() > self._deadline:
            raise ReadTimeoutError(None, "", "the body drips")  # pyright: ignore[reportArgumentType]
        return self._stream.read1(size)


_CHUNK_BYTES = 1 << 20
_AGAIN = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout"})  # the body was spoilt or cut on its way


@functools.cache
def _passing() -> tuple[type[Exception], ...]:
    """Return the failures of a connection, as against those of the call."""
    from botocore.exceptions import ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError

    return (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)


_PASSING = re.compile(r"connection|sending request|reading a body|timed? ?out|server returned.*\b50\d\b", re.DOTALL)


def may_pass(error: Exception) -> bool:
    """Return whether an error of the deltalake package, which names them in words alone, is one of a connection."""
    return bool(_PASSING.search(str(error).lower()))


def table_error(error: Exception) -> StorageError:
    """Return an error of the deltalake package as ours, with the remedy; its text holds paths and is dropped."""
    text = str(error).lower()
    if re.search(r"\b40[13]\b|forbidden|accessdenied|credential", text):
        return StorageError("table storage: access refused; check AWS_ACCESS_KEY_ID, its secret and its rights")
    if "no space" in text:
        return StorageError("table storage: full; free space and run again")
    return StorageError(
        f"table storage: not reachable or not readable ({type(error).__name__}); check the lake URI and server"
    )


def _refused(status: int, code: str) -> S3Error:
    if code == "NoSuchBucket":
        error = S3Error("S3 storage: the bucket does not exist; make it or check the URI")
    elif status == 404:
        error = AbsentError("S3 storage: nothing of this name is there; check the lake URI")
    elif status == 412:
        error = AlreadyThereError("S3 storage: an object of this name is already there")
    elif status in {401, 403}:
        error = AccessRefusedError(
            f"S3 storage: access refused ({code}); check AWS_ACCESS_KEY_ID, its secret and its rights"
        )
    else:
        error = S3Error(f"S3 storage: the server answered {status} ({code}); run again, then ask the server's keeper")
    error.code = code
    return error


def _unreachable(kind: str) -> StorageError:
    if "Credential" in kind:
        return StorageError("S3 storage: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return StorageError(f"S3 storage: no answer from the server ({kind}); check AWS_ENDPOINT_URL and the network")
