"""Scoring a stream of instances on Ray Data actors: pixels in, features or score rows out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.config import ScoreConfig
from memmc.lake.schemas import SCHEMAS, SCORES
from memmc.lake.shards import write_shard
from memmc.lake.storage import Storage
from memmc.lake.stream import PIXEL_COLUMNS, pixels_to_array

SCORE_COLUMNS = ("sop_instance_uid", "patient_key", "study_uid", *PIXEL_COLUMNS)
_ROWS_PER_SHARD = 4096


@dataclass(frozen=True)
class ScoringJob:
    """What every scoring actor needs.

    Attributes:
        model_files: the model folder, by file name.
        scorer_state: the fitted scorer, or None to return features.
        normal_scores: of the held-out normals, for p-values.
        fixed: columns every score row shares (cohort, model, model_digest, calibration_id, dataset_version, ...).
    """

    model_files: dict[str, bytes]
    score: ScoreConfig
    use_gpu: bool = False
    scorer_state: bytes | None = None
    normal_scores: tuple[float, ...] = ()
    threshold: float = 0.0
    fixed: dict[str, Any] | None = None


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
        self._device = torch.device("cuda" if job.use_gpu else "cpu")
        if not job.use_gpu:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.score.num_actors))
        with tempfile.TemporaryDirectory() as folder:
            for name, data in job.model_files.items():
                Path(folder, name).write_bytes(data)
            self._loaded = load_model(folder, self._device)
        self._scorer = scorer_from_bytes(job.scorer_state) if job.scorer_state is not None else make_scorer(job.score)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return features, or score rows, of one batch of instances."""
        uids = rows["sop_instance_uid"].to_pylist()
        images_BCHW, reconstruction = self._reconstruct(rows, uids)
        features = self._scorer.features(images_BCHW, reconstruction)
        if self._job.scorer_state is None:
            return _features_table(rows, features)
        return self._score_table(rows, self._scorer.score_features(features))

    def _reconstruct(self, rows: pa.Table, uids: list[str]) -> tuple[Any, Any]:
        import torch

        from memmc.scoring.masks import mask_ids, reconstruct

        model, info = self._loaded.model, self._loaded.info
        scale = np.float32(2 ** rows["bits"][0].as_py() - 1)
        images_BHWC = pixels_to_array(rows).astype(np.float32) / scale
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous().to(self._device)
        ids = mask_ids(self._loaded.digest, uids, model.num_patches, model.num_keep, self._job.score.passes)
        standardised = (images_BCHW - info.pixel_mean) / info.pixel_std
        with torch.inference_mode():
            reconstruction = reconstruct(model, standardised, ids.to(self._device))
        return images_BCHW, reconstruction.rescale(info.pixel_mean, info.pixel_std)

    def _score_table(self, rows: pa.Table, scored: Any) -> pa.Table:
        from memmc.scoring.calibration import p_values
        from memmc.scoring.maps import encode_map

        height, width = scored.anomaly_map_BHW.shape[1:]
        fixed = self._job.fixed or {}
        columns: dict[str, Any] = {
            **{name: rows[name] for name in ("sop_instance_uid", "patient_key", "study_uid")},
            "anomaly_score": pa.array(scored.anomaly_score_B),
            "p_value": pa.array(p_values(scored.anomaly_score_B, self._job.normal_scores)),
            "is_abnormal": pa.array(scored.anomaly_score_B > self._job.threshold),
            "score_spread": pa.array(scored.spread_B),
            "anomaly_map": pa.array([encode_map(item) for item in scored.anomaly_map_BHW], pa.binary()),
            "map_height": pa.array([height] * rows.num_rows, pa.int32()),
            "map_width": pa.array([width] * rows.num_rows, pa.int32()),
        }
        schema = SCHEMAS[SCORES]
        for name, value in fixed.items():
            columns[name] = pa.array([value] * rows.num_rows, schema.field(name).type)
        return pa.Table.from_arrays(
            [_whole(columns[name]).cast(schema.field(name).type) for name in schema.names], schema=schema
        )


def features_of(ray: Any, dataset: Any, job: ScoringJob) -> Iterator[pa.Table]:
    """Yield tables of features: sop_instance_uid, patient_key, vector, maps, map_shape, spread, image_size."""
    yield from _actors(ray, dataset, job).iter_batches(batch_size=None, batch_format="pyarrow")


def score_shards(ray: Any, dataset: Any, job: ScoringJob, storage: Storage) -> Iterator[dict[str, Any]]:
    """Score every row; yield one description per written, not yet committed shard.

    Yields:
        `shard` (a `ShardFile` as a dict) and `abnormal`, the number of flagged rows in it.
    """
    written = _actors(ray, dataset, job).map_batches(
        _write, batch_size=_ROWS_PER_SHARD, batch_format="pyarrow", fn_kwargs={"storage": storage}
    )
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def _actors(ray: Any, dataset: Any, job: ScoringJob) -> Any:
    return dataset.map_batches(
        Reconstructor,
        fn_constructor_args=(job,),
        batch_size=job.score.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=job.score.num_actors),
        num_gpus=1 if job.use_gpu else None,
    )


def _write(rows: pa.Table, storage: Storage) -> pa.Table:
    import json
    from dataclasses import asdict

    if not rows.num_rows:
        return pa.table({"shard": pa.array([], pa.string()), "abnormal": pa.array([], pa.int64())})
    file = write_shard(storage, SCORES, rows)
    abnormal = sum(rows["is_abnormal"].to_pylist())
    return pa.table({"shard": [json.dumps(asdict(file))], "abnormal": [abnormal]})


def _features_table(rows: pa.Table, features: Any) -> pa.Table:
    count = len(features)
    return pa.table(
        {
            "sop_instance_uid": _whole(rows["sop_instance_uid"]),
            "patient_key": _whole(rows["patient_key"]),
            "vector": pa.array([row.astype("<f4").tobytes() for row in features.vectors_NF], pa.binary()),
            "maps": pa.array([row.astype("<f2").tobytes() for row in features.maps_NMHW], pa.binary()),
            "map_shape": pa.array([list(features.maps_NMHW.shape[1:])] * count, pa.list_(pa.int32())),
            "spread": pa.array(features.spread_N.astype(np.float32)),
            "image_size": pa.array([list(features.size)] * count, pa.list_(pa.int32())),
        }
    )


def join_features(tables: list[pa.Table]) -> tuple[Any, list[str]]:
    """Return the features and patient keys of all tables, in the order of the SOP Instance UIDs."""
    from memmc.scoring.scorer import Features

    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["sop_instance_uid"])
    maps = [np.frombuffer(row["maps"], "<f2").reshape(row["map_shape"]) for row in rows]
    features = Features(
        vectors_NF=np.stack([np.frombuffer(row["vector"], "<f4") for row in rows]),
        maps_NMHW=np.stack(maps),
        spread_N=np.array([row["spread"] for row in rows], np.float32),
        size=tuple(rows[0]["image_size"]),
    )
    return features, [row["patient_key"] for row in rows]


def _whole(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
