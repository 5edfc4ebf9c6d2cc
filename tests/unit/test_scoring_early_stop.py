"""Early stop keeps its bound and its p-values, and an image's score is that of the passes it had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
import torch
from test_scoring_determinism import COUNT, SHARED, TOLERANCE, files, images, run  # noqa: F401  (files is a fixture)

from memmc.config import ScoreConfig, ScorerName, load_config
from memmc.errors import ConfigError, GateRefused
from memmc.lake.schemas import CALIBRATIONS, SCHEMAS
from memmc.scoring.actor import Reconstructor, ScoringJob
from memmc.scoring.bulk import join_features
from memmc.scoring.calibration import p_values, threshold_at
from memmc.scoring.cross_fit import CrossFit, fit_and_calibrate
from memmc.scoring.early_stop import Stage, StopRule, fit_early_stop, stage_passes
from memmc.scoring.masks import RunningReconstruction, complementary_groups, reconstruct
from memmc.scoring.scorer import SimilarityScorer, make_scorer, scorer_from_bytes
from memmc.scoring.similarity import l1
from memmc.scoring.strata import POOLED, Judge, fit_strata

RATE, BOUND = 0.1, 0.04


def fit(scores: np.ndarray) -> CrossFit:
    return CrossFit(SimilarityScorer("l1", l1), scores, 1.0, 10 * scores)


def drawn(rng: np.random.Generator, count: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores after 2, 4 and 8 passes: each is the next one, disturbed."""
    final = np.exp(0.3 * rng.standard_normal(count))
    middle = final * np.exp(noise * rng.standard_normal(count))
    return middle * np.exp(noise * rng.standard_normal(count)), middle, final


def calibrated(rng: np.random.Generator, count: int = 400, noise: float = 0.04) -> tuple[StopRule, CrossFit, CrossFit]:
    first, middle, final = drawn(rng, count, noise)
    whole = fit(final)
    thresholds = {POOLED: threshold_at(final, RATE)}
    return *fit_early_stop({2: fit(first), 4: fit(middle)}, whole, [POOLED] * count, thresholds, BOUND), whole


def judged(rule: StopRule, first: np.ndarray, middle: np.ndarray, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores by the rule, and the passes used."""
    strata = [POOLED] * len(final)
    early, late = (rule.stops(stage, s, strata) for stage, s in zip(rule.stages, (first, middle), strict=True))
    return np.where(early, first, np.where(late, middle, final)), np.where(early, 2, np.where(late, 4, 8))


def test_stages_are_halves_that_have_hidden_every_patch():
    assert stage_passes(64, 16, 4) == [2, 4]
    assert stage_passes(64, 16, 15) == [2, 4, 8, 16]
    assert stage_passes(64, 32, 3) == [2, 4]
    assert stage_passes(64, 48, 8) == [4, 8]  # three of four shown: two passes share patches that both show
    for keep, passes in ((16, 2), (32, 2), (48, 4)):
        groups = complementary_groups(64, keep, [b"any"])[:passes]
        assert all((groups == patch).any(1).sum() < passes for patch in range(64)), keep


def test_new_normals_keep_their_verdict_but_for_the_bound_and_most_stop_early():
    rng = np.random.default_rng(0)
    changed, loose, used = [], [], []
    for _ in range(40):
        rule, _, _ = calibrated(rng)
        new = drawn(rng, 2_000, 0.04)
        limit = rule.thresholds[POOLED]
        scores, passes = judged(rule, *new)
        changed.append(((scores > limit) != (new[2] > limit)).mean())
        used.append(passes.mean())
        bare = replace(rule, stages=tuple(replace(stage, low=1.0, high=1.0) for stage in rule.stages))
        loose.append(((judged(bare, *new)[0] > limit) != (new[2] > limit)).mean())
    assert np.mean(changed) <= BOUND and np.mean(changed) < 0.2 * np.mean(loose)
    assert np.mean(used) < 4
    noisy = [judged(calibrated(rng, noise=0.5)[0], *drawn(rng, 500, 0.5)) for _ in range(5)]
    assert np.mean([passes.mean() for _, passes in noisy]) > 6  # where a pass says little, images get them all


def test_thresholds_and_verdicts_of_the_held_out_normals_stay():
    rng = np.random.default_rng(1)
    for _ in range(20):
        rule, fitted, whole = calibrated(rng, 150)
        limit = threshold_at(whole.normal_scores_N, RATE)
        assert threshold_at(fitted.normal_scores_N, RATE) == limit == rule.thresholds[POOLED]
        np.testing.assert_array_equal(fitted.normal_scores_N > limit, whole.normal_scores_N > limit)
        early = fitted.normal_scores_N != whole.normal_scores_N
        assert early.any()
        np.testing.assert_array_equal(fitted.normal_peaks_N, 10 * fitted.normal_scores_N)


def test_p_values_of_the_rule_are_valid_and_those_of_all_passes_are_not_for_its_scores():
    """The negative control: a stage that scores higher is unlike the scores of all passes."""
    rng = np.random.default_rng(2)
    same, mixed = [], []
    for _ in range(60):
        count = 300
        final = np.exp(0.3 * rng.standard_normal(count))
        rule, fitted = fit_early_stop(
            {2: fit(1.2 * final)}, fit(final), [POOLED] * count, {POOLED: threshold_at(final, RATE)}, BOUND
        )
        new = np.exp(0.3 * rng.standard_normal(500))
        scores = np.where(rule.stops(rule.stages[0], 1.2 * new, [POOLED] * 500), 1.2 * new, new)
        same.append((p_values(scores, fitted.normal_scores_N) <= 0.3).mean())
        mixed.append((p_values(scores, final) <= 0.3).mean())
    assert np.mean(same) <= 0.3 + 0.01 < np.mean(mixed)


def test_an_image_is_kept_from_its_strata_and_the_pooled_threshold():
    rule = StopRule(0.1, {POOLED: 1.0, "a": 2.0}, (Stage(2, 0.9, 1.1, b""),))
    scores = np.array([0.5, 1.0, 1.5, 1.95, 3.0])
    assert rule.stops(rule.stages[0], scores, ["a"] * 5).tolist() == [True, False, True, False, True]
    assert rule.stops(rule.stages[0], scores, ["b"] * 5).tolist() == [True, False, True, True, True]


def test_too_few_normals_and_the_papers_mode_are_refused():
    with pytest.raises(GateRefused, match="expected at least 99"):
        calibrated(np.random.default_rng(3), 98)
    assert calibrated(np.random.default_rng(3), 99)
    with pytest.raises(ConfigError, match="complementary masks"):
        load_config(overrides=["score.early_stop=0.02", "score.scorer=pasted_ms_ssim"])


def test_a_rule_comes_back_from_the_table():
    rule, _, _ = calibrated(np.random.default_rng(4))
    column = pa.array([rule.as_row(), None], SCHEMAS[CALIBRATIONS].field("early_stop").type)
    assert StopRule.from_row(column[0].as_py()) == rule
    assert StopRule.from_row(column[1].as_py()) is None
    assert rule.scorer_state(2, b"all") == rule.stages[0].scorer_state
    assert rule.scorer_state(8, b"all") == rule.scorer_state(None, b"all") == b"all"


def staged_job(model_files: dict[str, bytes], scorer: ScorerName = "residual_whole_or_peak") -> ScoringJob:
    """Calibrated on random images with stages of 2, 4 and 8 passes; its bands are set so that some images stop."""
    settings = ScoreConfig(scorer=scorer, num_actors=2, batch_size=16, passes=8)
    features = Reconstructor(ScoringJob(model_files, settings, each_stage=True))(images(COUNT, 1))
    fits, keys = {}, None
    for passes in (2, 4, 8):
        part, keys = join_features([features.filter(pa.compute.equal(features["passes"], passes))])
        fits[passes] = fit_and_calibrate(make_scorer(settings), part, keys.patients)
    assert keys is not None
    final = fits.pop(8)
    limit = threshold_at(final.normal_scores_N, 0.1)
    rule, fitted = fit_early_stop(fits, final, keys.strata, {POOLED: limit}, 0.2)
    bands = ((0.9, 1.1), (0.97, 1.03))
    stages = [replace(stage, low=low, high=high) for stage, (low, high) in zip(rule.stages, bands, strict=True)]
    rule = replace(rule, stages=tuple(stages))
    judge = Judge.of(0.1, (), fit_strata(fitted.normal_scores_N, keys.strata, keys.patients, (), 0.1, 20))
    state = final.scorer.state_to_bytes()
    return ScoringJob(model_files, settings, scorer_state=state, judge=judge, fixed=SHARED, stop=rule)


@pytest.mark.parametrize(
    ("scorer", "tolerance"),
    # Features are kept with maps in float16, and scores come from float32: only the distance is the same to the bit.
    [("residual_statistics", TOLERANCE), ("residual_whole_or_peak", 2**-11)],
)
def test_a_score_is_that_of_the_passes_it_had(files: dict[str, bytes], scorer: ScorerName, tolerance: float):  # noqa: F811
    job, rows = staged_job(files, scorer), images(COUNT, 2)
    assert job.stop is not None
    scored = Reconstructor(job)(rows)
    assert scored["sop_instance_uid"].to_pylist() == rows["sop_instance_uid"].to_pylist()
    used = np.array(scored["passes_used"])
    assert set(used) == {2, 4, 8}
    assert job.scorer_state is not None
    features = Reconstructor(replace(job, judge=None, stop=None, each_stage=True))(rows)
    for passes in (2, 4, 8):
        state = job.stop.scorer_state(passes, job.scorer_state)
        part, _ = join_features([features.filter(pa.compute.equal(features["passes"], passes))])
        alone = scorer_from_bytes(state).score_features(part)
        mine = used == passes
        np.testing.assert_allclose(np.array(scored["anomaly_score"])[mine], alone.anomaly_score_B[mine], rtol=tolerance)
    again = run(job, rows.take(np.random.default_rng(0).permutation(COUNT)), batch=5)
    for uid, score in zip(scored["sop_instance_uid"].to_pylist(), scored["anomaly_score"].to_pylist(), strict=True):
        assert again[uid][0] == pytest.approx(score, rel=TOLERANCE)


def test_without_a_rule_every_image_has_all_passes(files: dict[str, bytes]):  # noqa: F811
    job = replace(staged_job(files), stop=None)
    assert set(Reconstructor(job)(images(8, 2))["passes_used"].to_pylist()) == {8}


def test_passes_added_one_by_one_to_some_images_are_those_of_all_at_once(files: dict[str, bytes]):  # noqa: F811
    model = Reconstructor(ScoringJob(files, ScoreConfig(num_actors=1))).loaded.model
    batch = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.stack([complementary_groups(16, 4, [bytes([i])]) for i in range(5)])
    running = RunningReconstruction(model, batch)
    running.add(ids[:, :2])
    kept = torch.tensor([True, False, True, False, True])
    running.keep(kept)
    running.add(ids[kept, 2:3])
    running.add(ids[kept, 3:])
    found, wanted = running.result(), reconstruct(model, batch, ids)
    for name in ("mean_BCHW", "variance_BCHW", "count_BL"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name)[kept], rtol=1e-5, atol=1e-6)
