"""Several `memmc score` at once, killed at random: every instance must end with one score, the right one.

    python infra/benchmarks/score_chaos.py --lake LAKE --cohort C [--runs 3] [--kills 50]

The lake is copied first and stays as it is; the working directory holds the model (`.memmc`). An undisturbed run on
one copy gives the reference and the time a run takes. On another copy `--runs` processes score at once, on one Ray
cluster; each kill hits, at a random moment, one of them (SIGKILL), or one of the cluster's workers, and the process is
started again, until every instance has its score. Then the runs may end, the copy is checked, and a new round begins
on a fresh copy, until the kills are used up. Exit status 1 when a figure is not as it should be.
Processes are forked from one that has imported everything, so that kills strike scoring and not imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from memmc.config import load_config
from memmc.lake.tables import Lake
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.quality import kept_from_scores
from memmc.pipeline.score import score

SETTINGS = ("score.rows_per_shard=16", "score.commit_seconds=0.1", "score.batch_size=8", "score.num_actors=1")
WORKER_SHARE = 0.3  # of the kills
TOLERANCE = 1e-5
_RUN_S = 900.0


@dataclass
class Runner:
    """One scoring process, started anew whenever it was killed."""

    call: tuple[Path, str, str | None, str]
    process: Any = None

    def start(self) -> None:
        self.process = multiprocessing.get_context("forkserver").Process(target=score_once, args=self.call)
        self.process.start()

    def running(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> bool:
        """Wait for the process; return whether it ended well."""
        self.process.join(_RUN_S)
        return self.process.exitcode == 0


def scores_of(lake: Lake, cohort: str) -> list[tuple[str, float]]:
    if not lake.exists("scores"):
        return []
    rows = lake.read("scores", ["sop_instance_uid", "anomaly_score", "not_scored"], filter={"cohort": cohort})
    return [(r["sop_instance_uid"], r["anomaly_score"]) for r in rows.to_pylist() if r["not_scored"] is None]


def score_once(lake: Path, cohort: str, model: str | None, address: str) -> None:
    """Score as the verb does, on a cluster that is there."""
    settings = (*SETTINGS, f"ray.address={address}", f"lake.uri={lake}")
    score(load_config(env=os.environ, overrides=settings), cohort, model)


def kill_worker(rng: random.Random) -> bool:
    """Kill one of the cluster's processes that score; return whether there was one."""
    mine = psutil.Process().children(recursive=True)
    names = ("ray::MapWorker", "ray::MapBatches", "ray::_MapWorker")
    found = [child for child in mine if child.is_running() and any(n in " ".join(_line(child)) for n in names)]
    if not found:
        return False
    rng.choice(found).kill()
    return True


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def disturb(
    runners: list[Runner], kills: int, span: float, rng: random.Random, whole: Callable[[], bool]
) -> Counter[str]:
    """Keep the runners going and kill one of them, or a worker, after random waits, until all is scored."""
    count = Counter[str]()
    while count.total() < kills and not whole():
        for runner in runners:
            if not runner.running():
                runner.start()
        time.sleep(rng.uniform(0.0, 0.75 * span))  # some live to commit
        if rng.random() < WORKER_SHARE and kill_worker(rng):
            count["workers"] += 1
            continue
        running = [runner for runner in runners if runner.running()]
        if running:
            rng.choice(running).kill()
            count["processes"] += 1
    return count


def finish(runners: list[Runner]) -> int:
    """Let every runner end, starting it anew where it failed; return how many failed for good."""
    for runner in runners:
        if not runner.running():
            runner.start()
    return sum(not runner.end() for runner in runners)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path, required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    multiprocessing.set_forkserver_preload(["memmc.pipeline.score", "memmc.scoring.bulk", "ray.data", "mlflow"])
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        reference = copied(args.lake, Path(folder, "reference"))
        with ray_cluster(load_config(env=os.environ), Path.cwd() / ".memmc", training=False) as ray:
            address = ray.get_runtime_context().gcs_address
            started = time.monotonic()
            alone = Runner((reference, args.cohort, args.model, address))
            alone.start()
            if not alone.end():
                return 1
            span = time.monotonic() - started
            expected = expectation(reference, args.cohort)
            rounds: list[dict[str, Any]] = []
            while (left := args.kills - sum(item["kills"] for item in rounds)) > 0:
                copy = copied(args.lake, Path(folder, f"round-{len(rounds)}"))
                runners = [Runner((copy, args.cohort, args.model, address)) for _ in range(args.runs)]
                kills = disturb(
                    runners, left, span, rng, lambda copy=copy: len(scores_of(Lake(copy), args.cohort)) >= len(expected)
                )
                partly, failed = len(scores_of(Lake(copy), args.cohort)), finish(runners)
                found = {
                    "kills": kills.total(),
                    **kills,
                    "rows_before_the_last_runs": partly,
                    "failed_at_the_end": failed,
                }
                rounds.append(found | compared(copy, args.cohort, expected))
                print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
                shutil.rmtree(copy)
    wrong = ("missing", "duplicates", "differing", "failed_at_the_end")
    result = {
        "instances": len(expected),
        "rounds": len(rounds),
        **{name: sum(item.get(name, 0) for item in rounds) for name in ("kills", "processes", "workers", *wrong)},
        "run_alone_s": round(span, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))
    good = not any(result[name] for name in wrong)
    print("each instance once in every round, each with the reference's score: " + ("PASS" if good else "FAIL"))
    return 0 if good else 1


def copied(lake: Path, to: Path) -> Path:
    """Copy a lake without its scores."""
    shutil.copytree(lake, to, ignore=shutil.ignore_patterns("scores", "training", "reports"))
    return to


def expectation(lake: Path, cohort: str) -> dict[str, float]:
    """Return the reference's score of every instance that is to have one.

    Raises:
        SystemExit: the undisturbed run itself is not whole.
    """
    where = {"cohort": cohort, "outcome": "stored"}
    stored = Lake(lake).read("instances", ["sop_instance_uid"], filter=where)["sop_instance_uid"].to_pylist()
    scores = dict(scores_of(Lake(lake), cohort))
    if set(scores) != set(stored) - set(kept_from_scores(Lake(lake), cohort)):
        raise SystemExit("the undisturbed run did not score each instance")
    return scores


def compared(lake: Path, cohort: str, expected: dict[str, float]) -> dict[str, int]:
    """Return what is wrong with a lake's scores, and its number of commits."""
    rows = scores_of(Lake(lake), cohort)
    differ = [abs(value - expected[uid]) > TOLERANCE * max(1.0, abs(expected[uid])) for uid, value in rows]
    found = {uid for uid, _ in rows}
    return {
        "missing": len(expected.keys() - found),
        "duplicates": len(rows) - len(found),
        "differing": sum(differ),
        "commits": Lake(lake).version("scores"),
    }


if __name__ == "__main__":
    sys.exit(main())
