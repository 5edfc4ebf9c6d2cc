"""A decoding process that does what the object's first word says; run by the sandbox's tests."""

import os
import resource
import signal
import sys
import time

from memmc.dicom import worker
from memmc.dicom.convert import Converted, convert, rejected
from memmc.dicom.deidentify import ATTRIBUTES


def misbehave(data, policy, before_pixels=lambda attributes: None):
    word = bytes(data[:16]).split(b" ")[0]
    if b"pixels" in bytes(data[:32]):
        before_pixels(convert(bytes(data[32:]), policy).attributes)
    if word == b"abort":
        os.abort()
    if word == b"segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"exit":
        os._exit(7)
    if word == b"hang":
        time.sleep(1000)
    if word == b"memory":
        try:
            bytearray(64 << 30)
        except MemoryError:
            return rejected("PIX_DECODER_OOM")
    if word == b"garbage":
        os.write(channel, b"X" * 4096)
        time.sleep(1000)
    if word == b"leak":
        result = convert(bytes(data[32:]), policy)
        return Converted("stored", None, {**result.attributes, "body_part": "Doe, Jane"}, result.pixels)
    if word == b"grown":
        worker.WORKER_BYTES = 0
    if word == b"print":
        os.write(1, b"SMITH JOHN")
        os.write(2, b"SMITH JOHN")
        return convert(bytes(data[32:]), policy)
    if word == b"environment":
        limits = resource.getrlimit(resource.RLIMIT_AS)[0]
        known = {"height": len(os.environ), "width": os.getpid(), "channels": limits >> 20}
        known["bits"] = sum(name in sys.modules for name in ("torch", "ray", "mlflow"))
        known["rows"] = int(any("SECRET" in name for name in os.environ))
        used = resource.getrusage(resource.RUSAGE_SELF)
        known["columns"] = round(resource.getrlimit(resource.RLIMIT_CPU)[0] - used.ru_utime - used.ru_stime)
        return rejected("FILE_EMPTY", {**dict.fromkeys(ATTRIBUTES), **known})
    return convert(data, policy, before_pixels)


channel = 3
original = worker._keep


def keep(policy, descriptor, shared):
    global channel
    channel = descriptor
    return original(policy, descriptor, shared)


worker.convert = misbehave
worker._keep = keep
raise SystemExit(worker.main())
