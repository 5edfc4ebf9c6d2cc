"""`memmc score` from end to end beside the bare forward passes, and its memory at 1,000 and 10,000 images.

    python infra/benchmarks/score_throughput.py --lake LAKE --cohort C [--model M] [--counts 1000,10000] [--actors 2]

The working directory holds the model (`.memmc`), the lake its calibration; the lake is copied first and stays as it is.
The copy gets a cohort of shifted copies of C's images for each count, which a process of its own scores, as the verb
does. `bare` is as many processes with as many threads as that run's actors, which do nothing but the masked forward
passes of the same images, before and after it: the limit of this machine. The rates are taken

* whole: all images by the time from the start of the process to its end;
* scoring: all images by the time from the start of the actors to the last commit;
* steady: the further images of the largest count by the further time they took (scoring), where feeding and writing
  should be hidden and the start of the actors, the same for every count, does not show.

Memory is the peak of resident memory without what is shared between processes (weights and blocks in shared memory),
sampled four times a second: of the process that was started, of the largest of its children, and of all together.
Two counts or more are needed.
Exit status 1 where the steady rate is below 0.85 of bare at the largest count, or memory grows by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from memmc.config import load_config
from memmc.lake.schemas import INSTANCES, SCHEMAS
from memmc.lake.stream import pixels_to_array
from memmc.lake.tables import Lake
from memmc.pipeline.models import open_model
from memmc.pipeline.select import newest_calibration
from memmc.scoring.actor import ScoringJob, model_files
from memmc.scoring.bulk import score_columns

SHARE, GROWTH = 0.85, 1.1
SHARD_ROWS, SAMPLE_S, BARE_IMAGES = 500, 0.25, 400


class Clock:
    """Progress that remembers when what was said."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.scored: list[tuple[float, float]] = []

    def stage(self, name: str, total: float | None = None) -> None:
        self.stages.append((name, time.time()))

    def advance(self, done: float, note: str = "") -> None:
        if self.stages and self.stages[-1][0] == "score":
            self.scored.append((done, time.time()))

    def message(self, text: str) -> None: ...


def child(lake: str, cohort: str, model: str | None, settings: list[str]) -> int:
    """Score as the verb does; print what happened when."""
    from memmc.pipeline.score import score

    clock = Clock()
    result = score(
        load_config(env=os.environ, overrides=[*settings, f"lake.uri={lake}"]), cohort, model, progress=clock
    )
    print(json.dumps({"scored": result.scored, "stages": clock.stages, "advances": clock.scored}))
    return 0


def add_images(lake: Lake, source: pa.Table, cohort: str, count: int) -> None:
    """Append `count` shifted copies of the source's images as a cohort."""
    pixels_BHWC = pixels_to_array(source)
    rng = np.random.default_rng(count)
    columns = [name for name in SCHEMAS[INSTANCES].names if name in source.column_names]
    for first in range(0, count, SHARD_ROWS):
        numbers = np.arange(first, min(first + SHARD_ROWS, count))
        picked = source.take(numbers % source.num_rows)
        shifts = rng.integers(-2, 3, len(numbers))
        moved = [
            np.roll(pixels_BHWC[n % source.num_rows], s, axis=1).tobytes() for n, s in zip(numbers, shifts, strict=True)
        ]
        own = {
            "cohort": pa.array([cohort] * len(numbers)),
            "object_key": pa.array([f"{cohort}-{n:062d}" for n in numbers]),
            "content_key": pa.array([f"{cohort}-{n:062d}" for n in numbers]),
            "sop_instance_uid": pa.array([f"2.25.{count}{n:08d}" for n in numbers]),
            "split": pa.array(["none"] * len(numbers)),
            "pixels": pa.array(moved, pa.binary()),
        }
        lake.append(INSTANCES, pa.table({name: own.get(name, picked[name]) for name in columns}))


def bare_process(job: ScoringJob, rows: pa.Table, threads: int, ready: Any, out: Any) -> None:
    """Do the forward passes of the images; put the seconds."""
    import torch

    from memmc.scoring.actor import Reconstructor
    from memmc.scoring.masks import RunningReconstruction, mask_ids

    actor = Reconstructor(job)
    torch.set_num_threads(threads)
    actor(rows.slice(0, 64))
    model, size = actor.loaded.model, actor.batch_size
    batches = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
    ids = [
        mask_ids("d", part["sop_instance_uid"].to_pylist(), model.num_patches, model.num_keep, job.score.passes)
        for part in batches
    ]
    images = [torch.zeros(part.num_rows, part["channels"][0].as_py(), *_side(part)) for part in batches]
    ready.wait()
    began = time.perf_counter()
    with torch.inference_mode():
        for batch, masks in zip(images, ids, strict=True):
            RunningReconstruction(model, batch).add(masks)
    out.put(time.perf_counter() - began)


def _side(rows: pa.Table) -> tuple[int, int]:
    return rows["height"][0].as_py(), rows["width"][0].as_py()


def bare_rate(job: ScoringJob, rows: pa.Table) -> float:
    """Return images/s of forward passes in as many processes as there are actors."""
    context = multiprocessing.get_context("spawn")
    actors = job.score.num_actors
    threads = max(1, len(os.sched_getaffinity(0)) // actors)
    ready, out = context.Barrier(actors), context.Queue()
    workers = [context.Process(target=bare_process, args=(job, rows, threads, ready, out)) for _ in range(actors)]
    for worker in workers:
        worker.start()
    seconds = [out.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join()
    return actors * rows.num_rows / max(seconds)


def private_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
        return memory.rss - memory.shared
    except psutil.Error:
        return 0


def run(command: list[str]) -> dict[str, Any]:
    """Run a scoring process; return what it said, how long it took and what memory its tree took."""
    began = time.time()
    peaks = {"driver": 0, "child": 0, "all": 0}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        while process.poll() is None:
            try:
                children = psutil.Process(process.pid).children(recursive=True)
                own = private_bytes(psutil.Process(process.pid))
            except psutil.Error:
                break
            theirs = [private_bytes(item) for item in children]
            found = {"driver": own, "child": max(theirs, default=0), "all": own + sum(theirs)}
            peaks = {name: max(value, found[name]) for name, value in peaks.items()}
            time.sleep(SAMPLE_S)
        text, _ = process.communicate()
        errors.seek(0)
        if process.returncode:
            raise SystemExit(errors.read().decode()[-2000:])
    return {**json.loads(text.splitlines()[-1]), "began": began, "ended": time.time(), "peaks": peaks}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--model")
    parser.add_argument("--counts", default="1000,10000")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = [*args.set, f"score.num_actors={args.actors}"]
    if args.child:
        return child(args.lake, args.cohort, args.model, settings)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        root = Path(folder, "lake")
        shutil.copytree(args.lake, root, ignore=shutil.ignore_patterns("scores", "training", "reports"))
        lake = Lake(root)
        config = load_config(env=os.environ, overrides=[*settings, f"lake.uri={root}"])
        model = open_model(config, Path.cwd() / ".memmc", args.model)
        passes = newest_calibration(lake, model)["passes"] or config.score.passes
        columns = list(SCHEMAS[INSTANCES].names)
        source = lake.read(INSTANCES, columns, filter={"cohort": args.cohort, "outcome": "stored"})
        job = ScoringJob(model_files(model.folder), config.score.model_copy(update={"passes": passes}))
        images = source.select(score_columns()).slice(0, BARE_IMAGES)
        print(f"{model.ref}, {passes} passes, {args.actors} actors on {len(os.sched_getaffinity(0))} cores")
        for count in [int(text) for text in args.counts.split(",")]:
            add_images(lake, source, f"n{count}", count)
            before = bare_rate(job, images)
            mine = ["--lake", str(root), "--cohort", f"n{count}", "--model", model.ref, "--actors", str(args.actors)]
            chosen = [text for item in args.set for text in ("--set", item)]
            found = run([sys.executable, __file__, "--child", *mine, *chosen])
            results.append(figures(found, (before, bare_rate(job, images))))
            print(json.dumps(results[-1]), flush=True)
    first, last = results[0]["peaks_mib"], results[-1]["peaks_mib"]
    growth = {name: round(last[name] / first[name], 2) for name in first}
    share = steady_rate(results) / (sum(results[-1]["bare_images_per_s"]) / 2)
    good = share >= SHARE and max(growth.values()) <= GROWTH
    print(f"steady {share:.2f} of bare (asked {SHARE}); memory at the largest count by that at the least: {growth}")
    print("PASS" if good else "FAIL")
    return 0 if good else 1


def steady_rate(results: list[dict[str, Any]]) -> float:
    """Return images/s of the images that the largest count has more than the smallest."""
    first, last = results[0], results[-1]
    return (last["images"] - first["images"]) / (last["scoring_s"] - first["scoring_s"])


def figures(found: dict[str, Any], bare: tuple[float, float]) -> dict[str, Any]:
    """Return the rates and the memory of a run."""
    scored, advances = found["scored"], found["advances"]
    began = next(when for name, when in found["stages"] if name == "score")
    first_at, last_at = advances[0][1], advances[-1][1]
    return {
        "images": scored,
        "bare_images_per_s": [round(rate, 1) for rate in bare],
        "whole_images_per_s": round(scored / (found["ended"] - found["began"]), 1),
        "scoring_images_per_s": round(scored / (last_at - began), 1),
        "scoring_s": round(last_at - began, 1),
        "before_scoring_s": round(began - found["began"], 1),
        "to_first_shard_s": round(first_at - began, 1),
        "after_s": round(found["ended"] - last_at, 1),
        "peaks_mib": {name: round(value / 2**20) for name, value in found["peaks"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
