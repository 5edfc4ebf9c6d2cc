"""HTTP to an archive: bounded in time and size, tried again where that may help, silent in logs.

URLs of an archive name patients' objects, so nothing here logs or raises one. No proxy, netrc or redirect is followed:
credentials and images go to the place that the source names, or nowhere.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import ssl
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from memmc.config.section import ServerSection
from memmc.errors import ConfigError, StorageError, UsageError
from memmc.sources.objects import (
    FILE_CHANGED_DURING_READ,
    FILE_TOO_LARGE,
    FILE_UNREADABLE,
    LARGE_BYTES,
    STORE_AUTH,
    STORE_TIMEOUT,
    STORE_TLS,
    FetchFailed,
    Listed,
    Refuse,
    check_head,
    refuse_nothing,
    unheard,
)

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

RETRY_DELAYS_S = (0.5, 2.0)
MAX_JSON_BYTES = 64 << 20
REQUESTS_AT_ONCE = 8
_BUSY = frozenset({408, 425, 429, 502, 503, 504})


@dataclass(frozen=True)
class Access:
    """How to reach a server. Holds credentials and therefore shows nothing of them.

    Attributes:
        authorization: value of the Authorization header.
        ca_pem: certificates that the server's chain must end in; the system's when None.
        connect_seconds: time to connect, s.
        read_seconds: time between two packets, s.
        answer_seconds: time for one body, s.
    """

    authorization: str | None = field(default=None, repr=False)
    ca_pem: str | None = field(default=None, repr=False)
    connect_seconds: float = 5.0
    read_seconds: float = 20.0
    answer_seconds: float = 300.0

    @classmethod
    def of(cls, settings: ServerSection, environment: Mapping[str, str], section: str = "source") -> Access:
        """Read the files that the settings name, here, so that workers need none of them.

        Args:
            settings: of the section.
            environment: may hold the password.
            section: its name.

        Raises:
            ConfigError: a file cannot be read, or a user has no password.
        """
        return cls(
            authorization=_authorization(settings, environment, section),
            ca_pem=_text(settings.ca_file, f"{section}.ca_file") if settings.ca_file else None,
            connect_seconds=settings.connect_seconds,
            read_seconds=settings.read_seconds,
            answer_seconds=settings.answer_seconds,
        )


@dataclass(frozen=True)
class Answer:
    """A body, and what kind it is."""

    body: bytes | bytearray = field(repr=False)
    content_type: str


class _PassingError(Exception):
    """May succeed when tried again; holds the reason for when it does not."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def password_variable(section: str) -> str:
    """Return the environment variable that may hold the password of a section's server."""
    return f"MEMMC_{section.upper()}_PASSWORD"


def server_url(uri: str, section: str = "source") -> tuple[str, str]:
    """Return a server's URI in one spelling, and its URL.

    Args:
        uri: ``orthanc+http(s)://host[:port][/path]`` or ``dicomweb+...``.
        section: whose server it is.

    Raises:
        UsageError: not of that form. The text does not repeat the URI.
    """
    kind, _, rest = uri.partition("+")
    try:
        parts = urlsplit(rest)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise UsageError(
            f"the {section} URI holds a user or password; set {section}.user, and {section}.password_file or "
            + password_variable(section)
        )
    if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
        raise UsageError(f"the {section} URI is not understood; expected {kind}+https://host:port/path")
    name = f"[{host}]" if ":" in host else host
    url = f"{parts.scheme}://{name}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
    return f"{kind}+{url}", url


def get(
    access: Access,
    url: str,
    *,
    max_bytes: int,
    accept: str = "*/*",
    params: Mapping[str, str | int] | None = None,
    refuse: Refuse = refuse_nothing,
) -> Answer:
    """Return the body of an answer, whole.

    Args:
        max_bytes: a longer body is given up.
        refuse: is asked about the head of a body that turns out to be large.

    Raises:
        FetchFailed: STORE_AUTH (401, 403, redirects), STORE_TLS (its certificate), STORE_TIMEOUT (unreachable, silent,
            busy or cut off, several times), FILE_CHANGED_DURING_READ (404, 410), FILE_TOO_LARGE, FILE_UNREADABLE (any
            other refusal).
    """
    return _tried(lambda: _get_once(access, url, max_bytes, accept, params or {}, refuse), RETRY_DELAYS_S)


def post(
    access: Access, url: str, body: bytes, *, content_type: str, accept: str, delays_s: Sequence[float]
) -> tuple[int, bytes]:
    """Return status and body of the answer to a request that may be made twice.

    Args:
        delays_s: between tries, s.

    Raises:
        FetchFailed: STORE_AUTH, STORE_TLS or STORE_TIMEOUT, as `get`; FILE_UNREADABLE for a server's error that stays.
    """
    return _tried(lambda: _post_once(access, url, body, {"Content-Type": content_type, "Accept": accept}), delays_s)


def _tried(once: Callable[[], Answered], delays_s: Sequence[float]) -> Answered:
    """Return what one try brings, the first or one after a delay, s."""
    reason = STORE_TIMEOUT
    for delay in (*delays_s, None):
        try:
            return once()
        except _PassingError as error:
            reason = error.reason
        if delay:
            time.sleep(delay)
    raise FetchFailed(reason)


def _post_once(access: Access, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    deadline = time.monotonic() + access.answer_seconds
    with (
        _failures_told(),
        _client(os.getpid(), access).stream("POST", url, content=body, headers=dict(headers)) as answer,
    ):
        if answer.status_code >= 500 or answer.status_code in _BUSY | {401, 403, 407} or answer.is_redirect:
            _check_status(answer.status_code)
        found = bytearray()
        for chunk in answer.iter_bytes():
            found += chunk
            if len(found) > MAX_JSON_BYTES:
                raise FetchFailed(FILE_TOO_LARGE)
            if time.monotonic() > deadline:
                raise _PassingError(STORE_TIMEOUT)
        return answer.status_code, bytes(found)


def ask(
    access: Access, url: str, params: Mapping[str, str | int] | None = None, accept: str = "application/json"
) -> Any:
    """Return an answer's JSON value, or None where there is nothing (204, 404).

    Raises:
        StorageError: the server refuses, does not answer, or answers no JSON.
    """
    try:
        body = ask_bytes(access, url, params, accept)
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        raise StorageError("the source answers no JSON; check that its URI names the server's root") from None


def ask_bytes(
    access: Access, url: str, params: Mapping[str, str | int] | None = None, accept: str = "*/*"
) -> bytes | bytearray | None:
    """Return an answer's body, or None where there is nothing.

    Raises:
        StorageError: the server refuses or does not answer.
    """
    try:
        return get(access, url, max_bytes=MAX_JSON_BYTES, accept=accept, params=params).body
    except FetchFailed as failure:
        if failure.reason == FILE_CHANGED_DURING_READ:
            return None
        raise StorageError(_LISTING[failure.reason]) from None


def answers(
    question: Callable[[Asked], Answered], items: Collection[Asked], listed: Listed = unheard, what: str = ""
) -> list[Answered]:
    """Return what a question brings for each item, in their order; `REQUESTS_AT_ONCE` are under way at a time.

    Args:
        question: its first error ends all and is raised here.
        items: what to ask about.
        listed: hears how many are answered.
        what: the items' name in the plural.
    """
    found: list[Answered] = []
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        try:
            for answer in pool.map(question, items):
                found.append(answer)
                listed(len(found), f"{len(found)} of {len(items)} {what}")
        except BaseException:  # an interrupt too: what is not asked yet is asked no more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


_LISTING = {
    STORE_AUTH: "the source refuses access (STORE_AUTH); check source.user and its password or token",
    STORE_TIMEOUT: "the source does not answer (STORE_TIMEOUT); check its address, the network and source.ca_file",
    STORE_TLS: "the source's certificate is not to be trusted (STORE_TLS): it is another host's, out of date, or of an "
    "authority that is not known here; check the URI's host name, the server's certificate and source.ca_file",
    FILE_TOO_LARGE: "the source answers more than a listing can be; check that its URI names the right server",
    FILE_UNREADABLE: "the source cannot be listed; check that its URI names the right server, and the server's log",
}


def _get_once(
    access: Access, url: str, max_bytes: int, accept: str, params: Mapping[str, str | int], refuse: Refuse
) -> Answer:
    deadline = time.monotonic() + access.answer_seconds
    body = bytearray()
    with (
        _failures_told(),
        _client(os.getpid(), access).stream("GET", url, params=dict(params), headers={"Accept": accept}) as answer,
    ):
        if answer.status_code == 204:
            return Answer(b"", "")
        _check_status(answer.status_code)
        for chunk in answer.iter_bytes():
            body += chunk
            if len(body) > max_bytes:
                raise FetchFailed(FILE_TOO_LARGE)
            if time.monotonic() > deadline:
                raise _PassingError(STORE_TIMEOUT)
            if len(body) - len(chunk) <= LARGE_BYTES:
                check_head(body, len(body), refuse)
        return Answer(body, answer.headers.get("content-type", ""))


@contextmanager
def _failures_told() -> Generator[None]:
    """Turn what a request may end with into what the caller is told."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        if _is_certificate_refused(error):
            raise FetchFailed(STORE_TLS) from None
        raise _PassingError(STORE_TIMEOUT) from None


def _is_certificate_refused(error: BaseException) -> bool:
    """Return whether an error of the TLS handshake lies behind another: asking again would end alike."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLCertVerificationError):
        found = found.__cause__ or found.__context__
    return found is not None


def _check_status(status: int) -> None:
    if status == 200:
        return
    if status in _BUSY:
        raise _PassingError(STORE_TIMEOUT)
    if status >= 500:
        raise _PassingError(FILE_UNREADABLE)
    if status in {404, 410}:
        raise FetchFailed(FILE_CHANGED_DURING_READ)
    raise FetchFailed(STORE_AUTH if status in {401, 403, 407} or 300 <= status < 400 else FILE_UNREADABLE)


@functools.lru_cache(maxsize=4)
def _client(_pid: int, access: Access) -> httpx.Client:
    """Return this process's connections; they close with it."""
    for name in ("httpx", "httpcore"):  # they log every URL
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx.Client(
        headers={"Authorization": access.authorization} if access.authorization else {},
        verify=ssl.create_default_context(cadata=access.ca_pem),
        timeout=httpx.Timeout(access.read_seconds, connect=access.connect_seconds),
        # Orthanc closes idle connections after one second; one that it is about to close must not be taken.
        limits=httpx.Limits(max_connections=REQUESTS_AT_ONCE, keepalive_expiry=0.5),
        follow_redirects=False,
        trust_env=False,
    )


def _authorization(settings: ServerSection, environment: Mapping[str, str], section: str) -> str | None:
    if settings.token_file is not None:
        return f"Bearer {_first_line(settings.token_file, f'{section}.token_file')}"
    if settings.user is None:
        return None
    password = environment.get(password_variable(section))
    if settings.password_file is not None:
        password = _first_line(settings.password_file, f"{section}.password_file")
    if password is None:
        raise ConfigError(
            f"{section}.user has no password; set {section}.password_file or {password_variable(section)}"
        )
    return "Basic " + base64.b64encode(f"{settings.user}:{password}".encode()).decode()


def _first_line(file: str, setting: str) -> str:
    lines = _text(file, setting).splitlines()
    if not lines or not lines[0].strip():
        raise ConfigError(f"{setting} names an empty file; its first line is the secret")
    return lines[0].strip()


def _text(file: str, setting: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{setting} names a file that cannot be read as text") from None
