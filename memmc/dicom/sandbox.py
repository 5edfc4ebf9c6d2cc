"""Conversion in a process of its own, because a decoder can crash, hang or fill the memory.

::

    Sandbox (caller) --request--> worker <--fork-- keeper <--Popen-- Sandbox
            ^-- attributes, result --'                '-- "worker died" --> Sandbox

The keeper imports everything once, applies the limits and forks a worker, which
answers objects until it dies, has grown or has done its share; the keeper then forks the
next in milliseconds. A hang costs keeper and worker. What kills its process, hangs
or fills the memory is tried once more, in a fresh worker. The object lies in memory
that both sides map. The answer is read as data: JSON of known keys and patterns,
and raw pixels, never unpickled; what does not fit counts as a crash. The
identity key travels through that memory, never in the arguments or the
environment, and the decoders' output goes to /dev/null. The other side is
`memmc.dicom.worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select as polling
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar

from memmc.dicom.convert import MAX_STORED_BYTES, Converted, ConvertPolicy, rejected
from memmc.dicom.deidentify import ATTRIBUTES, NUMBERS, PATTERNS, Value
from memmc.dicom.reasons import OVERLOADED, REASONS, outcome_of
from memmc.dicom.vault import MAX_SEALED_BYTES
from memmc.dicom.worker import ANSWER, DIED, HEADER, READY, REQUEST, RESULT
from memmc.errors import MemmcError

_START_TIMEOUT_S = 120.0
_PIPE_BYTES = 1 << 20
_KEPT_BYTES = 64 << 20  # shared memory that is kept from object to object
_MAX_JSON_BYTES = 1 << 16


class Sandbox:
    """Converts objects in a child process that may die.

    Safe to call from several threads; calls take turns. Use as a context
    manager or call `close`.

    Args:
        policy: as for `memmc.dicom.convert.convert`.
    """

    child_module: ClassVar[str] = "memmc.dicom.worker"

    def __init__(self, policy: ConvertPolicy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._keeper: _Keeper | None = None
        self._number = 0

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; a later `convert` starts another."""
        with self._lock:
            self._stop()

    def convert(self, data: bytes | bytearray | memoryview) -> Converted:
        """Convert one object; never raises for what the object holds, and returns within twice the time limit.

        Raises:
            MemmcError: the child process cannot be started at all.
        """
        if len(data) > self._policy.ingest.max_file_bytes:
            return rejected("FILE_TOO_LARGE")
        with self._lock:
            answer = self._attempt(data)
            if isinstance(answer, _Lost) or answer.reason in OVERLOADED:
                answer = self._attempt(data)
            return answer if isinstance(answer, Converted) else rejected(answer.reason, answer.attributes)

    def _attempt(self, data: bytes | bytearray | memoryview) -> Converted | _Lost:
        if self._keeper is None or not self._keeper.alive():
            self._stop()
            self._keeper = _Keeper(self._policy, self.child_module)
        self._number += 1
        try:
            answer = self._keeper.ask(self._number, data, self._policy)
        except BaseException:  # an interrupt in mid-conversation: the pipes hold half a message
            self._stop()
            raise
        if isinstance(answer, _Lost) and not answer.keeper_lives:
            self._stop()
        return answer

    def _stop(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None


class _Lost:
    """An object whose process did not answer.

    Attributes:
        reason: code, as `attributes` for the row.
        keeper_lives: the keeper has forked another worker.
    """

    def __init__(
        self,
        what: str,
        attributes: Mapping[str, Value] | None,
        died_of: int | None,
        *,
        keeper_lives: bool = False,
    ) -> None:
        decoding = attributes is not None
        self.attributes = attributes
        self.keeper_lives = keeper_lives
        if what == "TIMEOUT" or died_of == signal.SIGXCPU:
            self.reason = "PIX_DECODER_TIMEOUT" if decoding else "PARSE_TIMEOUT"
        elif died_of == signal.SIGKILL:  # the kernel's out-of-memory killer
            self.reason = "PIX_DECODER_OOM" if decoding else "PARSE_MEMORY"
        else:
            self.reason = "PIX_DECODER_CRASH" if decoding else "PARSE_CRASH"


class _ClosedError(Exception):
    """The other side is gone, or talks nonsense."""


class _OverdueError(Exception):
    """The deadline passed."""


class _Keeper:
    """The caller's end of the child process."""

    def __init__(self, policy: ConvertPolicy, module: str) -> None:
        self._shared = _shared_memory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(self._shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_child_environment(),
            cwd="/",
            start_new_session=True,
            pass_fds=(self._shared,),
            bufsize=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._input, self._output):
            os.set_blocking(descriptor, False)
        self._deadline = time.monotonic() + _START_TIMEOUT_S
        self._received = bytearray()
        message = _policy_json(policy)
        try:
            self._share(message)
            self._send(REQUEST.pack(0, len(message)))
            ready = self._receive()[0] == READY
            os.ftruncate(self._shared, 0)  # the key does not stay there
        except (_ClosedError, _OverdueError):
            ready = False
        if not ready:
            self.stop()
            raise MemmcError("the decoding process does not start; run 'memmc doctor' in this environment")

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(OSError):
            os.close(self._shared)
        self._process.wait()

    def ask(self, number: int, data: bytes | bytearray | memoryview, policy: ConvertPolicy) -> Converted | _Lost:
        """Send one object and wait for its answer."""
        self._deadline = time.monotonic() + policy.ingest.timeout_s
        attributes: Mapping[str, Value] | None = None
        try:
            self._share(data)
            self._send(REQUEST.pack(number, len(data)))
            while True:
                kind, about, head, pixels = self._receive()
                if kind == DIED:
                    return _Lost("CRASH", attributes, int(head["signal"]), keeper_lives=True)
                if about != number:  # of an object given up before
                    continue
                if kind == HEADER:
                    attributes = _checked_attributes(head.get("attributes"))
                elif kind == RESULT:
                    return _checked_result(head, pixels, policy)
                else:
                    raise _ClosedError
        except _OverdueError:
            return _Lost("TIMEOUT", attributes, None)
        except (_ClosedError, KeyError, TypeError, ValueError):
            return _Lost("CRASH", attributes, None)

    def _share(self, data: bytes | bytearray | memoryview) -> None:
        """Put an object where the child reads it. Pages stay from object to object; a large object's are given back."""
        size = os.fstat(self._shared).st_size
        if size > max(_KEPT_BYTES, len(data)):
            os.ftruncate(self._shared, 0)
        view, offset = memoryview(data), 0
        while offset < len(view):
            offset += os.pwrite(self._shared, view[offset:], offset)

    def _send(self, request: bytes) -> None:
        view = memoryview(request)
        while view:
            self._wait(self._input, polling.POLLOUT)
            try:
                view = view[os.write(self._input, view) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _ClosedError from None

    def _receive(self) -> tuple[bytes, int, dict[str, Any], bytes]:
        kind, number, json_bytes, pixel_bytes = ANSWER.unpack(self._take(ANSWER.size))
        if json_bytes > _MAX_JSON_BYTES or pixel_bytes > MAX_STORED_BYTES:
            raise _ClosedError
        head = json.loads(self._take(json_bytes))
        if not isinstance(head, dict):
            raise _ClosedError
        return kind, number, head, self._take(pixel_bytes)

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            self._wait(self._output, polling.POLLIN)
            try:
                chunk = os.read(self._output, _PIPE_BYTES)
            except BlockingIOError:
                continue
            if not chunk:
                raise _ClosedError
            self._received += chunk
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _wait(self, descriptor: int, event: int) -> None:
        left = self._deadline - time.monotonic()
        poll = polling.poll()
        poll.register(descriptor, event)
        if left <= 0 or not poll.poll(left * 1000):
            raise _OverdueError


def _checked_attributes(found: object) -> dict[str, Value]:
    """Take attributes from the child only as far as they look like attributes.

    Raises:
        ValueError: a name or value that de-identification cannot have made.
    """
    if not isinstance(found, dict) or set(found) != set(ATTRIBUTES):
        raise ValueError("attributes")
    for name, value in found.items():
        if value is None:
            continue
        if name in PATTERNS:
            fits = isinstance(value, str) and PATTERNS[name].fullmatch(value) is not None
        elif name in NUMBERS:
            fits = isinstance(value, (int, NUMBERS[name])) and not isinstance(value, bool) and 0 <= value < 1 << 31
        else:
            fits = isinstance(value, bool)
        if not fits:
            raise ValueError("attributes")
    return found


def _checked_result(head: Mapping[str, Any], pixels: bytes, policy: ConvertPolicy) -> Converted:
    reason = head["reason"]
    attributes = _checked_attributes(head["attributes"])
    if reason is not None:
        if reason not in REASONS or pixels:
            raise ValueError("reason")
        return Converted(outcome_of(reason), reason, attributes, None)
    side, bits = policy.data.image_size, policy.data.bits
    size = tuple(attributes[name] for name in ("height", "width", "channels", "bits"))
    frames = head["frames"]
    if not isinstance(frames, int) or frames < 1 or (frames > 1 and policy.select.frames != "each"):
        raise ValueError("frames")
    if size != (side, side, 1, bits) or len(pixels) != frames * side * side * bits // 8:
        raise ValueError("pixels")
    return Converted("stored", None, attributes, pixels, frames, _checked_seal(head.get("sealed"), policy))


def _checked_seal(found: Any, policy: ConvertPolicy) -> bytes | None:
    """Take a sealed entry where a vault is configured, and only there.

    Raises:
        ValueError: an entry too many or too few, or too large for one.
    """
    sealed = bytes.fromhex(found or "")
    if bool(sealed) != (policy.vault_key is not None) or len(sealed) > MAX_SEALED_BYTES:
        raise ValueError("sealed")
    return sealed or None


def _child_environment() -> dict[str, str]:
    """Pass on what Python needs to start and to find this package, and nothing else: no credentials."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),  # noqa: PTH100
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc: an image's memory is kept for the next,
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),  # not faulted in anew
    }


def _shared_memory() -> int:
    """Return a descriptor of anonymous memory; of an unlinked temporary file where the system has none."""
    if sys.platform == "linux":
        return os.memfd_create("memmc", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _policy_json(policy: ConvertPolicy) -> bytes:
    return json.dumps(
        {
            "data": policy.data.model_dump(mode="json"),
            "select": policy.select.model_dump(mode="json"),
            "ingest": policy.ingest.model_dump(mode="json"),
            "max_date_shift_days": policy.max_date_shift_days,
            "read_text": policy.read_text,
            "key": policy.key.hex(),
            "vault_key": (policy.vault_key or b"").hex(),
            "parent": os.getpid(),
        }
    ).encode()
