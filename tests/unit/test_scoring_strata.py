"""Thresholds per stratum: right where there are enough normals, pooled and said so where there are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.errors import GateRefused
from memmc.scoring.calibration import observed_rate_interval, threshold_at
from memmc.scoring.strata import POOLED, Judge, Stratum, fit_strata, judge_of, stratum_names

RATES = (0.01, 0.05, 0.10)


def fitted(num_a: int, num_b: int, shift: float = 0.0, seed: int = 0, rate: float = 0.05, least: int = 20):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.gamma(4.0, size=num_a), rng.gamma(4.0, size=num_b) + shift])
    names = ["x=A"] * num_a + ["x=B"] * num_b
    return fit_strata(scores, names, [f"p{i}" for i in range(len(names))], RATES, rate, least)


def test_names_come_from_columns_and_absence_is_a_value():
    names = stratum_names({"manufacturer": ["A", None], "view_position": ["PA", "AP"]}, 2)
    assert names == ["manufacturer=A;view_position=PA", "manufacturer=UNKNOWN;view_position=AP"]
    assert stratum_names({}, 2) == [POOLED, POOLED]


def test_pooled_comes_first_and_holds_all_rates_with_intervals():
    pooled, a, b = fitted(150, 50)
    assert (pooled.stratum, pooled.num_normals, pooled.num_patients) == (POOLED, 200, 200)
    assert [item.rate for item in pooled.thresholds] == list(RATES)
    for item in pooled.thresholds:
        assert item.threshold == threshold_at(pooled.normal_scores, item.rate)
        assert item.low is not None and item.high is not None and item.low < item.rate < item.high
    assert a.refused is None and b.refused is None
    assert b.thresholds[0].threshold is None and "50 held-out normal images" in str(b.thresholds[0].refused)


def test_a_small_stratum_is_refused_and_judged_by_the_pooled_normals():
    strata = fitted(150, 19, shift=10.0)
    assert [item.refused is None for item in strata] == [True, True, False]
    assert "19 held-out normal images, 20 are needed" in str(strata[2].refused)
    verdicts = Judge.of(0.05, ["x"], strata).judge([5.0, 5.0, 5.0], ["x=A", "x=B", "x=new"])
    assert verdicts.stratum_B == ["x=A", POOLED, POOLED]
    with pytest.raises(GateRefused, match="cannot carry"):
        fitted(5, 5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1]))
def test_a_verdict_is_a_p_value_at_most_the_rate_in_whatever_stratum(seed: int, rate: float):
    judge = Judge.of(rate, ["x"], fitted(60, 40, 2.0, seed, rate))
    scores = np.random.default_rng(seed).gamma(4.0, size=50)
    verdicts = judge.judge(scores, ["x=A", "x=B", "x=C", "x=A", "x=B"] * 10)
    np.testing.assert_array_equal(verdicts.is_abnormal_B, verdicts.p_value_B <= rate + 1e-12)


def test_strata_survive_the_table():
    strata = fitted(60, 10)
    assert [Stratum.from_row(item.as_row()) for item in strata] == strata
    row = {"false_positive_rate": 0.05, "strata_columns": ["x"], "strata": [item.as_row() for item in strata]}
    assert judge_of(row) == Judge.of(0.05, ["x"], strata)
    before_strata = {"false_positive_rate": 0.05, "strata_columns": None, "strata": None, "normal_scores": [1.0] * 20}
    assert judge_of(before_strata).judge([2.0], ["x=A"]).stratum_B == [POOLED]


@pytest.mark.parametrize("rate", RATES)
def test_observed_rate_lies_in_its_interval_in_95_percent_of_resamplings(rate: float):
    rng, inside = np.random.default_rng(7), []
    low, high = observed_rate_interval(300, rate, 400)
    for _ in range(3000):
        scores = rng.standard_normal(700)
        observed = float(np.mean(scores[300:] > threshold_at(scores[:300], rate)))
        inside.append(low <= observed <= high)
    tolerance = 3 * np.sqrt(0.95 * 0.05 / 3000)
    assert 0.95 - tolerance <= np.mean(inside) <= 0.98 + tolerance  # what is promised, and not by being wide


def test_a_planted_scanner_shift_breaks_the_pooled_threshold_and_not_the_stratum_s():
    """Scanner B's normals score higher: pooled, it gets most of the false alarms and A hardly any."""
    strata = fitted(400, 400, shift=3.0)
    judges = {"pooled": Judge.of(0.05, [], strata[:1]), "own": Judge.of(0.05, ["x"], strata)}
    rng = np.random.default_rng(1)
    new = {"x=A": rng.gamma(4.0, size=1000), "x=B": rng.gamma(4.0, size=1000) + 3.0}
    low, high = observed_rate_interval(400, 0.05, 1000)
    rates = {
        how: {name: float(judge.judge(scores, [name] * 1000).is_abnormal_B.mean()) for name, scores in new.items()}
        for how, judge in judges.items()
    }
    assert rates["pooled"]["x=A"] < low and rates["pooled"]["x=B"] > high
    assert all(low <= value <= high for value in rates["own"].values())


def test_at_a_smaller_rate_strata_that_cannot_carry_it_are_judged_by_all_normals():
    scores = np.arange(140.0)
    names = ["few"] * 20 + ["many"] * 120
    judge = Judge.of(0.1, ("manufacturer",), fit_strata(scores, names, names, (), 0.1, 20))
    with pytest.raises(GateRefused):
        Judge(0.01, judge.columns, judge.strata).judge([5.0], ["few"])
    stricter = judge.at(0.01)
    assert stricter.judge([19.5, 139.5], ["few", "many"]).stratum_B == ["pooled", "many"]
    assert stricter.judge([19.5, 139.5], ["few", "many"]).is_abnormal_B.tolist() == [False, True]
    with pytest.raises(GateRefused):
        judge.at(0.001)
    assert [judge.fewest_normals(["few", "many", None], rate) for rate in (0.1, 0.01)] == [20, 120]
    assert judge.fewest_normals(["never seen"], 0.1) == judge.fewest_normals([], 0.1) == 140
