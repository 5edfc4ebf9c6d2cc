"""The decoding process behind `memmc.dicom.sandbox.Sandbox`, which runs it as ``python -m memmc.dicom.worker``.

Requests come on standard input: number and size of the object that lies in the
shared memory. Answers go to what was standard output when the process began.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Generator, Mapping
from typing import Any, NoReturn

from memmc.config import DataConfig, IngestConfig, SelectConfig
from memmc.dicom import text
from memmc.dicom.convert import ConvertPolicy, convert, rejected
from memmc.dicom.decode import preload
from memmc.dicom.deidentify import Value

REQUEST = struct.Struct("<QQ")  # number, bytes
ANSWER = struct.Struct("<cQIQ")  # kind, number, JSON bytes, pixel bytes
READY, HEADER, RESULT, DIED = b"R", b"H", b"C", b"D"
OBJECTS_PER_WORKER = 200  # GDCM leaks (CVE-2026-3650); a fork is cheap
WORKER_BYTES = 3 << 29  # resident at its most, from which on a worker is its last object's
_EXIT_DONE, _EXIT_CLOSED = 0, 3
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def _read_exactly(size: int) -> bytearray:
    """Read from the request pipe.

    Raises:
        EOFError: the caller is gone.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(0, [view])
        if not count:
            raise EOFError
        view = view[count:]
    return data


def _answer(channel: int, kind: bytes, number: int, head: Mapping[str, Any], pixels: bytes = b"") -> None:
    text = json.dumps(head).encode()
    for part in (ANSWER.pack(kind, number, len(text), len(pixels)) + text, pixels):
        view = memoryview(part)
        while view:
            view = view[os.write(channel, view) :]


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_EXIT_CLOSED)


def _limit(memory_bytes: int) -> None:
    """Apply the limits; nothing may be opened beyond the few files a decoder needs, nothing written."""
    for what, amount in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(what)[1]
        soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(what, (soft, soft))


def _limit_processor(timeout_s: float) -> None:
    """Let the next object take half its wall time of this process's processor time; SIGXCPU ends it then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(used.ru_utime + used.ru_stime + max(timeout_s / 2, 1))
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _has_grown() -> bool:
    """Tell whether this process held more memory than a worker is kept with."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) > WORKER_BYTES


@contextlib.contextmanager
def _mapped(shared: int, size: int) -> Generator[memoryview]:
    """Map the shared object for reading."""
    if not size:
        yield memoryview(b"")
        return
    mapping = mmap.mmap(shared, size, prot=mmap.PROT_READ)
    view = memoryview(mapping)
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):  # a decoder's array may still point into it; the next unmaps it
            view.release()
            mapping.close()


def _work(policy: ConvertPolicy, channel: int, shared: int) -> NoReturn:
    """Answer objects until the share is done or the caller is gone."""
    for _ in range(OBJECTS_PER_WORKER):
        try:
            number, size = REQUEST.unpack(_read_exactly(REQUEST.size))
        except EOFError:
            os._exit(_EXIT_CLOSED)

        def tell(attributes: Mapping[str, Value], number: int = number) -> None:
            _answer(channel, HEADER, number, {"attributes": dict(attributes)})

        _limit_processor(policy.ingest.timeout_s)
        try:
            with _mapped(shared, size) as data:
                result = convert(data, policy, tell)
        except (OSError, ValueError):  # no room in the address space
            result = rejected("PARSE_MEMORY")
        head = {"reason": result.reason, "attributes": dict(result.attributes), "frames": result.frames}
        if result.sealed is not None:
            head["sealed"] = result.sealed.hex()
        _answer(channel, RESULT, number, head, result.pixels or b"")
        if result.reason in ("PIX_DECODER_OOM", "PARSE_MEMORY") or _has_grown():
            break  # what could not be allocated, or was large, leaves a fragmented heap behind
    os._exit(_EXIT_DONE)


def _keep(policy: ConvertPolicy, channel: int, shared: int) -> int:
    """Fork workers, one at a time, until the caller is gone."""
    while True:
        keeper = os.getpid()
        worker = os.fork()
        if not worker:
            try:
                _die_with_parent(keeper)
                _work(policy, channel, shared)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if status == _EXIT_CLOSED:
            return 0
        if status != _EXIT_DONE:
            _answer(channel, DIED, 0, {"signal": max(-status, 0)})


def main() -> int:
    """Serve one `Sandbox`, over the standard streams it opened."""
    channel = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # decoders print there
    os.dup2(nothing, 2)
    shared = int(sys.argv[1])
    _, size = REQUEST.unpack(_read_exactly(REQUEST.size))
    fields = json.loads(os.pread(shared, size, 0))
    policy = ConvertPolicy(
        DataConfig.model_validate(fields["data"]),
        SelectConfig.model_validate(fields["select"]),
        IngestConfig.model_validate(fields["ingest"]),
        fields["max_date_shift_days"],
        fields["read_text"],
        bytes.fromhex(fields["key"]),
        bytes.fromhex(fields["vault_key"]) or None,
    )
    _die_with_parent(fields["parent"])
    preload()
    if policy.read_text:
        text.preload()
    _limit(policy.ingest.memory_bytes)
    _answer(channel, READY, 0, {})
    return _keep(policy, channel, shared)


if __name__ == "__main__":
    raise SystemExit(main())
