"""The same image scores the same: to the bit when asked twice, to 1e-5 in another batch, order or number of threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from memmc.config import ModelConfig, ScoreConfig
from memmc.model.artifact import ModelInfo, export_model
from memmc.model.mae import MemMCMAE
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import join_features
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.maps import decode_map
from memmc.scoring.scorer import make_scorer
from memmc.scoring.strata import Judge, fit_strata

SIZE, COUNT, TOLERANCE = 32, 40, 1e-5
MODEL = ModelConfig(
    patch_size=8, encoder_dim=24, encoder_depth=2, encoder_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
)
INFO = ModelInfo(SIZE, 1, 0.5, 0.25, "a" * 16, "c1", 3, 100, 12.5, "b" * 16, 0)
FIXED = {"cohort": "c", "model": "m/1", "model_digest": "d", "dataset_version": 0, "preprocess_id": "p"}
SHARED = {**FIXED, "scorer": "s", "run": "r", "scored_at": None}


def images(count: int, seed: int) -> pa.Table:
    pixels = np.random.default_rng(seed).integers(0, 1 << 16, (count, SIZE, SIZE), dtype=np.uint16)
    uids = [f"2.25.{seed}{index:04d}" for index in range(count)]
    columns = {"sop_instance_uid": uids, "patient_key": uids, "study_uid": uids}
    shape = {"height": SIZE, "width": SIZE, "channels": 1, "bits": 16}
    return pa.table(
        {
            **columns,
            "pixels": pa.array([item.astype("<u2").tobytes() for item in pixels], pa.binary()),
            **{name: pa.array([value] * count, pa.int32()) for name, value in shape.items()},
        }
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.manual_seed(0)
    folder = Path(tmp_path_factory.mktemp("m"))
    export_model(folder / "m", MemMCMAE(MODEL, SIZE), INFO)
    return model_files(folder / "m")


def scoring_job(files: dict[str, bytes], scorer: str, **score: int) -> ScoringJob:
    settings = ScoreConfig.model_validate({"scorer": scorer, "num_actors": 1, "batch_size": 16, **score})
    features, keys = join_features([Reconstructor(ScoringJob(files, settings))(images(COUNT, 1))])
    fitted = fit_and_calibrate(make_scorer(settings), features, keys.patients)
    strata = fit_strata(fitted.normal_scores_N, keys.strata, keys.patients, (), 0.1, 20)
    state = fitted.scorer.state_to_bytes()
    return ScoringJob(files, settings, scorer_state=state, judge=Judge.of(0.1, (), strata), fixed=SHARED)


def run(job: ScoringJob, rows: pa.Table, batch: int = 16, threads: int = 1) -> dict[str, tuple[float, np.ndarray]]:
    """Score and map by UID, with so many images at once and so many threads."""
    score = job.score.model_copy(update={"batch_size": batch})
    before = torch.get_num_threads()
    actor = Reconstructor(ScoringJob(**{**vars(job), "score": score}))
    torch.set_num_threads(threads)
    try:
        scored = actor(rows).to_pylist()
    finally:
        torch.set_num_threads(before)
    return {
        row["sop_instance_uid"]: (row["anomaly_score"], decode_map(row["anomaly_map"], SIZE, SIZE)) for row in scored
    }


@pytest.mark.parametrize("scorer", ["residual_whole_or_peak", "residual_statistics", "residual_peak", "ms_ssim"])
def test_the_same_image_scores_the_same(files: dict[str, bytes], scorer: str) -> None:
    job, rows = scoring_job(files, scorer), images(COUNT, 2)
    first, again = run(job, rows), run(job, rows)
    assert all(first[uid][0] == again[uid][0] and np.array_equal(first[uid][1], again[uid][1]) for uid in first)
    order = np.random.default_rng(0).permutation(COUNT)
    others = [run(job, rows, batch=1), run(job, rows, batch=7), run(job, rows.take(order)), run(job, rows, threads=2)]
    for other in others:
        for uid, (score, map_HW) in first.items():
            assert other[uid][0] == pytest.approx(score, rel=TOLERANCE, abs=TOLERANCE)
            # Maps are kept as float16: a difference of 1e-5 may fall on either side of a rounding.
            np.testing.assert_allclose(other[uid][1], map_HW, rtol=2**-10, atol=TOLERANCE)


def test_another_uid_or_model_is_masked_otherwise(files: dict[str, bytes]) -> None:
    """The negative control: seeds come from the instance and the model, so these change the score."""
    job, rows = scoring_job(files, "ms_ssim"), images(4, 2)
    renamed = rows.set_column(0, "sop_instance_uid", pa.array([f"2.25.9{index}" for index in range(4)]))
    first, other = run(job, rows), run(job, renamed)
    assert all(abs(a[0] - b[0]) > TOLERANCE for a, b in zip(first.values(), other.values(), strict=True))


def test_the_batch_size_is_found_once_and_used(files: dict[str, bytes]) -> None:
    job = scoring_job(files, "l1", batch_size=0)
    actor = Reconstructor(job)
    scored = actor(images(COUNT, 2))
    assert scored.num_rows == COUNT and actor.batch_size >= 8
    found = actor.batch_size
    actor(images(3, 3))
    assert actor.batch_size == found
