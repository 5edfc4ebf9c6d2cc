"""Training that is killed three times, once with its driver, against the same training left alone.

Both runs end after the same number of optimiser steps; the figures are the final loss (mean over the last 32 steps) and
the steps. Kills come at random moments after a checkpoint: a worker, a worker, then the driver with its whole cluster.

::

    python infra/benchmarks/train_kills.py --lake LAKE --cohort cxr --steps 400
    python infra/benchmarks/train_kills.py            # generates a small hospital first
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ALLOWED = 0.01


def command(lake: Path, cohort: str, steps: int, seed: int) -> list[str]:
    """The verb, in a process of its own."""
    settings = [f"train.max_steps={steps}", "train.max_minutes=60", "train.checkpoint_seconds=4", f"train.seed={seed}"]
    # A small lake has few normals to calibrate on, which is not what is measured here.
    settings += ["split.train=0.5", "split.calibrate=0.3", "split.test=0.2"]
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "memmc.cli.main", "train", "--cohort", cohort, "--lake", str(lake), "--json", *sets]


def undisturbed(call: list[str], cwd: Path) -> dict:
    """Train to the end."""
    done = subprocess.run(call, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def kill_after_checkpoint(lake: Path, driver: subprocess.Popen, seen: set[str], whole: bool) -> None:
    """Wait for a checkpoint that was not there before and a random moment, then kill."""
    while True:
        snapshots = lake.glob("training/*/checkpoint_manager_snapshot.json")
        named = {name for path in snapshots for name in path.read_text().split('"') if name.startswith("checkpoint_")}
        if named - seen:
            seen |= named
            break
        if driver.poll() is not None:
            raise SystemExit("training ended before it could be killed; raise --steps")
        time.sleep(0.05)
    time.sleep(random.uniform(0.5, 4.0))
    children = psutil.Process(driver.pid).children(recursive=True)
    workers = [process for process in children if "RayTrainWorker" in " ".join(process.cmdline())]
    victims = [*children, psutil.Process(driver.pid)] if whole else [random.choice(workers)]
    for process in victims:
        process.kill()
    print(f"killed {'driver and cluster' if whole else 'a worker'} after {len(seen)} checkpoints", flush=True)


def disturbed(call: list[str], cwd: Path, lake: Path) -> dict:
    """Train with three kills, the last of the driver; a second call goes on."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": cwd}
    driver = subprocess.Popen(call, **quiet)
    known = {name for path in lake.glob("training/*/checkpoint_manager_snapshot.json")
             for name in path.read_text().split('"') if name.startswith("checkpoint_")}  # fmt: skip
    for whole in (False, False, True):
        kill_after_checkpoint(lake, driver, known, whole)
    driver.wait()
    return undisturbed(call, cwd)


def main() -> int:
    """Print both runs and whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", type=Path)
    parser.add_argument("--cohort", default="cxr")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        lake = options.lake.absolute() if options.lake else small_lake(Path(folder), options.cohort)
        call = command(lake, options.cohort, options.steps, options.seed)
        broken = disturbed(call, Path(folder), lake)
        whole = undisturbed(call, Path(folder))
    difference = abs(broken["loss"] / whole["loss"] - 1.0)
    for name, run in (("left alone", whole), ("killed three times", broken)):
        print(
            f"{name}: {run['steps']} steps, loss {run['loss']:.6f}, loop {run['train_seconds']} s, {run['seconds']} s"
        )
    fine = difference <= ALLOWED and whole["steps"] == broken["steps"] == options.steps
    print(f"losses differ by {difference:.4%} (at most {ALLOWED:.0%}): {'PASS' if fine else 'FAIL'}")
    return 0 if fine else 1


def small_lake(folder: Path, cohort: str) -> Path:
    """Generate a hospital of 150 normals and ingest it."""
    from memmc.phantom.hospital import write_hospital

    made = write_hospital(folder / "hospital", num_normal=150, num_abnormal=0, num_broken=0, seed=5, workers=2)
    call = [sys.executable, "-m", "memmc.cli.main", "ingest", str(made.dicom_dir), "--cohort", cohort, "--label"]
    call += ["normal", "--set", "split.train=0.5", "--set", "split.calibrate=0.3", "--set", "split.test=0.2"]
    subprocess.run([*call, "--lake", str(folder / "lake")], check=True, cwd=folder, capture_output=True)
    return folder / "lake"


if __name__ == "__main__":
    sys.exit(main())
