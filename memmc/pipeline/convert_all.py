"""Where an ingest converts its objects: in this process's own sandboxes, or on a Ray cluster.

Decoders run in children anyway, so a thread per core that feeds one keeps a
machine busy. A cluster takes several seconds to start, which only a large plan
repays, or other machines (infra/adr/0014-small-ingests-start-no-cluster.md).
"""

from __future__ import annotations

import math
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.cores import cores
from memmc.dicom.sandbox import Sandbox
from memmc.pipeline.cluster import ray_cluster, tasks_at_once
from memmc.pipeline.convert_chunk import (
    IngestJob,
    WrittenShard,
    convert_objects,
    objects_from_json,
    objects_to_json,
    shards_from_json,
    shards_to_json,
)
from memmc.pipeline.progress import Progress
from memmc.sources.objects import SourceObject

_SHARD_BYTES = 32 << 20
_LEAST_OBJECTS_PER_TASK = 16


def convert_all(
    config: Config, job: IngestJob, new: list[SourceObject], home: Path, progress: Progress
) -> list[WrittenShard]:
    """Return the shards in listing order, so that the first of two duplicates is the same in every run.

    Args:
        home: the working directory's `.memmc`.

    Raises:
        StorageError: the source or the lake fails; nothing was committed.
    """
    if not needs_cluster(config, len(new)):
        return _here(config, job, new, progress)
    with ray_cluster(config, home, training=False) as ray:
        return _on_cluster(ray, config, job, new, progress)


def needs_cluster(config: Config, count: int) -> bool:
    """Return whether `count` objects go to Ray: they are many, or a cluster is named or runs already."""
    ray = sys.modules.get("ray")
    running = ray is not None and ray.is_initialized()
    return running or config.ray.address is not None or count >= config.ray.ingest_from


def _here(config: Config, job: IngestJob, new: list[SourceObject], progress: Progress) -> list[WrittenShard]:
    """Convert in one sandbox per core, each fed by a thread."""
    at_once = cores()
    chunks = _chunks(config, new, at_once)
    stopped = threading.Event()
    idle: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()

    def work(chunk: list[SourceObject]) -> list[WrittenShard]:
        sandbox = idle.get()
        try:
            return convert_objects(job, takewhile(lambda _: not stopped.is_set(), chunk), sandbox)
        finally:
            idle.put(sandbox)

    with ExitStack() as stack:
        threads = min(at_once, len(chunks))
        for _ in range(threads):
            idle.put(stack.enter_context(Sandbox(job.policy)))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        tasks = {pool.submit(work, chunk): number for number, chunk in enumerate(chunks)}
        try:
            return _collected(((tasks[task], task.result()) for task in as_completed(tasks)), progress)
        except BaseException:  # an interrupt too: what has begun ends after its object, nothing else begins
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _on_cluster(
    ray: Any, config: Config, job: IngestJob, new: list[SourceObject], progress: Progress
) -> list[WrittenShard]:
    chunks = _chunks(config, new, int(ray.cluster_resources()["CPU"]))
    shared = ray.put(job)

    def convert(batch: dict[str, Any]) -> dict[str, list[Any]]:
        done = [convert_objects(ray.get(shared), objects_from_json(str(chunk))) for chunk in batch["objects"]]
        return {"number": list(batch["number"]), "shards": [shards_to_json(shards) for shards in done]}

    dataset = ray.data.from_items(
        [{"number": number, "objects": objects_to_json(chunk)} for number, chunk in enumerate(chunks)],
        override_num_blocks=len(chunks),
    ).map_batches(convert, batch_size=1, concurrency=tasks_at_once(config))
    return _collected(((int(row["number"]), shards_from_json(row["shards"])) for row in dataset.iter_rows()), progress)


def _collected(results: Iterator[tuple[int, list[WrittenShard]]], progress: Progress) -> list[WrittenShard]:
    """Take the shards of numbered chunks as they come; return them in the order of the numbers."""
    found: dict[int, list[WrittenShard]] = {}
    done = 0
    for number, shards in results:
        found[number] = shards
        done += sum(len(shard.account) for shard in shards)
        progress.advance(done)
    return [shard for number in sorted(found) for shard in found[number]]


def _chunks(config: Config, new: list[SourceObject], cpus: int) -> list[list[SourceObject]]:
    size = config.ingest.objects_per_task or _objects_per_task(config, len(new), cpus)
    return [new[start : start + size] for start in range(0, len(new), size)]


def _objects_per_task(config: Config, count: int, cpus: int) -> int:
    """Enough objects for a shard of 32 MB, but at least four tasks per CPU when there are that many."""
    pixels = config.data.image_size**2 * config.data.bits // 8
    return max(_LEAST_OBJECTS_PER_TASK, min(math.ceil(_SHARD_BYTES / pixels), math.ceil(count / (4 * cpus))))
