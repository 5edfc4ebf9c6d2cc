"""What a Prefect server says of itself: whether it answers, its workers, and whether its database bears them."""

from __future__ import annotations

import base64
import json
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from memmc.errors import ConfigError, StorageError

_SQLITE_WORKERS = 2  # more make SQLite's one writer the thing that runs wait for, and fail on
_TIMEOUT_S = 20.0
_YES = frozenset({"1", "true", "t", "yes", "y", "on"})  # as pydantic reads a setting


@dataclass(frozen=True)
class PrefectServer:
    """A server as its API shows it.

    Attributes:
        workers: that have beaten lately, over all work pools.
        postgres: the server's settings name the PostgreSQL driver. An address alone is hidden by the API, so a server
            that has only that counts as one on SQLite, which is the default.
    """

    workers: int
    postgres: bool

    def fix(self) -> str:
        """Return what to change, or nothing."""
        if self.postgres or self.workers <= _SQLITE_WORKERS:
            return ""
        return (
            f"{self.workers} workers on a server that does not say it runs on PostgreSQL: SQLite bears "
            f"{_SQLITE_WORKERS}. Give the server PREFECT_SERVER_DATABASE_DRIVER=postgresql+asyncpg beside its "
            "PREFECT_SERVER_DATABASE_CONNECTION_URL, or stop workers"
        )


def look_at_server(url: str, env: Mapping[str, str]) -> PrefectServer:
    """Ask a server.

    Args:
        url: of its API.
        env: the settings of Prefect's own client: PREFECT_API_AUTH_STRING or PREFECT_API_KEY, where it wants one,
            PREFECT_API_SSL_CERT_FILE or PREFECT_API_TLS_INSECURE_SKIP_VERIFY, PREFECT_CLIENT_CUSTOM_HEADERS.

    Raises:
        StorageError: it does not answer, or refuses.
        ConfigError: a setting cannot be read.
    """
    headers = _custom_headers(env) | _authorisation(env)
    verify = _trust(env)
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT_S, verify=verify) as client:
            settings = _answer(client.get("/admin/settings"))
            client.headers.update(_against_forgery(client))
            pools = [pool["name"] for pool in _answer(client.post("/work_pools/filter", json={}))]
            workers = [
                worker
                for pool in pools
                for worker in _answer(client.post(f"/work_pools/{pool}/workers/filter", json={}))
                if worker.get("status") == "ONLINE"
            ]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise StorageError(
            f"the Prefect server does not answer ({type(error).__name__}); check PREFECT_API_URL, its credentials and "
            "that it runs"
        ) from None
    driver = settings.get("server", {}).get("database", {}).get("driver") or ""
    return PrefectServer(len(workers), driver.startswith("postgresql"))


def _authorisation(env: Mapping[str, str]) -> dict[str, str]:
    if auth := env.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"}
    if key := env.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    return {}


def _custom_headers(env: Mapping[str, str]) -> dict[str, str]:
    text = env.get("PREFECT_CLIENT_CUSTOM_HEADERS") or "{}"
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError("PREFECT_CLIENT_CUSTOM_HEADERS is no JSON object of texts; see Prefect's client settings")
    return found


def _trust(env: Mapping[str, str]) -> ssl.SSLContext | bool:
    """Return which certificates a server is believed by; True stands for those of httpx."""
    if (env.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY") or "").strip().lower() in _YES:
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        return unverified
    file = env.get("PREFECT_API_SSL_CERT_FILE")
    try:
        return ssl.create_default_context(cafile=file) if file else True
    except OSError as error:
        raise ConfigError(
            f"the certificates of PREFECT_API_SSL_CERT_FILE cannot be read ({type(error).__name__}); name a PEM file"
        ) from None


def _against_forgery(client: httpx.Client) -> dict[str, str]:
    """Return the headers that a server with `csrf_protection_enabled` wants of each POST; others give none."""
    name = str(uuid.uuid4())
    response = client.get("/csrf-token", params={"client": name})
    if not response.is_success:
        return {}
    return {"Prefect-Csrf-Client": name, "Prefect-Csrf-Token": response.json()["token"]}


def _answer(response: httpx.Response) -> Any:
    response.raise_for_status()
    return response.json()
