"""A Prefect server for one process: on loopback, behind a password of its own, gone when that process is gone.

Prefect can start such a server itself, but the caller then imports the whole
server too (5 s) and waits; this one starts while the caller does something else.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from memmc.errors import StorageError


class LocalServer:
    """Starts the server at once and in the background; stops it when the interpreter exits.

    Attributes:
        url: of its API.
        auth: `user:password` that every request must carry.
    """

    def __init__(self, prefect_home: Path) -> None:
        self.auth = f"memmc:{secrets.token_urlsafe(24)}"
        self._log = prefect_home / "server.log"
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = self._spawn(listener, prefect_home)
        # Registered before prefect is imported, so it runs after prefect has sent its last logs and events.
        atexit.register(self.stop)

    def wait(self, timeout_s: float) -> None:
        """Return when the server answers.

        Raises:
            StorageError: it ended, or did not answer in time.
        """
        end = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < end:
            try:
                # The listening socket exists already: the request waits in its queue until the server is up.
                with urllib.request.urlopen(f"{self.url}/health", timeout=max(1.0, end - time.monotonic())):
                    return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
        state = "ended" if self._process.poll() is not None else f"did not answer within {timeout_s:g} s"
        raise StorageError(f"the local Prefect server {state}; see {self._log}, or run without --flow")

    def stop(self) -> None:
        """End the server; it stores what it has received first."""
        atexit.unregister(self.stop)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _spawn(self, listener: socket.socket, prefect_home: Path) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        environment |= {"PREFECT_HOME": str(prefect_home), "PREFECT_SERVER_API_AUTH_STRING": self.auth}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(listener.fileno())],
                env=environment,
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,  # closed by the kernel when this process dies, however it dies
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must not end it before the run's last state is stored
            )


def serve(descriptor: int) -> None:
    """Serve the API on an inherited listening socket until standard input ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    settings = uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=5)
    uvicorn.Server(settings).run(sockets=[socket.socket(fileno=descriptor)])


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(int(sys.argv[1]))
