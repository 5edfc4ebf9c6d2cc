"""The lake under two more stresses: killed at every request to S3, and vacuumed without pause while it is written.

::

    python infra/benchmarks/lake_stress.py             # everything, some minutes
    python infra/benchmarks/lake_stress.py --short     # what the tests run
    python infra/benchmarks/lake_stress.py --only requests --server http://127.0.0.1:7480

Requests pass through a proxy (`s3_fault_proxy`) that counts them and kills the writer on the N-th: once before the
server has it, once when the server has done it and the answer is on its way.

The vacuum's writers write shards that look two days old, under a lease that began before them, beside shards of dead
writers that are older still. Every vacuum may take the dead ones and none of the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from crash_matrix import ROWS, fork, forked, read, rows, s3_server, see, wait, write
from s3_fault_proxy import FaultProxy, fault_proxy

from memmc.lake.files import write_rows
from memmc.lake.tables import Lake
from memmc.lake.vacuum import LEASES, lease, vacuum
from memmc.lake.verify import verify

HOUR_S = 3600


def requests(uri: str, proxy: FaultProxy, limit: int | None) -> tuple[int, Counter[str]]:
    """Kill a commit at its 1st, 2nd, ... request, before and after the server has it, until one ends untouched."""
    old, both = list(range(ROWS)), list(range(2 * ROWS))
    points, wrong = 0, Counter[str]()
    for fault in ("kill", "kill after"):
        number = 0
        while limit is None or number < limit:
            number += 1
            place = f"{uri}/{fault.replace(' ', '-')}-{number}"
            if forked(functools.partial(write, place, 0, "first")):
                raise SystemExit(f"the first commit to {place} failed")
            victim = fork(functools.partial(write, place, ROWS, "second"), stopped=True)
            os.waitpid(victim, os.WUNTRACED)
            proxy.plan(fault, at=number, victim=victim)
            os.kill(victim, signal.SIGCONT)
            ended = wait(victim)
            proxy.plan()
            wrong["hang or foreign error"] += ended not in (0, -9)
            wrong["partial read"] += forked(functools.partial(see, place, [old, both])) != 0
            wrong["re-run failed"] += forked(functools.partial(write, place, ROWS, "second")) != 0
            wrong["not converged"] += forked(functools.partial(see, place, [both])) != 0
            wrong["damaged"] += forked(functools.partial(check, place)) != 0
            if ended == 0:
                break
            points += 1
        print(f"  {fault}: {number} requests", flush=True)
    return points, +wrong


def check(uri: str) -> None:
    """Verify the lake whole, sweep, and look for what is left of unfinished uploads."""
    lake = Lake(uri)
    vacuum(lake, 0)
    assert not verify(lake).damages
    assert not vacuum(lake, 0, dry_run=True).uploads


def vacuum_race(uri: str, writers: int, commits: int, *, leased: bool) -> tuple[int, int, int]:
    """Return how many commits are present, how many live shards are missing, and how many dead ones were swept."""
    if forked(functools.partial(write, uri, 0, "first")):
        raise SystemExit("the first commit failed")

    def work(writer: int) -> None:
        lake, run = Lake(uri), f"writer-{writer}"
        with lease(lake, run) if leased else nullcontext():
            if leased:
                held = {"since": time.time() - 50 * HOUR_S, "seen": time.time()}
                lake.storage.write(f"{LEASES}/{run}.json", json.dumps(held).encode())
            for number in range(commits):
                start = ROWS * (1 + writer * commits + number)
                _aged(uri, write_rows(lake.storage, "instances", rows(start)), 80)  # of a writer that died
                files = _aged(uri, write_rows(lake.storage, "instances", rows(start)), 48)
                time.sleep(0.02)
                lake.commit("instances", files, f"{run}-{number}")

    pids = [fork(functools.partial(work, writer)) for writer in range(writers)]
    sweeper = fork(functools.partial(_sweep, uri))
    for pid in pids:
        wait(pid)
    Path(uri, "stop").touch()
    wait(sweeper)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        missing, found = pool.apply(_judge, (uri,))
    starts = (ROWS * (1 + index) for index in range(writers * commits))
    present = sum(set(range(start, start + ROWS)) <= found for start in starts)
    return present, missing, int(Path(uri, "swept").read_text())


def _judge(uri: str) -> tuple[int, set[int]]:
    missing = sum(damage.problem == "absent" for damage in verify(Lake(uri)).damages)
    return missing, set() if missing else set(read(uri))


def _aged(uri: str, files: list, hours: float) -> list:
    then = time.time() - hours * HOUR_S
    for file in files:
        os.utime(Path(uri) / file.path, (then, then))
    return files


def _sweep(uri: str) -> None:
    lake, swept = Lake(uri), 0
    while not Path(uri, "stop").exists():
        swept += len(vacuum(lake, 24).shards)
    Path(uri, "swept").write_text(str(swept + len(vacuum(lake, 24).shards)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few points of every part")
    parser.add_argument("--only", nargs="+", choices=("requests", "vacuum"), default=("requests", "vacuum"))
    parser.add_argument("--server", metavar="URL", help="an S3 server that runs; its keys are in AWS_*")
    args = parser.parse_args()
    passed = True
    if "requests" in args.only:
        with s3_server(args.server) as uri, fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.uri
            points, wrong = requests(uri, proxy, 3 if args.short else None)
        passed &= not wrong
        print(f"killed at a request, S3: {points} points, {dict(wrong) or 'nothing wrong'}", flush=True)
    if "vacuum" in args.only:
        writers, commits = (3, 4) if args.short else (8, 50)
        with tempfile.TemporaryDirectory() as folder:
            present, missing, swept = vacuum_race(f"{folder}/leased", writers, commits, leased=True)
            control = vacuum_race(f"{folder}/control", writers, commits, leased=False)[0]
        passed &= present == writers * commits and not missing and swept > 0 and control < present
        found = f"{present} of {writers * commits} commits present, {missing} live shards missing, {swept} dead swept"
        print(f"vacuum: {found}; without leases {control} present", flush=True)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
