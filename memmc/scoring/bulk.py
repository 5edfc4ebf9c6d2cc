"""Scoring a stream of instances on Ray Data actors: pixels in, features or score rows out."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.config import ScoreConfig
from memmc.lake.schemas import SCHEMAS, SCORES
from memmc.lake.shards import ShardFile, write_shard
from memmc.lake.storage import Storage
from memmc.lake.stream import PIXEL_COLUMNS, pixels_to_array
from memmc.scoring.batching import LARGEST, find_batch_size
from memmc.scoring.regions import GEOMETRY_COLUMNS, RegionJudge, map_columns
from memmc.scoring.strata import Judge, stratum_names

KEY_COLUMNS = ("sop_instance_uid", "patient_key", "study_uid")
_SHARD_BYTES = 64 << 20  # of maps; the rows of one shard wait in memory
_BATCH_BYTES = 64 << 20  # of pixels that go to an actor at once

_log = logging.getLogger(__name__)


def score_columns(strata: Sequence[str] = ()) -> list[str]:
    """Return the columns of `instances` that scoring reads; `strata` are those that name a stratum."""
    return [*KEY_COLUMNS, *strata, *GEOMETRY_COLUMNS, *PIXEL_COLUMNS]


@dataclass(frozen=True)
class ScoringJob:
    """What every scoring actor needs.

    Attributes:
        model_files: the model folder, by file name.
        scorer_state: the fitted scorer, or None to return features.
        judge: turns scores into p-values and verdicts; None to return features.
        strata: columns that name a stratum; they come back with the features.
        fixed: columns every score row shares (cohort, model, model_digest, calibration_id, dataset_version, ...).
        regions: makes regions of the maps.
    """

    model_files: dict[str, bytes]
    score: ScoreConfig
    use_gpu: bool = False
    scorer_state: bytes | None = None
    judge: Judge | None = None
    strata: tuple[str, ...] = ()
    fixed: dict[str, Any] | None = None
    regions: RegionJudge | None = None


def model_files(folder: Path) -> dict[str, bytes]:
    """Return the content of a model folder."""
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in {".json", ".safetensors"}
    }


class Reconstructor:
    """A Ray Data actor: one model, whole batches."""

    def __init__(self, job: ScoringJob) -> None:
        import torch

        from memmc.model.artifact import load_model
        from memmc.scoring.scorer import make_scorer, scorer_from_bytes

        self._job = job
        self.device = torch.device("cuda" if job.use_gpu else "cpu")
        if not job.use_gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.score.num_actors))
        with tempfile.TemporaryDirectory() as folder:
            for name, data in job.model_files.items():
                Path(folder, name).write_bytes(data)
            self.loaded = load_model(folder, self.device)
        self._scorer = scorer_from_bytes(job.scorer_state) if job.scorer_state is not None else make_scorer(job.score)
        self.batch_size = job.score.batch_size

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return features, or score rows, of instances of one shape; they are judged some at a time."""
        if not rows.num_rows:
            return SCHEMAS[SCORES].empty_table() if self._job.judge else pa.table({})
        if not self.batch_size:
            self.batch_size = self._find_batch_size(rows)
            _log.info("batch size %d found for %d passes per image", self.batch_size, self._job.score.passes)
        step = self.batch_size
        return pa.concat_tables([self.batch(rows.slice(start, step)) for start in range(0, rows.num_rows, step)])

    def batch(self, rows: pa.Table) -> pa.Table:
        """Return features, or score rows, of instances that go through the model together."""
        images_BCHW, reconstruction = self._reconstruct(rows)
        features = self._scorer.features(images_BCHW, reconstruction)
        if self._job.judge is None:
            return _features_table(rows, features, self._job.strata)
        scored = self._scorer.score_features(features)
        maps = map_columns(rows, scored.anomaly_map_BHW, reconstruction.variance_BCHW, self._job.regions)
        return _score_table(rows, scored, self._job.judge, self._job.fixed or {}, maps)

    def _find_batch_size(self, rows: pa.Table) -> int:
        import psutil

        process, actors = psutil.Process(), self._job.score.num_actors
        before = process.memory_info().rss

        def memory() -> tuple[float, float]:
            return max(0, process.memory_info().rss - before), psutil.virtual_memory().available / actors

        def run(size: int) -> None:
            repeated = rows.take(np.arange(size) % rows.num_rows)
            self._scorer.features(*self._reconstruct(repeated))

        return find_batch_size(run, largest=min(LARGEST, _rows_per_batch(rows)), memory=memory)

    def _reconstruct(self, rows: pa.Table) -> tuple[Any, Any]:
        import torch

        from memmc.scoring.masks import predict

        model, info, uids = self.loaded.model, self.loaded.info, rows["sop_instance_uid"].to_pylist()
        scale = np.float32(2 ** rows["bits"][0].as_py() - 1)
        images_BHWC = pixels_to_array(rows).astype(np.float32) / scale
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous().to(self.device)
        standardised = (images_BCHW - info.pixel_mean) / info.pixel_std
        score = self._job.score
        with torch.inference_mode():
            reconstruction = predict(score.scorer, model, self.loaded.digest, uids, standardised, score.passes)
        return images_BCHW, reconstruction.rescale(info.pixel_mean, info.pixel_std)


def _score_table(
    rows: pa.Table, scored: Any, judge: Judge, fixed: dict[str, Any], maps: dict[str, pa.Array]
) -> pa.Table:
    from memmc.scoring.maps import encode_map

    height, width = scored.anomaly_map_BHW.shape[1:]
    verdicts = judge.judge(scored.anomaly_score_B, _strata_of(rows, judge.columns))
    columns: dict[str, Any] = {
        **{name: rows[name] for name in KEY_COLUMNS},
        **maps,
        "anomaly_score": pa.array(scored.anomaly_score_B),
        "p_value": pa.array(verdicts.p_value_B),
        "is_abnormal": pa.array(verdicts.is_abnormal_B),
        "stratum": pa.array(verdicts.stratum_B, pa.string()),
        "score_spread": pa.array(scored.spread_B),
        "anomaly_map": pa.array([encode_map(item) for item in scored.anomaly_map_BHW], pa.binary()),
        "map_height": pa.repeat(pa.scalar(height, pa.int32()), rows.num_rows),
        "map_width": pa.repeat(pa.scalar(width, pa.int32()), rows.num_rows),
    }
    return complete(columns, rows.num_rows, fixed)


def complete(columns: dict[str, Any], count: int, fixed: dict[str, Any]) -> pa.Table:
    """Return rows of `scores` from columns and from values they all share; what neither names is null."""
    schema = SCHEMAS[SCORES]
    arrays = [
        _whole(columns[field.name]).cast(field.type)
        if field.name in columns
        else pa.repeat(pa.scalar(fixed.get(field.name), field.type), count)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def features_of(ray: Any, dataset: Any, job: ScoringJob) -> Iterator[pa.Table]:
    """Yield tables of features: the key columns, stratum, vector, maps, map_shape, spread, image_size."""
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
    written = _actors(ray, dataset, job).map_batches(
        _write, batch_size=rows, batch_format="pyarrow", fn_kwargs={"storage": storage}
    )
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from (ShardFile(**json.loads(text)) for text in batch["shard"].to_pylist())


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


def _strata_of(rows: pa.Table, columns: Sequence[str]) -> list[str]:
    return stratum_names({name: rows[name].to_pylist() for name in columns}, rows.num_rows)


def _features_table(rows: pa.Table, features: Any, strata: Sequence[str]) -> pa.Table:
    count = len(features)
    return pa.table(
        {
            **{name: _whole(rows[name]) for name in KEY_COLUMNS},
            "stratum": pa.array(_strata_of(rows, strata), pa.string()),
            "vector": pa.array([row.astype("<f4").tobytes() for row in features.vectors_NF], pa.binary()),
            "maps": pa.array([row.astype("<f2").tobytes() for row in features.maps_NMHW], pa.binary()),
            "map_shape": pa.array([list(features.maps_NMHW.shape[1:])] * count, pa.list_(pa.int32())),
            "spread": pa.array(features.spread_N.astype(np.float32)),
            "image_size": pa.array([list(features.size)] * count, pa.list_(pa.int32())),
        }
    )


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


def _rows_per_batch(rows: pa.Table) -> int:
    """Return how many images of this shape may come to an actor at once."""
    size = max(1, len(rows["pixels"][0].as_py()))
    return max(1, _BATCH_BYTES // size)


def _whole(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
