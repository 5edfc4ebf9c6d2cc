"""The lake under faults: killed at every system call of a commit, full disk, racing writers, flipped bits.

::

    python infra/benchmarks/crash_matrix.py             # everything, some minutes
    python infra/benchmarks/crash_matrix.py --short     # every part, few points; what the tests run
    python infra/benchmarks/crash_matrix.py --only local full
    python infra/benchmarks/crash_matrix.py --only first erase    # the commit that makes a table, an erasure

Needs strace (Debian: strace). A writer is a forked process that stops itself, is attached to, and goes on; the
N-th call of one kind then kills it, or fails from there on with "no space". Afterwards a reader must see the old
rows or all of the new, every byte verified, and the same commit run again must leave exactly both.

The S3 parts run against a server of their own over HTTP (moto), or the one of --server. `lake_stress.py` beside this
kills after every request, and races vacuums.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from memmc.errors import IntegrityError, MemmcError, StorageError
from memmc.lake.erasure import erase_rows, find_subject, purge
from memmc.lake.files import write_rows
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake

ROWS = 6
PAGE_BYTES = 4096
LOCAL_CALLS = ("openat", "write", "fsync", "rename", "linkat", "unlink", "mkdir", "close", "lseek", "read", "statx")
S3_CALLS = ("connect", "sendto", "recvfrom", "writev", "sendmsg", "socket", "read", "close", "openat", "epoll_wait")
S3_STRIDES = {"read": 61, "close": 61, "openat": 61}  # some 1,400 each, nearly all on files of the client's own library
FULL_CALLS = ("fsync", "mkdir", "linkat", "rename")  # not write, which also wakes the threads of a process
NEEDED = {"local": 100, "first": 100, "erase": 100, "s3": 100, "full": 20}
_ATTACH_S, _POINT_S = 20.0, 120.0


def rows(start: int) -> pa.Table:
    stored = [
        {
            "cohort": "c",
            "object_key": f"{number:064x}",
            "source_ref": "r",
            "outcome": "stored",
            "split": ("train", "calibrate", "test")[number % 3],
            "content_key": f"{number:064x}",
            "size_bytes": 1,
            "patient_key": f"{number % 2:064x}",
            "sop_instance_uid": f"2.25.{number}",
            "label": "normal",
            "pixels": np.full((16, 16), number, np.uint16).tobytes(),
            "height": 16,
            "width": 16,
            "channels": 1,
            "bits": 16,
            "ingest_run": "r",
            "ingested_at": datetime(2026, 1, 1, tzinfo=UTC),
        }
        for number in range(start, start + ROWS)
    ]
    return pa.Table.from_pylist(stored)


def write(uri: str, start: int, run: str) -> None:
    lake = Lake(uri)
    lake.commit("instances", write_rows(lake.storage, "instances", rows(start)), run)


def erase(uri: str) -> None:
    """Take the odd rows out, files included, as `memmc erase` does; each of its runs has a name of its own."""
    lake = Lake(uri)
    subject = find_subject(lake, "patient_key", f"{1:064x}", None)
    _, removed = erase_rows(lake, "instances", subject, uuid.uuid4().hex, str)
    purge(lake, "instances", subject, removed, 24)


def read(uri: str) -> list[int]:
    """Return the numbers of the stored rows, each checked against its pixels; none where there is no table yet."""
    if not Lake(uri).exists("instances"):
        return []
    table = Lake(uri).read("instances", ["object_key", "pixels"], filter={"outcome": "stored"}).to_pylist()
    numbers = [int(row["object_key"], 16) for row in table]
    for number, row in zip(numbers, table, strict=True):
        assert row["pixels"] == np.full((16, 16), number, np.uint16).tobytes()
    return sorted(numbers)


def fork(work: Callable[[], object], *, stopped: bool = False) -> int:
    """Run `work` in a child; it ends with status 0, 3 for one of our errors, 1 for any other."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        work()
        status = 0
    except MemmcError as error:
        status = 3 if isinstance(error, StorageError) else 4
    except BaseException as error:  # noqa: BLE001 - the child says how it ended by its status alone
        print(f"{type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """Return a child's exit status, or minus its signal; one that hangs is killed and counts as 99."""
    deadline = time.monotonic() + _POINT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


def strike(work: Callable[[], object], call: str, effect: str) -> tuple[int, bool]:
    """Run `work` with one kind of system call tampered with; return its status and whether the tampering happened."""
    pid = fork(work, stopped=True)
    os.waitpid(pid, os.WUNTRACED)
    with tempfile.NamedTemporaryFile("r") as log:
        command = ["strace", "-f", "-qq", "-o", log.name, "-p", str(pid), "-e", f"trace={call}"]
        tracer = subprocess.Popen([*command, "-e", f"inject={call}:{effect}"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + _ATTACH_S
        status = Path(f"/proc/{pid}/status")
        while "TracerPid:\t0\n" in status.read_text() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGCONT)
        ended = wait(pid)
        tracer.wait(_ATTACH_S)
        return ended, ended == -signal.SIGKILL or "(INJECTED)" in log.read()


def forked(work: Callable[[], object]) -> int:
    return wait(fork(work))


def see(uri: str, allowed: list[list[int]]) -> None:
    found = read(uri)
    assert found in allowed, f"{len(found)} rows"


@dataclass(frozen=True)
class Stress:
    """What is struck: a step, begun at a lake that holds some rows, that leaves others."""

    work: Callable[[str], None]
    old: list[int]
    new: list[int]


COMMIT = Stress(lambda uri: write(uri, ROWS, "second"), list(range(ROWS)), list(range(2 * ROWS)))
FIRST = Stress(lambda uri: write(uri, 0, "first"), [], list(range(ROWS)))
ERASE = Stress(erase, list(range(ROWS)), list(range(0, ROWS, 2)))


def judge(uri: str, work: Callable[[], object], stress: Stress) -> Counter[str]:
    """Read, do the step again and read again, in one child; return what went wrong first, which spoils the rest."""

    def steps() -> None:
        for status, step in (
            (10, functools.partial(see, uri, [stress.old, stress.new])),
            (11, work),
            (12, functools.partial(see, uri, [stress.new])),
        ):
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - the child says which step failed by its status alone
                print(f"{type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
                os._exit(status)

    ended = forked(steps)
    return Counter({_JUDGED.get(ended, "hang or foreign error"): 1} if ended else {})


_JUDGED = {10: "partial read", 11: "re-run failed", 12: "not converged"}


def copy_objects(source: str, target: str) -> None:
    """Copy all objects under one S3 URI to under another."""
    from memmc import s3

    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    goal = target.removeprefix("s3://").partition("/")[2]
    for name in Storage.open(source).list():
        origin = {"Bucket": bucket, "Key": f"{prefix}/{name}"}
        s3.client().copy_object(Bucket=bucket, Key=f"{goal}/{name}", CopySource=origin)


def matrix(
    uri: str, base: Path | None, calls: tuple[str, ...], effect: str, limit: int | None, stress: Stress = COMMIT
) -> tuple[int, Counter]:
    """Strike at the 1st, 2nd, ... call of every kind until a run ends untouched; on S3, at some of `S3_STRIDES`.

    Returns:
        The number of points at which the writer was struck, and what went wrong by kind.
    """
    points, wrong = 0, Counter[str]()
    for call in calls:
        number, before, stride = 1, points, 1 if base is not None else S3_STRIDES.get(call, 1)
        while limit is None or number <= limit:
            place = f"{uri}/{call}{number}"
            work = functools.partial(stress.work, place)
            if base is not None and stress.old:
                shutil.copytree(base, place)
            elif stress.old:
                copy_objects(f"{uri}/base", place)
            ended, struck = strike(work, call, effect.format(number=number))
            wrong["hang or foreign error"] += ended not in (0, 3, -signal.SIGKILL)
            wrong += judge(place, work, stress)
            if base is not None:
                shutil.rmtree(place)
            if not struck:
                break
            points += 1
            number += stride
        print(f"  {call}: {points - before} points, {dict(+wrong) or 'nothing wrong'}", flush=True)
    return points, +wrong


def full_disk(disk: Path, base: Path, sizes: int) -> tuple[int, Counter]:
    """Commit on a file system of 1, 2, ... free pages, give it more, commit again; as `matrix`."""
    points, wrong = 0, Counter[str]()
    disk.mkdir()
    place = str(disk / "lake")
    for free in range(sizes):
        tmpfs = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
        if subprocess.run(tmpfs, capture_output=True, check=False).returncode:
            print("  full disk: skipped, no file system may be mounted here")
            break
        try:
            shutil.copytree(base, place)
            used = shutil.disk_usage(disk).used
            _resize(disk, used + (1 + free) * PAGE_BYTES)
            ended = forked(functools.partial(write, place, ROWS, "second"))
            _resize(disk, 64 << 20)
            wrong["hang or foreign error"] += ended not in (0, 3)
            wrong += judge(place, functools.partial(write, place, ROWS, "second"), COMMIT)
            points += ended == 3
        finally:
            subprocess.run(["umount", str(disk)], check=False)
    print(f"  full disk: {points} points", flush=True)
    return points, +wrong


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, capture_output=True)


def race(uri: str, writers: int, commits: int) -> int:
    """Return how many of writers x commits are in the table after all have committed at once."""
    if forked(functools.partial(write, uri, 0, "first")):
        raise SystemExit("the first commit failed")
    pids = [
        fork(
            lambda writer=writer: [
                write(uri, ROWS * (1 + writer * commits + number), f"{writer}-{number}") for number in range(commits)
            ]
        )
        for writer in range(writers)
    ]
    statuses = [wait(pid) for pid in pids]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(read, (uri,))
    present = sum(
        set(range(ROWS * (1 + index), ROWS * (2 + index))) <= set(found) for index in range(writers * commits)
    )
    return present if len(found) == len(set(found)) and not any(statuses) else -present


def flips(root: Path, count: int) -> int:
    """Flip one random bit, read as training does, flip it back; return how often the reader refused."""
    from memmc.lake.shards import iter_shard

    uri = str(root / "flips")
    write(uri, 0, "first")
    lake, rng, found = Lake(uri), random.Random(7), 0
    files = lake.files("instances")
    for _ in range(count):
        file = rng.choice(files)
        path = Path(uri) / file.path
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data) * 8)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            list(iter_shard(lake.storage, file.path, ["object_key", "pixels"]))
        except IntegrityError:
            found += 1
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
    assert read(uri) == list(range(ROWS))  # whole again: the reader refuses nothing else
    return found


@contextmanager
def s3_server(address: str | None = None) -> Iterator[str]:
    """Point the AWS_* environment at an S3 server with one new bucket; yield the bucket's URI.

    Args:
        address: of a server that runs, with its keys in AWS_*; one is started when absent.
    """
    bucket = f"lake-{os.getpid()}"
    if address is not None:
        os.environ["AWS_ENDPOINT_URL"] = address
        if forked(functools.partial(_make_bucket, bucket)):
            raise SystemExit("the S3 server does not make a bucket")
        yield f"s3://{bucket}"
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from moto.server import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_EC2_METADATA_DISABLED="true",
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        if forked(functools.partial(_make_bucket, bucket)):
            raise SystemExit("the S3 server did not start")
        yield f"s3://{bucket}"
    finally:
        server.terminate()
        server.wait(20)


def _make_bucket(name: str) -> None:
    from memmc import s3

    s3.client().create_bucket(Bucket=name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few points of every part")
    parts = ("local", "first", "erase", "full", "s3", "race", "flips")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--server", metavar="URL", help="an S3 server that runs, for the S3 parts")
    parser.add_argument("--calls", nargs="+", metavar="CALL", help="only these system calls of the parts local and s3")
    args = parser.parse_args()
    if not shutil.which("strace"):
        raise SystemExit("strace is not installed; apt-get install strace")
    for module in (
        "deltalake.transaction",
        "pandas",
        "pyarrow.parquet",
        "pyarrow.dataset",
        "pyarrow.compute",
        "botocore.session",
    ):
        importlib.import_module(module)  # once here, not in every child
    limit, passed = (2 if args.short else None), True

    def verdict(name: str, points: int, wrong: Counter, needed: int) -> None:
        nonlocal passed
        good = not wrong and (args.short or bool(args.calls) or points >= needed)
        passed &= good
        print(f"{name}: {points} points, {dict(wrong) or 'nothing wrong'} {'PASS' if good else 'FAIL'}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = root / "base"
        forked(functools.partial(write, str(base), 0, "first"))
        if "local" in args.only:
            found = matrix(str(root), base, args.calls or LOCAL_CALLS, "signal=KILL:when={number}", limit)
            verdict("killed, local", *found, NEEDED["local"])
        for part, stress in (("first", FIRST), ("erase", ERASE)):
            if part in args.only:
                few = limit and 1
                found = matrix(str(root), base, LOCAL_CALLS, "signal=KILL:when={number}", few, stress)
                verdict(f"killed, local, {part}", *found, NEEDED[part])
        if "full" in args.only:
            points, wrong = matrix(str(root), base, FULL_CALLS, "error=ENOSPC:when={number}+", limit or 12)
            filled = full_disk(root / "disk", base, 4 if args.short else 40)
            verdict("disk full, local", points + filled[0], wrong + filled[1], NEEDED["full"])
        if "race" in args.only:
            writers, commits = (4, 3) if args.short else (8, 50)
            present = race(str(root / "race"), writers, commits)
            passed &= present == writers * commits
            print(f"race: {present} of {writers * commits} commits present", flush=True)
        if "flips" in args.only:
            count = 60 if args.short else 900
            with multiprocessing.get_context("fork").Pool(1) as pool:
                found_flips = pool.apply(flips, (root, count))
            passed &= found_flips == count
            print(f"flips: {found_flips} of {count} flipped bits refused", flush=True)
        if "s3" in args.only:
            with s3_server(args.server) as uri:
                if forked(functools.partial(write, f"{uri}/base", 0, "first")):
                    raise SystemExit("the first commit to the S3 server failed")
                found = matrix(uri, None, args.calls or S3_CALLS, "signal=KILL:when={number}", limit)
                verdict("killed, S3", *found, NEEDED["s3"])
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
