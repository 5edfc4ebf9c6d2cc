"""Split-conformal p-values and thresholds, against their definition and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from memmc.errors import DataError, GateRefused
from memmc.scoring.calibration import (
    clopper_pearson,
    false_positive_interval,
    p_values,
    smallest_rate,
    threshold_at,
)

# Few distinct values, so that ties are common.
SCORES = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=60)
RATES = st.sampled_from([0.01, 0.05, 0.1, 0.2, 1 / 3, 0.5])


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES)
def test_p_value_equals_its_definition(normals: list[float], scores: list[float]) -> None:
    expected = [(1 + sum(n >= s for n in normals)) / (len(normals) + 1) for s in scores]
    np.testing.assert_allclose(p_values(scores, normals), expected)


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES, RATES)
def test_score_above_the_threshold_means_p_at_most_the_rate(
    normals: list[float], scores: list[float], rate: float
) -> None:
    if smallest_rate(len(normals)) > rate + 1e-12:
        with pytest.raises(GateRefused, match="held-out normal images cannot carry"):
            threshold_at(normals, rate)
        return
    threshold = threshold_at(normals, rate)
    flagged = np.array(scores) > threshold
    np.testing.assert_array_equal(flagged, p_values(scores, normals) <= rate + 1e-12)


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.001, 999)])
def test_the_rate_decides_how_many_normals_are_needed(rate: float, needed: int) -> None:
    scores = np.arange(needed, dtype=float)
    assert threshold_at(scores, rate) == needed - 1  # the highest normal: nothing below it will do
    with pytest.raises(GateRefused, match=f"at least {needed};"):
        threshold_at(scores[:-1], rate)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_bad_normal_scores_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError):
        p_values([0.5], bad)
    with pytest.raises(DataError):
        threshold_at(bad, 0.5)


def test_a_score_that_is_not_finite_has_no_p_value() -> None:
    with pytest.raises(DataError, match="1 scores are not finite"):
        p_values([0.5, math.nan], [0.0, 1.0])


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (50, 0.05), (150, 0.1)])
def test_observed_rate_on_exchangeable_data_is_at_most_the_nominal_one(count: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(2000):
        draw = rng.gamma(2.0, size=count + 100)
        rates.append(np.mean(draw[count:] > threshold_at(draw[:count], rate)))
    standard_error = np.std(rates) / math.sqrt(len(rates))
    exact = math.floor((count + 1) * rate + 1e-9) / (count + 1)
    assert np.mean(rates) <= rate + 3 * standard_error
    assert np.mean(rates) == pytest.approx(exact, abs=4 * standard_error)  # and not needlessly low


def test_ties_only_lower_the_rate() -> None:
    rng = np.random.default_rng(1)
    rates = []
    for _ in range(500):
        draw = rng.integers(0, 8, size=200).astype(float)
        rates.append(np.mean(draw[100:] > threshold_at(draw[:100], 0.1)))
    assert np.mean(rates) <= 0.1


def test_true_rate_lies_in_the_interval_in_95_percent_of_resamplings() -> None:
    rng = np.random.default_rng(2)
    low, high = false_positive_interval(100, 0.05)
    true_rates = np.array([stats.norm.sf(threshold_at(rng.standard_normal(100), 0.05)) for _ in range(2000)])
    inside = np.mean((true_rates >= low) & (true_rates <= high))
    assert 0.93 <= inside <= 0.97
    assert low < 0.05 < high


def test_clopper_pearson_covers_in_at_least_95_percent_of_200_resamplings() -> None:
    rng = np.random.default_rng(3)
    successes = rng.binomial(150, 0.05, size=200)
    intervals = [clopper_pearson(int(k), 150) for k in successes]
    assert np.mean([low <= 0.05 <= high for low, high in intervals]) >= 0.95


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 20), (20, 20)])
def test_clopper_pearson_equals_scipy(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(successes, trials) == pytest.approx((expected.low, expected.high))


def test_clopper_pearson_refuses_impossible_counts() -> None:
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(DataError):
            clopper_pearson(successes, trials)
