"""Prefect inside one process: its state in a folder, a local server that ends with the process, a quiet terminal.

Prefect reads its settings when it is imported, and makes its home directory
then; so `prepare` comes first, before any module that imports prefect.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.server import LocalServer

# Set only where the user has not, whichever server is used. A run whose process was killed is noticed by its missing
# heartbeat; the automation that acts on it belongs to a deployment.
_ALWAYS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
}
# Flow and task logs go to the server at INFO; the terminal shows the caller's own progress and error instead.
_EMBEDDED = {
    "PREFECT_LOGGING_LEVEL": "INFO",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_PROFILE": "ephemeral",
}
_started: list[LocalServer] = []


def prepare(home: Path) -> None:
    """Set Prefect's environment and begin to start the local server; return at once.

    With PREFECT_API_URL set only telemetry, result and heartbeat settings are
    touched. What the user has set stays. A second call does nothing.

    Args:
        home: the working directory's `.memmc`; Prefect's state goes to `home`/prefect.
    """
    wanted = dict(_ALWAYS)
    embedded = not os.environ.get("PREFECT_API_URL")
    if embedded:
        wanted |= _EMBEDDED | {"PREFECT_HOME": str(home.absolute() / "prefect")}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    if embedded:
        prefect_home = Path(os.environ["PREFECT_HOME"])
        prefect_home.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = LocalServer(prefect_home)
        _started.append(server)
        missing |= {"PREFECT_API_URL": server.url, "PREFECT_API_AUTH_STRING": server.auth}
        os.environ.update(missing)
    if missing and "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context
        from prefect.logging.configuration import setup_logging

        refresh_global_settings_context()
        setup_logging()


def await_server(timeout_s: float = 180.0) -> None:
    """Wait until the local server answers; a server of the user's own is not waited for.

    Raises:
        StorageError: it ended, or did not answer in time.
    """
    if _started:
        _started[-1].wait(timeout_s)
