"""Regions of maps: calm on normals, whole on lesions, readable by other tools."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import scored_model
import torch
from scipy.ndimage import gaussian_filter

from memmc.config import ScoreConfig
from memmc.lake.schemas import SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.scoring.actor import Reconstructor, ScoringJob, complete
from memmc.scoring.bulk import score_columns
from memmc.scoring.calibration import threshold_at
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.maps import decode_map
from memmc.scoring.regions import RegionJudge, map_columns, region_judge
from memmc.scoring.scorer import Features, make_scorer


def normal_maps(count: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(count, 32, 32))
    return np.abs(gaussian_filter(noise, (0, 2, 2))).astype(np.float16)


def judge_of_normals(maps: np.ndarray, rate: float = 0.05) -> RegionJudge:
    peaks = maps.max((1, 2)).astype(np.float64)
    return RegionJudge(threshold_at(peaks, rate), tuple(peaks), "stretch")


def test_ninety_five_of_a_hundred_normals_show_nothing() -> None:
    shares = []
    for seed in range(20):
        judge = judge_of_normals(normal_maps(99, seed))
        fresh = normal_maps(100, 1000 + seed)
        shares.append(np.mean([bool(judge.of_map(item, None, None)) for item in fresh]))
    assert np.mean(shares) <= 0.05 + 2 * np.std(shares) / np.sqrt(20)
    assert np.mean(shares) > 0.02  # nor is the level out of reach
    eager = RegionJudge(judge.level / 2, judge.normal_peaks)
    assert np.mean([bool(eager.of_map(item, None, None)) for item in fresh]) > 0.5


def test_the_same_holds_for_the_maps_of_a_fitted_scorer() -> None:
    """The level rests on out-of-fold maps: those of new normals, not of normals the fit has seen."""
    rng = np.random.default_rng(0)

    def features(count: int) -> Features:
        maps = gaussian_filter(rng.normal(size=(count, 2, 16, 16)), (0, 0, 1, 1)).astype(np.float32)
        return Features(rng.normal(size=(count, 12)).astype(np.float32), maps, np.zeros(count, np.float32), (16, 16))

    shares = []
    for seed in range(8):
        fitted = fit_and_calibrate(make_scorer(ScoreConfig()), features(99), [str(i) for i in range(99)], 20, seed)
        judge = RegionJudge(threshold_at(fitted.normal_peaks_N, 0.05), tuple(fitted.normal_peaks_N))
        maps = fitted.scorer.score_features(features(100)).anomaly_map_BHW
        shares.append(np.mean([bool(judge.of_map(item, None, None)) for item in maps]))
    assert np.mean(shares) <= 0.05 + 2 * np.std(shares) / np.sqrt(8) + 0.01


def test_a_lesion_is_one_region_with_its_box_area_peak_and_p_value() -> None:
    judge = judge_of_normals(normal_maps(99, 0))
    anomaly_map = normal_maps(1, 5)[0].astype(np.float32)
    anomaly_map[4:10, 20:28] = 5.0
    anomaly_map[6, 22] = 7.0
    (region,) = judge.of_map(anomaly_map, 320, 640)
    assert (region["x_px"], region["y_px"], region["width_px"], region["height_px"]) == (20, 4, 8, 6)
    assert region["area_px"] == 48
    assert region["peak"] == 7.0
    assert region["p_value"] == pytest.approx(1 / 100)
    assert region["image_x_px"] == 400.0
    assert region["image_height_px"] == 60.0
    unknown = RegionJudge(judge.level, judge.normal_peaks).of_map(anomaly_map, 320, 640)
    assert "image_x_px" not in unknown[0]


def test_a_value_at_the_level_is_calm() -> None:
    judge = RegionJudge(2.0, (1.0, 2.0))
    assert judge.of_map(np.full((4, 4), 2.0), None, None) == []
    assert len(judge.of_map(np.full((4, 4), 2.01), None, None)) == 1


def test_a_calibration_from_before_levels_has_no_judge() -> None:
    assert region_judge({"map_level": None, "normal_peaks": None}, "pad") is None
    assert region_judge({"map_level": 1.0, "normal_peaks": [0.5]}, "pad") == RegionJudge(1.0, (0.5,), "pad")


def test_score_rows_carry_regions_and_uncertainty_and_open_in_other_tools(tmp_path) -> None:
    maps = normal_maps(2, 0).astype(np.float32)
    maps[1, 3:6, 3:6] = 9.0
    variance = torch.rand(2, 1, 32, 32) ** 2
    rows = pa.table({"rows": [64, 64], "columns": [64, 64]})
    columns = map_columns(rows, maps, variance, judge_of_normals(normal_maps(99, 1)))
    deviation = decode_map(columns["uncertainty_map"][1].as_py(), 32, 32)
    np.testing.assert_allclose(deviation, variance[1, 0].sqrt().numpy(), atol=1e-3)
    fixed = {"cohort": "c", "model": "m/1", "model_digest": "d", "dataset_version": 1, "preprocess_id": "p"}
    fixed |= {"scorer": "l1", "run": "r", "scored_at": pa.scalar(0, pa.timestamp("us", tz="UTC")).as_py()}
    columns |= {"sop_instance_uid": pa.array(["u0", "u1"]), "patient_key": pa.array(["k0", "k1"])}
    lake = Lake(tmp_path)
    lake.append(SCORES, complete(columns, 2, fixed))
    stored = lake.read(SCORES, ["sop_instance_uid", "patient_key", "regions"]).to_pylist()
    assert stored[0]["regions"] == []
    assert stored[1]["regions"][0]["image_width_px"] == 6.0
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    query = "SELECT sop_instance_uid, unnest(regions, recursive := true) FROM read_parquet(?)"
    found = duckdb.execute(query, [str(tmp_path / "scores" / "**" / "*.parquet")]).fetchall()
    assert [row[:5] for row in found] == [("u1", 3, 3, 3, 3)]


def test_an_actor_writes_the_uncertainty_of_its_passes() -> None:
    """Through the scoring actor, on a model: the spread of a row is the root mean square of its map."""
    import tempfile
    from pathlib import Path

    from memmc.model.artifact import export_model
    from memmc.scoring.actor import model_files
    from memmc.scoring.strata import judge_of

    loaded, stored = scored_model.model(), scored_model.pixels(24)
    judged = scored_model.calibrated(loaded, stored)
    with tempfile.TemporaryDirectory() as folder:
        export_model(folder, loaded.model, loaded.info)
        files = model_files(Path(folder))
    calibration = {"threshold": judged.threshold, "normal_scores": list(judged.normal_scores), "strata": None}
    calibration |= {"false_positive_rate": 0.5, "strata_columns": None}
    job = ScoringJob(
        files,
        ScoreConfig(batch_size=4, num_actors=2),
        scorer_state=judged.scorer.state_to_bytes(),
        judge=judge_of(calibration),
        fixed=dict.fromkeys(("cohort", "model", "model_digest", "preprocess_id", "scorer", "run"), "x")
        | {"dataset_version": 1, "scored_at": pa.scalar(0, pa.timestamp("us", tz="UTC")).as_py()},
        regions=RegionJudge(0.0, (1.0,), "stretch"),
    )
    columns = {name: [f"{name}{i}" for i in range(5)] for name in ("sop_instance_uid", "patient_key", "study_uid")}
    columns |= {"pixels": [item.tobytes() for item in stored[:5]], "height": [32] * 5, "width": [32] * 5}
    columns |= {"channels": [1] * 5, "bits": [16] * 5, "rows": [320] * 5, "columns": [320] * 5}
    table = pa.table({name: columns[name] for name in score_columns()})
    result = Reconstructor(job)(table)
    assert result.schema == SCHEMAS[SCORES]
    for row in result.to_pylist():
        deviation = decode_map(row["uncertainty_map"], 32, 32)
        assert np.sqrt((deviation**2).mean()) == pytest.approx(row["score_spread"], rel=1e-2)
        assert row["regions"][0]["image_width_px"] <= 320
