"""Ingest: list, convert in parallel, settle duplicates, balance the account, commit once."""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.dicom.convert import ConvertPolicy
from memmc.dicom.deidentify import key_id, object_key
from memmc.errors import UsageError
from memmc.lake.tables import Lake
from memmc.lake.vacuum import lease
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
from memmc.pipeline.identity import home_directory, identity_key
from memmc.pipeline.labels import read_labels
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import IngestResult, PlanResult
from memmc.pipeline.settle import publish, seen_objects, stands_for_object, turn_name
from memmc.sources.folder_s3 import SourceObject, list_objects

logger = logging.getLogger(__name__)

ALREADY_INGESTED = "already_ingested"
_COHORT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHARD_BYTES = 32 << 20
_LEAST_OBJECTS_PER_TASK = 16


def ingest(
    config: Config,
    source: str,
    cohort: str,
    *,
    label: str | None = None,
    labels_file: str | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """Bring every object of `source` into the `instances` table, exactly one row each.

    Objects an earlier run has accounted for are skipped; a run with nothing new
    commits nothing. A killed run leaves no trace in the table: the next one does
    its work again.

    Args:
        source: folder or s3:// prefix of DICOM objects.
        cohort: name the rows are filed under.
        label: label of every object, or None for unknown.
        labels_file: CSV of labels by path or SOPInstanceUID.

    Raises:
        UsageError: bad cohort name or label table.
        IdentityKeyError: the lake was made with another identity key.
        AccountingError: the account does not balance; nothing was committed.
    """
    began = time.monotonic()
    progress = progress or Silent()
    check_cohort(cohort)
    home = home_directory()
    job, known, new = plan(config, source, cohort, label, labels_file, progress)
    reasons: Counter[str] = Counter()
    if known:
        reasons[ALREADY_INGESTED] = known
    outcomes: Counter[str] = Counter(duplicate=known)
    lake = Lake(config.lake.uri)
    if new:
        progress.stage("ingest", len(new))
        metadata = {"cohort": cohort, "preprocess_id": job.preprocess_id, "config_id": config.config_id}
        with lease(lake, job.run):
            with ray_cluster(config, home, training=False) as ray:
                shards = list(_convert(ray, config, job, new, progress))
            version, shards, dropped = publish(lake, job, shards, len(new), metadata)
        rows = [row for shard in shards for row in shard.account if stands_for_object(job, row)]
        outcomes.update([row["outcome"] for row in rows] + ["duplicate"] * dropped)
        reasons.update([row["reason"] for row in rows if row["reason"]] + [ALREADY_INGESTED] * dropped)
    else:
        version = lake.version("instances") if lake.exists("instances") else -1
    logger.info("ingest %s: %d objects, %s", job.run, known + len(new), dict(outcomes))
    return IngestResult(
        seen=known + len(new),
        stored=outcomes["stored"],
        duplicate=outcomes["duplicate"],
        excluded=outcomes["excluded"],
        quarantined=outcomes["quarantined"],
        reasons=dict(sorted(reasons.items())),
        version=version,
        cohort=cohort,
        run=job.run,
        seconds=round(time.monotonic() - began, 2),
    )


def preview(
    config: Config,
    source: str,
    cohort: str,
    *,
    label: str | None = None,
    labels_file: str | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Say what `ingest` would do; read the listing only and change nothing in the table."""
    check_cohort(cohort)
    job, known, new = plan(config, source, cohort, label, labels_file, progress or Silent())
    labelled = sum(job.labels.of(item.path, None) != "unknown" for item in new)
    return PlanResult(
        {"objects listed": known + len(new), "already ingested": known, "new": len(new), "labelled": labelled}
    )


def check_cohort(cohort: str) -> None:
    """Refuse a name that could not stand in a log, a path or a model's name.

    Raises:
        UsageError: naming the form expected.
    """
    if not _COHORT.fullmatch(cohort):
        raise UsageError("cohort names are 1-64 of a-z, 0-9, '.', '_', '-' and begin with a letter or digit")


def plan(
    config: Config, source: str, cohort: str, label: str | None, labels_file: str | None, progress: Progress
) -> tuple[IngestJob, int, list[SourceObject]]:
    """List the source and subtract what the table has seen.

    Returns:
        The job all tasks share, the number of objects already accounted for, and the new objects in listing order.
    """
    key = identity_key(config, home_directory(), progress)
    source = source if "://" in source else str(Path(source).absolute())
    lake = Lake(config.lake.uri)
    lake.check_key_id(key_id(key))
    labels = read_labels(label, labels_file, key)
    progress.stage("list")
    listed = list(list_objects(source))
    labels.check_against(item.path for item in listed)
    lake.probe()
    turn = lake.turn("instances", turn_name(cohort))
    seen = seen_objects(lake, cohort)
    new = [item for item in listed if object_key(key, source, item.path, item.size, item.modified) not in seen]
    started = datetime.now(UTC)
    job = IngestJob(
        run=f"ingest-{cohort}-{started:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        cohort=cohort,
        source=source,
        storage=lake.storage,
        policy=ConvertPolicy.from_config(config, key),
        split=config.split,
        labels=labels,
        preprocess_id=config.preprocess_id,
        started=started,
        turn=turn,
    )
    progress.message(f"{len(listed)} objects listed, {len(new)} new")
    return job, len(listed) - len(new), new


def _convert(
    ray: Any, config: Config, job: IngestJob, new: list[SourceObject], progress: Progress
) -> Iterator[WrittenShard]:
    """Yield the shards in listing order, so that the first of two duplicates is the same in every run."""
    size = config.ingest.objects_per_task or _objects_per_task(config, len(new), int(ray.cluster_resources()["CPU"]))
    chunks = [new[start : start + size] for start in range(0, len(new), size)]
    shared = ray.put(job)

    def convert(batch: dict[str, Any]) -> dict[str, list[Any]]:
        done = [convert_objects(ray.get(shared), objects_from_json(str(chunk))) for chunk in batch["objects"]]
        return {"number": list(batch["number"]), "shards": [shards_to_json(shards) for shards in done]}

    dataset = ray.data.from_items(
        [{"number": number, "objects": objects_to_json(chunk)} for number, chunk in enumerate(chunks)],
        override_num_blocks=len(chunks),
    ).map_batches(convert, batch_size=1, concurrency=tasks_at_once(config))
    results: dict[int, list[WrittenShard]] = {}
    done = 0
    for row in dataset.iter_rows():
        shards = shards_from_json(row["shards"])
        results[int(row["number"])] = shards
        done += sum(len(shard.account) for shard in shards)
        progress.advance(done)
    for number in sorted(results):
        yield from results[number]


def _objects_per_task(config: Config, count: int, cpus: int) -> int:
    """Enough objects for a shard of 32 MB, but at least four tasks per CPU when there are that many."""
    pixels = config.data.image_size**2 * config.data.bits // 8
    return max(_LEAST_OBJECTS_PER_TASK, min(math.ceil(_SHARD_BYTES / pixels), math.ceil(count / (4 * cpus))))
