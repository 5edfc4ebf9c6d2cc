"""The S3 client and its errors; endpoint, region and credentials come from the ``AWS_*`` environment."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from typing import Any

from memmc.errors import StorageError

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
RETRY_BUDGET_S = 30.0
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
            # Two attempts keep a call to a silent server under a minute; `call` retries what the server answers.
            retries={"total_max_attempts": 2, "mode": "standard"},
            s3={"addressing_style": "path" if endpoint() else "auto"},
        ),
    )


class AbsentError(StorageError):
    """Nothing of this name is there."""


class AlreadyThereError(StorageError):
    """An object of this name is already there."""


def call(request: Callable[[Any], Any]) -> Any:
    """Run one request on the client; retry, with jitter, what the server says may be retried.

    Raises:
        StorageError: refused, absent (`AbsentError`), there already (`AlreadyThereError`), or no answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, ResponseStreamingError

    deadline, pause = time.monotonic() + RETRY_BUDGET_S, 0.2
    while True:
        try:
            return request(client())
        except ClientError as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if (status < 500 and status not in {409, 429}) or time.monotonic() + pause > deadline:
                raise _refused(status, str(error.response.get("Error", {}).get("Code", ""))) from None
        except (IncompleteReadError, ResponseStreamingError) as error:  # cut while the body was read
            if time.monotonic() + pause > deadline:
                raise _unreachable(type(error).__name__) from None
        except BotoCoreError as error:
            raise _unreachable(type(error).__name__) from None
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause *= 2


def _refused(status: int, code: str) -> StorageError:
    if code == "NoSuchBucket":
        return StorageError("S3 storage: the bucket does not exist; make it or check the URI")
    if status == 404:
        return AbsentError("S3 storage: nothing of this name is there; check the lake URI")
    if status == 412:
        return AlreadyThereError("S3 storage: an object of this name is already there")
    if status in {401, 403}:
        return StorageError(f"S3 storage: access refused ({code}); check AWS_ACCESS_KEY_ID, its secret and its rights")
    return StorageError(f"S3 storage: the server answered {status} ({code}); run again, then ask the server's keeper")


def _unreachable(kind: str) -> StorageError:
    if "Credential" in kind:
        return StorageError("S3 storage: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return StorageError(f"S3 storage: no answer from the server ({kind}); check AWS_ENDPOINT_URL and the network")
