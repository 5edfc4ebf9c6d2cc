"""Scoring a stream of instances on Ray Data actors: pixels in, features or score rows out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.lake.files import DataFile
from memmc.lake.schemas import SCORES
from memmc.lake.shards import ShardFile, write_shard
from memmc.lake.storage import Storage
from memmc.lake.stream import PIXEL_COLUMNS, SMALL_BLOCK, stream
from memmc.scoring.actor import KEY_COLUMNS, Reconstructor, ScoringJob
from memmc.scoring.batching import LARGEST
from memmc.scoring.regions import GEOMETRY_COLUMNS

_SHARD_BYTES = 64 << 20  # of maps; the rows of one shard wait in memory


def score_columns(strata: Sequence[str] = ()) -> list[str]:
    """Return the columns of `instances` that scoring reads; `strata` are those that name a stratum."""
    return [*KEY_COLUMNS, *strata, *GEOMETRY_COLUMNS, *PIXEL_COLUMNS]


def features_of(ray: Any, dataset: Any, job: ScoringJob) -> Iterator[pa.Table]:
    """Yield tables of features: the key columns, stratum, passes, vector, maps, map_shape, spread, image_size."""
    yield from _actors(ray, dataset, job).iter_batches(batch_size=None, batch_format="pyarrow")


def score_shards(ray: Any, dataset: Any, job: ScoringJob, storage: Storage, map_bytes: int) -> Iterator[ShardFile]:
    """Score every row; yield each shard once it is written. Committing them is the caller's.

    Args:
        ray: the connected module.
        dataset: rows with `score_columns`.
        job: with a fitted scorer and a judge.
        storage: the lake's.
        map_bytes: of the maps of one image; bounds the rows of a shard.
    """
    rows = max(1, min(job.score.rows_per_shard, _SHARD_BYTES // max(1, map_bytes)))
    # Without a CPU of its own: the actors may hold all, and shards would be written only once they are through.
    written = _actors(ray, dataset, job).map_batches(
        _write,
        batch_size=rows,
        batch_format="pyarrow",
        fn_kwargs={"storage": storage},
        compute=ray.data.TaskPoolStrategy(size=1),
        num_cpus=0,
    )
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from (ShardFile(**json.loads(text)) for text in batch["shard"].to_pylist())


def stream_to_actors(
    storage: Storage, files: Sequence[DataFile], columns: Sequence[str], keys: Sequence[str], job: ScoringJob
) -> Any:
    """Return the rows with these object keys as a dataset: a shard read for each actor, blocks of about a batch."""
    at_once = max(2, job.score.num_actors)
    return stream(storage, files, columns, len(files), keys=keys, at_once=at_once, block_bytes=SMALL_BLOCK)


def _actors(ray: Any, dataset: Any, job: ScoringJob) -> Any:
    return dataset.map_batches(
        Reconstructor,
        fn_constructor_args=(job,),
        batch_size=job.score.batch_size or LARGEST,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=job.score.num_actors),
        num_gpus=1 if job.use_gpu else None,
    )


def _write(rows: pa.Table, storage: Storage) -> pa.Table:
    files = [write_shard(storage, SCORES, rows)] if rows.num_rows else []
    return pa.table({"shard": pa.array([json.dumps(asdict(file)) for file in files], pa.string())})


@dataclass(frozen=True)
class Keys:
    """Whose features they are: (N,) each, in the order of the features."""

    instances: list[str]
    patients: list[str]
    studies: list[str]
    strata: list[str]


def join_features(tables: list[pa.Table]) -> tuple[Any, Keys]:
    """Return the features of all tables and whose they are, in the order of the SOP Instance UIDs.

    An instance without a study is one of its own.
    """
    from memmc.scoring.scorer import Features

    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["sop_instance_uid"])
    maps = [np.frombuffer(row["maps"], "<f2").reshape(row["map_shape"]) for row in rows]
    features = Features(
        vectors_NF=np.stack([np.frombuffer(row["vector"], "<f4") for row in rows]),
        maps_NMHW=np.stack(maps),
        spread_N=np.array([row["spread"] for row in rows], np.float32),
        size=tuple(rows[0]["image_size"]),
    )
    uids = [row["sop_instance_uid"] for row in rows]
    studies = [row["study_uid"] or row["sop_instance_uid"] for row in rows]
    return features, Keys(uids, [row["patient_key"] for row in rows], studies, [row["stratum"] for row in rows])
