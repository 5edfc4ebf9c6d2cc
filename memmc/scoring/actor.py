"""One model in one process: tables of pixels in, tables of features or of score rows out. Nothing of Ray."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memmc.config import ScoreConfig
from memmc.cores import cores
from memmc.lake.schemas import SCHEMAS, SCORES
from memmc.lake.stream import pixels_to_array
from memmc.scoring.batching import LARGEST, find_batch_size
from memmc.scoring.early_stop import StopRule, stage_passes
from memmc.scoring.regions import RegionJudge, map_columns
from memmc.scoring.strata import Judge, stratum_names

if TYPE_CHECKING:
    from memmc.scoring.scorer import Features, ScoreBatch

KEY_COLUMNS = ("sop_instance_uid", "patient_key", "study_uid")
_BATCH_BYTES = 64 << 20  # of pixels that go to an actor at once

_log = logging.getLogger(__name__)


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
        each_stage: features after every number of passes at which an image may stop, not only after all.
        stop: when an image needs no further pass; None where all get all.
    """

    model_files: dict[str, bytes]
    score: ScoreConfig
    use_gpu: bool = False
    scorer_state: bytes | None = None
    judge: Judge | None = None
    strata: tuple[str, ...] = ()
    fixed: dict[str, Any] | None = None
    regions: RegionJudge | None = None
    each_stage: bool = False
    stop: StopRule | None = None


def model_files(folder: Path) -> dict[str, bytes]:
    """Return the content of a model folder."""
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in {".json", ".safetensors"}
    }


class Reconstructor:
    """One model, whole batches; a Ray Data actor, or called in the process."""

    def __init__(self, job: ScoringJob) -> None:
        import torch

        from memmc.model.artifact import load_model
        from memmc.scoring.scorer import make_scorer, scorer_from_bytes

        self._job = job
        self.device = torch.device("cuda" if job.use_gpu else "cpu")
        if not job.use_gpu:
            torch.set_num_threads(max(1, cores() // job.score.num_actors))
        with tempfile.TemporaryDirectory(prefix="memmc-") as folder:
            for name, data in job.model_files.items():
                Path(folder, name).write_bytes(data)
            self.loaded = load_model(folder, self.device)
        self._scorer = scorer_from_bytes(job.scorer_state) if job.scorer_state is not None else make_scorer(job.score)
        self._of_stage = (
            {item.passes: scorer_from_bytes(item.scorer_state) for item in job.stop.stages} if job.stop else {}
        )
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
        if self._job.each_stage or self._job.stop is not None:
            return self._in_stages(rows)
        images_BCHW, reconstruction = self._reconstruct(rows)
        features = self._scorer.features(images_BCHW, reconstruction)
        if self._job.judge is None:
            return _features_table(rows, features, self._job.strata, self._stages()[-1])
        scored = self._scorer.score_features(features)
        return self._score_rows(rows, scored, reconstruction.variance_BCHW, self._stages()[-1])

    def _in_stages(self, rows: pa.Table) -> pa.Table:
        """Return features after every stage, one table below the other, or scores after the stage that suffices."""
        import torch

        from memmc.scoring.masks import RunningReconstruction, mask_ids

        model, info, job = self.loaded.model, self.loaded.info, self._job
        images_BCHW, standardised_BCHW = self._images(rows)
        uids = rows["sop_instance_uid"].to_pylist()
        ids_BPK = mask_ids(self.loaded.digest, uids, model.num_patches, model.num_keep, job.score.passes)
        running = RunningReconstruction(model, standardised_BCHW)
        left, done, parts, before = np.arange(rows.num_rows), list[Any](), list[pa.Table](), 0
        for passes in self._stages():
            running.add(ids_BPK[left, before:passes])
            reconstruction = running.result().rescale(info.pixel_mean, info.pixel_std)
            features, before = self._scorer.features(images_BCHW[left], reconstruction), passes
            if job.judge is None:
                parts.append(_features_table(rows, features, job.strata, passes))
                continue
            scored = self._of_stage.get(passes, self._scorer).score_features(features)
            some = rows.take(left)
            stopped_B = self._stopped(passes, scored, some)
            if stopped_B.any():
                spread_BCHW = reconstruction.variance_BCHW[torch.from_numpy(stopped_B)]
                parts.append(
                    self._score_rows(some.filter(pa.array(stopped_B)), scored.take(stopped_B), spread_BCHW, passes)
                )
                done.append(left[stopped_B])
            left = left[~stopped_B]
            if not len(left):
                break
            running.keep(torch.from_numpy(~stopped_B))
        table = pa.concat_tables(parts)
        return table.take(np.argsort(np.concatenate(done))) if done else table

    def _stages(self) -> list[int]:
        """Return after how many passes an image may stop; the last is all of them, whole rounds of masks."""
        model, score, stop = self.loaded.model, self._job.score, self._job.stop
        if score.scorer == "pasted_ms_ssim":
            return [score.passes]
        stages = stage_passes(model.num_patches, model.num_keep, score.passes)
        return stages if stop is None else [*(item.passes for item in stop.stages), stages[-1]]

    def _stopped(self, passes: int, scored: ScoreBatch, rows: pa.Table) -> NDArray[np.bool_]:
        stop, judge = self._job.stop, self._job.judge
        stage = next((item for item in stop.stages if item.passes == passes), None) if stop else None
        if stop is None or stage is None or judge is None:
            return np.ones(rows.num_rows, bool)
        return stop.stops(stage, scored.anomaly_score_B, _strata_of(rows, judge.columns))

    def _score_rows(self, rows: pa.Table, scored: ScoreBatch, variance_BCHW: Any, passes: int) -> pa.Table:
        assert self._job.judge is not None
        columns = map_columns(rows, scored.anomaly_map_BHW, variance_BCHW, self._job.regions)
        columns["passes_used"] = pa.repeat(pa.scalar(passes, pa.int32()), rows.num_rows)
        return _score_table(rows, scored, self._job.judge, self._job.fixed or {}, columns)

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

    def _images(self, rows: pa.Table) -> tuple[Any, Any]:
        """Return the images in [0, 1], and standardised as in training."""
        import torch

        scale = np.float32(2 ** rows["bits"][0].as_py() - 1)
        images_BHWC = pixels_to_array(rows).astype(np.float32) / scale
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous().to(self.device)
        return images_BCHW, (images_BCHW - self.loaded.info.pixel_mean) / self.loaded.info.pixel_std

    def _reconstruct(self, rows: pa.Table) -> tuple[Any, Any]:
        import torch

        from memmc.scoring.masks import predict

        model, info, uids = self.loaded.model, self.loaded.info, rows["sop_instance_uid"].to_pylist()
        images_BCHW, standardised_BCHW = self._images(rows)
        score = self._job.score
        with torch.inference_mode():
            reconstruction = predict(score.scorer, model, self.loaded.digest, uids, standardised_BCHW, score.passes)
        return images_BCHW, reconstruction.rescale(info.pixel_mean, info.pixel_std)


def _score_table(
    rows: pa.Table, scored: ScoreBatch, judge: Judge, fixed: dict[str, Any], maps: dict[str, pa.Array]
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


def _strata_of(rows: pa.Table, columns: Sequence[str]) -> list[str]:
    return stratum_names({name: rows[name].to_pylist() for name in columns}, rows.num_rows)


def _features_table(rows: pa.Table, features: Features, strata: Sequence[str], passes: int) -> pa.Table:
    count = len(features)
    return pa.table(
        {
            **{name: _whole(rows[name]) for name in KEY_COLUMNS},
            "stratum": pa.array(_strata_of(rows, strata), pa.string()),
            "passes": pa.repeat(pa.scalar(passes, pa.int32()), count),
            "vector": pa.array([row.astype("<f4").tobytes() for row in features.vectors_NF], pa.binary()),
            "maps": pa.array([row.astype("<f2").tobytes() for row in features.maps_NMHW], pa.binary()),
            "map_shape": pa.array([list(features.maps_NMHW.shape[1:])] * count, pa.list_(pa.int32())),
            "spread": pa.array(features.spread_N.astype(np.float32)),
            "image_size": pa.array([list(features.size)] * count, pa.list_(pa.int32())),
        }
    )


def _rows_per_batch(rows: pa.Table) -> int:
    """Return how many images of this shape may come to an actor at once."""
    size = max(1, len(rows["pixels"][0].as_py()))
    return max(1, _BATCH_BYTES // size)


def _whole(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
