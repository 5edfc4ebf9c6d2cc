"""Sensitivity at a fixed specificity, promised against observed rates, and parts of the images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.evaluation.metrics import Interval
from memmc.evaluation.operating import rate_points, sensitivities, sensitivity_at
from memmc.evaluation.subgroups import NOT_STATED, group_of, subgroups
from memmc.scoring.calibration import observed_rate_interval

SCORES = st.lists(st.integers(0, 8).map(float), min_size=1, max_size=30)
SETTINGS = {"resamplings": 100, "confidence": 0.95, "seed": 0}


@settings(max_examples=200, deadline=None)
@given(SCORES, SCORES, st.sampled_from([0.5, 0.9, 0.95]))
def test_sensitivity_equals_the_best_over_all_thresholds(normal: list[float], abnormal: list[float], least: float):
    expected = max(
        (np.mean(np.array(abnormal) > t) for t in [-1.0, *range(9)] if np.mean(np.array(normal) <= t) >= least - 1e-12),
        default=0.0,
    )
    labels = np.array([False] * len(normal) + [True] * len(abnormal))
    assert sensitivity_at(labels, np.array([*normal, *abnormal]), None, least)[0] == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(SCORES, SCORES, st.data())
def test_a_weight_is_a_repetition(normal: list[float], abnormal: list[float], data: st.DataObject):
    scores = np.array([*normal, *abnormal])
    labels = np.array([False] * len(normal) + [True] * len(abnormal))
    weights = data.draw(st.lists(st.integers(1, 3), min_size=len(scores), max_size=len(scores)))
    repeated = sensitivity_at(np.repeat(labels, weights), np.repeat(scores, weights), None, 0.9)
    np.testing.assert_allclose(sensitivity_at(labels, scores, np.array([weights], float), 0.9), repeated)


def test_the_interval_holds_the_value_and_narrows_with_images():
    rng = np.random.default_rng(0)
    widths = []
    for count in (60, 600):
        labels = np.arange(count) % 2 == 1
        scores = rng.standard_normal(count) + 1.5 * labels
        high, low = sensitivities(labels, scores, [str(i) for i in range(count)], (0.9, 0.95), **SETTINGS)
        assert high.interval.low <= high.sensitivity <= high.interval.high and low.sensitivity <= high.sensitivity
        widths.append(high.interval.high - high.interval.low)
    assert widths[1] < widths[0]


def test_observed_rates_follow_the_promise_for_uniform_p_values_and_not_for_shifted_ones():
    rng = np.random.default_rng(1)
    expected = {rate: Interval(*observed_rate_interval(1000, rate, 1000)) for rate in (0.01, 0.05, 0.1)}
    good = rate_points(rng.uniform(size=1000), expected, 0.95)
    assert all(point.interval.low <= point.nominal <= point.interval.high and point.holds for point in good)
    bad = rate_points(rng.uniform(size=1000) ** 2, expected, 0.95)
    assert not any(point.holds for point in bad) and bad[0].num_normal == 1000


def test_what_the_draw_of_a_small_calibration_set_does_breaks_no_promise():
    """A threshold set on 99 normals flags 9 % of 1,000 others often enough, though their own interval excludes 5 %."""
    p_values = np.array([0.01] * 90 + [0.5] * 910)
    (point,) = rate_points(p_values, {0.05: Interval(*observed_rate_interval(99, 0.05, 1000))}, 0.95)
    assert point.interval.low > 0.05
    assert point.holds
    (many,) = rate_points(p_values, {0.05: Interval(*observed_rate_interval(9999, 0.05, 1000))}, 0.95)
    assert not many.holds


@pytest.mark.parametrize(
    ("value", "band"), [(0, "0 - 17"), (17, "0 - 17"), (18, "18 - 39"), (79, "60 - 79"), (90, "80 and over")]
)
def test_age_bands(value: int, band: str):
    assert group_of("patient_age_years", value) == band
    assert group_of("patient_age_years", None) == group_of("patient_sex", "") == NOT_STATED


def test_a_part_in_which_the_model_fails_is_seen():
    rng = np.random.default_rng(2)
    rows = []
    for index in range(400):
        abnormal, sex = index % 2 == 1, "MF"[index // 2 % 2]
        score = rng.standard_normal() + (2.0 if abnormal and sex == "M" else 0.0)
        rows.append(
            {"patient_sex": sex, "patient_age_years": 50, "view_position": None, "manufacturer": "A",
             "label": "abnormal" if abnormal else "normal", "anomaly_score": score, "is_abnormal": score > 1.0,
             "patient_key": f"p{index}"}
        )  # fmt: skip
    groups = {group.group: group for group in subgroups(rows, **SETTINGS)}
    assert set(groups) == {"M", "F"}  # columns with one value divide nothing
    female, male = groups["F"], groups["M"]
    assert male.auroc is not None and female.auroc is not None and male.interval and female.interval
    assert male.interval.low > female.interval.high
    assert male.sensitivity is not None and female.sensitivity is not None and male.sensitivity > female.sensitivity


def test_a_part_of_few_patients_has_no_interval_and_one_of_one_class_no_auroc():
    base = {"patient_age_years": 50, "view_position": None, "manufacturer": None, "is_abnormal": False}
    rows = [
        {**base, "patient_sex": "M" if index < 6 else "F", "label": "abnormal" if index == 0 else "normal",
         "anomaly_score": float(index), "patient_key": f"p{index}"}
        for index in range(12)
    ]  # fmt: skip
    groups = {group.group: group for group in subgroups(rows, **SETTINGS)}
    assert groups["M"].auroc == 0.0 and groups["M"].interval is None
    assert groups["F"].auroc is None and groups["F"].sensitivity is None and groups["F"].false_positive_rate == 0.0
