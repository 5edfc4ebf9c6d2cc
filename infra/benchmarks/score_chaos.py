"""Several `memmc score` at once, killed at random: every instance must end with one score, the right one.

    python infra/benchmarks/score_chaos.py --lake LAKE --cohort C [--runs 3] [--kills 50]

The lake is copied first and stays as it is; the working directory holds the model (`.memmc`). An undisturbed run on
one copy gives the reference and the time a run takes. On another copy `--runs` processes score at once, on one Ray
cluster; each kill hits, at a random moment, one of them (SIGKILL), or one of the cluster's workers, and the process is
started again, until the kills are used up. Then the runs may end. Exit status 1 when a figure is not as it should be.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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


def disturb(runners: list[Runner], kills: int, span: float, rng: random.Random) -> dict[str, int]:
    """Keep the runners going and kill one of them, or a worker, after random waits."""
    count = {"processes": 0, "workers": 0, "finished": 0}
    while count["processes"] + count["workers"] < kills:
        for runner in runners:
            if not runner.running():
                count["finished"] += runner.process is not None and runner.process.exitcode == 0
                runner.start()
        time.sleep(rng.uniform(0.0, 0.75 * span))  # some live to commit
        if rng.random() < WORKER_SHARE and kill_worker(rng):
            count["workers"] += 1
            continue
        running = [runner for runner in runners if runner.running()]
        if running:
            rng.choice(running).kill()
            count["processes"] += 1
        print(f"kills: {count}", file=sys.stderr, flush=True)
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
        lakes = {name: Path(folder, name) for name in ("reference", "disturbed")}
        for copy in lakes.values():
            shutil.copytree(args.lake, copy, ignore=shutil.ignore_patterns("scores", "training", "reports"))
        with ray_cluster(load_config(env=os.environ), Path.cwd() / ".memmc", training=False) as ray:
            address = ray.get_runtime_context().gcs_address
            started = time.monotonic()
            alone = Runner((lakes["reference"], args.cohort, args.model, address))
            alone.start()
            if not alone.end():
                return 1
            span = time.monotonic() - started
            runners = [Runner((lakes["disturbed"], args.cohort, args.model, address)) for _ in range(args.runs)]
            kills = disturb(runners, args.kills, span, rng)
            partly = len(scores_of(Lake(lakes["disturbed"]), args.cohort))
            failed = finish(runners)
        reference = dict(scores_of(Lake(lakes["reference"]), args.cohort))
        where = {"cohort": args.cohort, "outcome": "stored"}
        stored = Lake(lakes["reference"]).read("instances", ["sop_instance_uid"], filter=where)
        instances = set(stored["sop_instance_uid"].to_pylist()) - set(
            kept_from_scores(Lake(lakes["reference"]), args.cohort)
        )
        rows = scores_of(Lake(lakes["disturbed"]), args.cohort)
        commits = Lake(lakes["disturbed"]).version("scores")
    known = [(uid, value) for uid, value in rows if uid in reference]
    differ = [abs(value - reference[uid]) > TOLERANCE * max(1.0, abs(reference[uid])) for uid, value in known]
    result = {
        "instances": len(instances),
        "rows": len(rows),
        "duplicates": len(rows) - len({uid for uid, _ in rows}),
        "differing": int(np.sum(differ)),
        "failed_at_the_end": failed,
        "kills": kills,
        "rows_before_the_last_runs": partly,
        "commits": commits,
        "run_alone_s": round(span, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))
    good = result["rows"] == result["instances"] == len(known) and not (result["duplicates"] or any(differ) or failed)
    print("each instance once, each with the reference's score: " + ("PASS" if good else "FAIL"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
