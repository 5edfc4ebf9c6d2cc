"""One interface for every scorer: scores, maps, state, cross-fit."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.config import ScoreConfig, ScorerName
from memmc.errors import DataError, IntegrityError, MemmcError, UsageError
from memmc.scoring.calibration import threshold_at
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.masks import PastedReconstruction
from memmc.scoring.scorer import Features, ResidualStatisticsScorer, Scorer, make_scorer, scorer_from_bytes

SCORERS = get_args(ScorerName)


def cases(count: int, seed: int, lesion: float = 0.0, size: int = 64) -> tuple[torch.Tensor, PastedReconstruction]:
    """Textured images; the reconstruction misses their noise, and a square of strength `lesion`."""
    generator = torch.Generator().manual_seed(seed)
    texture = torch.rand(count, 1, size // 4, size // 4, generator=generator)
    expected = 0.2 + 0.4 * torch.nn.functional.interpolate(texture, size=size, mode="bilinear")
    images = expected + 0.01 * torch.randn(count, 1, size, size, generator=generator)
    box = (..., slice(size // 2, 3 * size // 4), slice(size // 8, size // 2))
    images[box] += lesion * torch.randn(images[box].shape, generator=generator) + lesion
    variance = torch.full_like(expected, 0.01**2)
    passes = torch.stack([expected, expected])
    return images, PastedReconstruction(expected, variance, torch.full((count, 16), 3), passes)


def scorer_of(name: str) -> Scorer:
    return make_scorer(ScoreConfig.model_validate({"scorer": name}))


def features_of(scorer: Scorer, count: int, seed: int, lesion: float = 0.0) -> Features:
    return scorer.features(*cases(count, seed, lesion))


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_ranks_a_lesion_above_normals_and_shows_it(name: str) -> None:
    scorer = scorer_of(name)
    fitted = scorer.fit(features_of(scorer, 40, 0))
    normal, lesion = fitted.score(*cases(20, 1)), fitted.score(*cases(20, 2, lesion=0.3))
    assert normal.anomaly_score_B.shape == (20,)
    assert normal.anomaly_map_BHW.shape == (20, 64, 64)
    assert (normal.anomaly_map_BHW >= 0).all()
    assert lesion.anomaly_score_B.min() > normal.anomaly_score_B.max()
    np.testing.assert_allclose(normal.spread_B, 0.01, rtol=1e-3)
    inside = lesion.anomaly_map_BHW[:, 32:48, 8:32].mean()
    assert inside > 2 * lesion.anomaly_map_BHW[:, :16, 40:].mean()


@pytest.mark.parametrize("name", SCORERS)
def test_state_survives_bytes(name: str) -> None:
    scorer = scorer_of(name)
    fitted = scorer.fit(features_of(scorer, 30, 0))
    data = fitted.state_to_bytes()
    back = scorer_from_bytes(data)
    assert back.name == name
    first, second = fitted.score(*cases(3, 1, 0.1)), back.score(*cases(3, 1, 0.1))
    np.testing.assert_array_equal(first.anomaly_score_B, second.anomaly_score_B)
    np.testing.assert_array_equal(first.anomaly_map_BHW, second.anomaly_map_BHW)
    assert back.state_to_bytes() == data


@pytest.mark.parametrize("name", SCORERS)
def test_score_does_not_depend_on_the_batch(name: str) -> None:
    scorer = scorer_of(name)
    fitted = scorer.fit(features_of(scorer, 30, 0))
    images, expected = cases(6, 3, 0.1)
    whole = fitted.score(images, expected).anomaly_score_B
    mine = (expected.mean_BCHW[4:5], expected.variance_BCHW[4:5], expected.count_BL[4:5])
    one = PastedReconstruction(*mine, expected.pasted_PBCHW[:, 4:5])
    np.testing.assert_allclose(fitted.score(images[4:5], one).anomaly_score_B[0], whole[4], rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_state_is_an_error_of_ours_or_a_scorer(data: st.DataObject) -> None:
    scorer = scorer_of("residual_statistics")
    state = bytearray(scorer.fit(features_of(scorer, 10, 0)).state_to_bytes())
    state[data.draw(st.integers(0, 1000))] ^= data.draw(st.integers(1, 255))
    try:
        assert isinstance(scorer_from_bytes(bytes(state)), Scorer)
    except MemmcError as error:
        assert isinstance(error, IntegrityError)


@pytest.mark.parametrize("data", [b"", b"not safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_bytes_that_are_no_state_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="calibrate again"):
        scorer_from_bytes(data)


def test_residual_statistics_without_a_fit_are_refused() -> None:
    scorer = scorer_of("residual_statistics")
    with pytest.raises(UsageError, match="not fitted"):
        scorer.score(*cases(1, 0))
    with pytest.raises(UsageError, match="not fitted"):
        scorer.state_to_bytes()


def test_features_join_and_take() -> None:
    scorer = scorer_of("ssim")
    parts = [features_of(scorer, 3, 0), features_of(scorer, 2, 1)]
    joined = Features.join(parts)
    assert len(joined) == 5
    np.testing.assert_array_equal(joined.take(np.array([3, 4])).maps_NMHW, parts[1].maps_NMHW)
    with pytest.raises(DataError, match="at least one"):
        Features.join([])
    with pytest.raises(DataError, match="different sizes"):
        Features.join([parts[0], scorer.features(*cases(1, 0, size=32))])


def test_features_of_a_large_image_stay_small() -> None:
    scorer = scorer_of("residual_statistics")
    features = scorer.features(*cases(1, 0, size=224))
    assert features.vectors_NF.nbytes + features.maps_NMHW.nbytes < 190_000
    fitted = scorer.fit(scorer.features(*cases(12, 1, size=224)))
    assert fitted.score_features(features).anomaly_map_BHW.shape == (1, 224, 224)


def gaussian_features(count: int, seed: int) -> Features:
    """Vectors of 10 patterns and noise, one image per patient; the same population for every seed."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(10, 60))
    vectors = rng.normal(size=(count, 10)) @ mixing + rng.normal(size=(count, 60))
    maps = rng.random((count, 1, 4, 4)).astype(np.float16)
    return Features(vectors.astype(np.float32), maps, np.zeros(count, np.float32), (4, 4))


def test_the_promised_rate_holds_out_of_fold_and_would_not_in_sample() -> None:
    scorer, rate = scorer_of("residual_statistics"), 0.1
    out_of_fold, in_sample = [], []
    for seed in range(40):
        normals, fresh = gaussian_features(79, seed), gaussian_features(200, 1000 + seed)
        result = fit_and_calibrate(scorer, normals, [str(i) for i in range(79)], seed=seed)
        scores = result.scorer.score_features(fresh).anomaly_score_B
        own = result.scorer.score_features(normals).anomaly_score_B
        out_of_fold.append(np.mean(scores > threshold_at(result.normal_scores_N, rate)))
        in_sample.append(np.mean(scores > threshold_at(own, rate)))
    assert 0.03 < np.mean(out_of_fold) <= rate + 2 * np.std(out_of_fold) / np.sqrt(40)
    assert np.mean(in_sample) > 1.5 * rate


def test_a_patient_is_never_in_the_fit_that_scores_it() -> None:
    scorer, normals = scorer_of("residual_statistics"), gaussian_features(60, 0)
    normals.vectors_NF[:3, :30] += 100.0  # one patient's three images, alike and far from all others
    patients = [f"p{i // 3}" for i in range(60)]
    alone = fit_and_calibrate(scorer, normals, patients, folds=20).normal_scores_N
    assert alone[:3].min() > 3 * np.median(alone[3:])
    spread_out = [str(i) for i in range(60)]  # were they different patients, they would excuse each other
    excused = fit_and_calibrate(scorer, normals, spread_out, folds=60).normal_scores_N
    assert excused[:3].max() < alone[:3].min()


def test_cross_fit_is_the_same_in_any_order() -> None:
    scorer = scorer_of("residual_statistics")
    normals = features_of(scorer, 40, 0)
    patients = [f"p{i // 2}" for i in range(40)]
    order = np.random.default_rng(0).permutation(40)
    straight = fit_and_calibrate(scorer, normals, patients).normal_scores_N
    shuffled = fit_and_calibrate(scorer, normals.take(order), [patients[i] for i in order]).normal_scores_N
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-6)


def test_a_scorer_without_fit_calibrates_on_its_own_scores() -> None:
    scorer = scorer_of("l1")
    normals = features_of(scorer, 10, 0)
    result = fit_and_calibrate(scorer, normals, [str(i) for i in range(10)])
    np.testing.assert_allclose(result.normal_scores_N, normals.vectors_NF[:, 0])


def test_unusable_normals_are_refused() -> None:
    scorer = scorer_of("l1")
    with pytest.raises(DataError, match="9 patient keys for 10 images"):
        fit_and_calibrate(scorer, features_of(scorer, 10, 0), ["p"] * 9)
    with pytest.raises(DataError, match="1 normal patients"):
        fit_and_calibrate(scorer, features_of(scorer, 10, 0), ["p"] * 10)


def test_the_peak_finds_one_place_that_the_whole_image_does_not_show():
    rng = np.random.default_rng(0)
    maps = rng.normal(0, 1, (120, 2, 16, 16)).astype(np.float16)
    vectors = rng.normal(0, 1, (120, 6)).astype(np.float32)
    features = Features(vectors, maps, np.zeros(120, np.float32), (16, 16))
    fitted = make_scorer(ScoreConfig(scorer="residual_peak")).fit(features.take(np.arange(100)))
    changed = maps[100:].copy()
    changed[:10, :, 5:7, 8:10] += 8
    batch = fitted.score_features(Features(vectors[100:], changed, np.zeros(20, np.float32), (16, 16)))
    assert batch.anomaly_score_B[:10].min() > batch.anomaly_score_B[10:].max()
    again = scorer_from_bytes(fitted.state_to_bytes())
    assert again.name == "residual_peak"
    assert np.array_equal(
        again.score_features(features).anomaly_score_B, fitted.score_features(features).anomaly_score_B
    )


def test_the_default_finds_what_changes_the_whole_or_one_place():
    rng = np.random.default_rng(1)
    vectors = rng.normal(0, 1, (140, 6)).astype(np.float32)
    maps = rng.normal(0, 1, (140, 2, 16, 16)).astype(np.float32)
    vectors[100:110] += 3
    maps[110:120, :, 5:7, 8:10] += 8
    features = Features(vectors, maps, np.zeros(140, np.float32), (16, 16))
    normals, others = features.take(np.arange(100)), features.take(np.arange(100, 140))
    both = make_scorer(ScoreConfig()).fit(normals)
    assert isinstance(both, ResidualStatisticsScorer) and both.name == "residual_whole_or_peak"
    score_B = both.score_features(others).anomaly_score_B
    assert score_B[:20].min() > score_B[20:].max()
    for alone, missed in (("residual_statistics", slice(10, 20)), ("residual_peak", slice(0, 10))):
        fitted = make_scorer(ScoreConfig.model_validate({"scorer": alone})).fit(normals)
        alone_B = fitted.score_features(others).anomaly_score_B
        assert np.median(alone_B[missed]) < alone_B[20:].max()
    whole_B, peak_B, _ = both.parts(others)
    np.testing.assert_array_equal(score_B, np.maximum(whole_B, peak_B))
    assert (peak_B > whole_B)[10:20].all() and not (peak_B > whole_B)[:10].any()
    assert (peak_B > whole_B)[20:].mean() < 0.5, "where nothing is odd, the whole image decides"


def test_peaks_have_one_scale_in_all_folds():
    scorer = scorer_of("residual_whole_or_peak")
    normals = features_of(scorer, 40, 0)
    prepared = scorer.prepare(normals)
    assert prepared.prepare(normals.take(np.arange(20))) is prepared
    assert isinstance(prepared, ResidualStatisticsScorer)
    fitted = fit_and_calibrate(scorer, normals, [f"p{number}" for number in range(40)]).scorer
    assert isinstance(fitted, ResidualStatisticsScorer) and fitted.peak_scale == prepared.peak_scale
    with pytest.raises(DataError, match="9 normal images to fit the score; expected at least 10"):
        scorer.fit(normals.take(np.arange(9)))
