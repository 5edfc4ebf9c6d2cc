"""Feeding a training: shards through Ray Data against tensors in memory, two workers against one, driver memory.

Ratios in one run, medians over interleaved rounds; the machine may be shared, so the share of it that other processes
took is printed beside. Images are 64 px, 16 bits, the model is `tiny` with batches of 8.

::

    python infra/benchmarks/feeding.py            # all three
    python infra/benchmarks/feeding.py --only scaling
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from memmc.config import load_config
from memmc.lake.tables import Lake
from memmc.training.feed import Batch, CachedFeed, Feed, StreamedFeed
from memmc.training.order import Position

SIDE = 64
MAX_LOSS, MIN_SCALING, MAX_GROWTH = 0.05, 1.7, 1.1
CONFIG = load_config()


def make_lake(folder: Path, images: int, shards: int) -> Lake:
    """Commit noise images in so many shards."""
    lake, rng = Lake(folder), np.random.default_rng(0)
    for part in np.array_split(np.arange(images), shards):
        rows = [
            {
                "cohort": "c", "object_key": f"{number:064x}", "source_ref": "r", "outcome": "stored", "split": "train",
                "content_key": f"{number:064x}", "size_bytes": 1, "patient_key": f"p{number}",
                "sop_instance_uid": f"2.25.{number}", "label": "normal", "height": SIDE, "width": SIDE,
                "channels": 1, "bits": 16, "ingest_run": "b", "ingested_at": datetime.now(UTC),
                "pixels": rng.integers(0, 65_535, SIDE * SIDE, np.uint16).tobytes(),
            }
            for number in part
        ]  # fmt: skip
        lake.append("instances", pa.Table.from_pylist(rows))
    return lake


class InMemory:
    """The bar: batches sliced from one array, no shards and no shuffle."""

    def __init__(self, images: int) -> None:
        self.num_images = images
        self._pixels = np.random.default_rng(0).integers(0, 65_535, (images, SIDE, SIDE, 1), np.uint16)

    def __call__(self, position: Position) -> Iterator[Batch]:
        start, size = position.images, CONFIG.train.batch_size
        while True:
            yield Batch(self._pixels.take(range(start, start + size), 0, mode="wrap"))
            start += size


def steps_of(feed: Feed, steps: int, rank: int = 0, workers: int = 1, sync: Any = None) -> tuple[float, float]:
    """Return images per second of wall time, and of this process's CPU time, of the real loop.

    Its first steps, which start the reader, count too. Beside other work CPU time says what wall time cannot.
    """
    import torch

    from memmc.model.mae import MemMCMAE
    from memmc.training.loop import train

    torch.manual_seed(0)
    config = CONFIG.train.model_copy(update={"max_steps": steps, "max_minutes": 60.0})
    model = MemMCMAE(CONFIG.model, SIDE)
    began, began_cpu = time.monotonic(), time.process_time()
    train(model, feed, config, bits=16, pixel_mean=0.5, pixel_std=0.3, rank=rank, world_size=workers, sync=sync)
    images = steps * config.batch_size
    return images / (time.monotonic() - began), images / (time.process_time() - began_cpu)


def epoch(rounds: int, images: int) -> bool:
    """One epoch each of the three feeds, in turns, one core for the loop."""
    import torch

    from memmc.pipeline.cluster import ray_cluster
    from memmc.training.source import ShardSource

    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="f") as folder,
        ray_cluster(CONFIG, Path(folder) / ".memmc", training=False) as ray,
    ):
        lake = make_lake(Path(folder) / "lake", images, 8)
        files, keys = lake.files("instances"), [f"{number:064x}" for number in range(images)]
        feeds: dict[str, Feed] = {"memory": InMemory(images)}
        for name, cached in (("cached", True), ("streamed", False)):
            feeds[name] = ShardSource.open(ray, lake.storage, "instances", files, keys, cached=cached).feed(
                CONFIG.train, 0
            )
        assert isinstance(feeds["cached"], CachedFeed)
        assert isinstance(feeds["streamed"], StreamedFeed)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in feeds}
        steps_of(feeds["memory"], 8)
        for _ in range(rounds):
            for name, feed in feeds.items():
                rates[name].append(steps_of(feed, images // CONFIG.train.batch_size))
        # Said here: a thread of Ray Data may still read ahead, and this process has ended with its cluster then.
        return _compared(rates)


def _compared(rates: dict[str, list[tuple[float, float]]]) -> bool:
    fine = True
    for name in ("cached", "streamed"):
        pairs = list(zip(rates[name], rates["memory"], strict=True))
        wall, cpu = (statistics.median(own[n] / bar[n] for own, bar in pairs) for n in range(2))
        fine &= 1.0 - wall <= MAX_LOSS
        print(f"epoch, {name}: {statistics.median(own[0] for own, _ in pairs):.0f} images/s, {wall:.3f} of memory's "
              f"{statistics.median(bar[0] for _, bar in pairs):.0f} in wall time, {cpu:.3f} in CPU time "
              f"({', '.join(f'{own[0] / bar[0]:.3f}' for own, bar in pairs)})", flush=True)  # fmt: skip
    return fine


def _worker(rank: int, workers: int, cores: list[int], port: int, steps: int, out: Any) -> None:
    os.sched_setaffinity(0, {cores[rank]})
    import torch
    import torch.distributed as dist

    from memmc.training.peers import Alone, Group

    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    sync = Group(torch.device("cpu")) if workers > 1 else Alone()
    steps_of(InMemory(256), 4, rank, workers, sync)
    out.put(steps_of(InMemory(256), steps, rank, workers, sync))


def scaling(rounds: int, steps: int) -> bool:
    """One worker on one core, two on two, in turns; each bound to its core."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    rates: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for number in range(rounds):
        for workers in (1, 2):
            out, port = context.Queue(), 29_400 + 2 * number + workers
            group = [
                context.Process(target=_worker, args=(rank, workers, cores, port, steps, out))
                for rank in range(workers)
            ]
            for process in group:
                process.start()
            found = [out.get(timeout=300) for _ in group]
            rates[workers].append((sum(wall for wall, _ in found), sum(cpu for _, cpu in found)))
            for process in group:
                process.join()
    pairs = list(zip(rates[1], rates[2], strict=True))
    wall, cpu = (statistics.median(two[n] / one[n] for one, two in pairs) for n in range(2))
    print(f"two workers on two cores: {wall:.2f} x one on one in wall time, {cpu:.2f} x in images per CPU second "
          f"({', '.join(f'{two[0] / one[0]:.2f}' for one, two in pairs)})")  # fmt: skip
    return wall >= MIN_SCALING


def memory(images: int) -> bool:
    """Peak memory of a driver that plans a streamed run over few and over many shards of the same images."""
    peaks: dict[int, float] = {}
    for shards in (10, 100):
        with tempfile.TemporaryDirectory(prefix="f") as folder:
            make_lake(Path(folder) / "lake", images, shards)
            done = subprocess.run(
                [sys.executable, __file__, "--plan", folder, "--images", str(images)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            peaks[shards] = float(done.stdout.strip().splitlines()[-1])
    growth = peaks[100] / peaks[10]
    print(f"driver: {peaks[10]:.0f} MB for 10 shards, {peaks[100]:.0f} MB for 100 ({growth:.3f} x)")
    return growth <= MAX_GROWTH


def plan(folder: Path, images: int) -> None:
    """What the driver of a training does with shards; prints its peak memory, MB."""
    import resource

    from memmc.pipeline.cluster import ray_cluster
    from memmc.training.source import ShardSource

    with ray_cluster(CONFIG, folder / ".memmc", training=False) as ray:
        lake = Lake(folder / "lake")
        keys = [f"{number:064x}" for number in range(images)]
        source = ShardSource.open(ray, lake.storage, "instances", lake.files("instances"), keys, cached=False)
        assert sum(source.shard_rows or ()) == images
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> int:
    """Print the figures and whether each holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("epoch", "scaling", "memory"))
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        plan(options.plan, options.images)
        return 0
    psutil.cpu_percent()
    parts = {
        "scaling": lambda: scaling(options.rounds, 60),
        "epoch": lambda: epoch(options.rounds, options.images),
        "memory": lambda: memory(options.images),
    }
    chosen = [options.only] if options.only else list(parts)
    fine = {name: parts[name]() for name in chosen}
    for name, holds in fine.items():
        print(f"{name}: {'PASS' if holds else 'FAIL'}")
    print(f"machine at {psutil.cpu_percent():.0f} % over the run, own work included")
    return 0 if all(fine.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
