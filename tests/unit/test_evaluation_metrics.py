"""Metrics against scikit-learn, against loops, and against what intervals promise."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from memmc.errors import DataError
from memmc.evaluation.localisation import aupro, pixel_auroc
from memmc.evaluation.metrics import (
    auroc,
    average_precision,
    bootstrap_values,
    evaluate_scores,
    false_positive_rate_interval,
    operating_points,
    patient_bootstrap,
    roc_curve,
)


def tied_sample(seed: int, num: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random(num) < 0.3
    labels[:2] = [True, False]
    return labels, np.round(rng.normal(size=num) + labels, 1), rng.integers(0, num // 2, num)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
@settings(max_examples=150, deadline=None)
def test_areas_equal_sklearn_with_ties(rows: list[tuple[bool, int]]) -> None:
    labels, scores = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=float)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


def test_auroc_is_the_pair_probability() -> None:
    labels, scores, _ = tied_sample(1, 60)
    pairs = [(a > n) + (a == n) / 2 for a in scores[labels] for n in scores[~labels]]
    assert auroc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_weights_equal_repeated_images() -> None:
    labels, scores, _ = tied_sample(2, 80)
    weights = np.random.default_rng(0).integers(0, 4, (5, 80)).astype(float)
    for statistic in (auroc, average_precision):
        fast = statistic(labels, scores, weights)
        for row, value in zip(weights.astype(int), fast, strict=True):
            assert value == pytest.approx(statistic(np.repeat(labels, row), np.repeat(scores, row)), abs=1e-12)


def test_roc_curve_equals_sklearn_and_its_area() -> None:
    labels, scores, _ = tied_sample(3)
    curve = roc_curve(labels, scores)
    fpr, tpr, thresholds = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive_rate, fpr)
    np.testing.assert_allclose(curve.sensitivity, tpr)
    np.testing.assert_allclose(curve.thresholds, thresholds)
    area = np.trapezoid(curve.sensitivity, curve.false_positive_rate)
    assert area == pytest.approx(auroc(labels, scores), abs=1e-12)


def test_operating_points_flag_only_above_the_threshold() -> None:
    points = operating_points([0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.2, 0.9], [0.2, 0.25, 5])
    assert [(p.sensitivity, p.false_positive_rate) for p in points] == [
        (0.5, pytest.approx(1 / 3)),
        (0.5, pytest.approx(1 / 3)),
        (0.0, 0.0),
    ]


def test_bootstrap_keeps_patients_whole_and_both_classes() -> None:
    labels, scores, patients = tied_sample(4)
    seen: list[np.ndarray] = []

    def watch(labels_N: np.ndarray, scores_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
        seen.append(weights_RN)
        return auroc(labels_N, scores_N, weights_RN)

    bootstrap_values(labels, scores, patients, watch, 50, 0)
    weights = np.concatenate(seen)
    for patient in np.unique(patients):
        assert (weights[:, patients == patient] == weights[:, [np.flatnonzero(patients == patient)[0]]]).all()
    assert (weights[:, labels].sum(axis=1) > 0).all()
    assert (weights[:, ~labels].sum(axis=1) > 0).all()
    assert weights.std() > 0.5


def test_bootstrap_with_one_abnormal_patient_never_loses_it() -> None:
    labels = np.array([True, True] + [False] * 30)
    patients = np.array([0, 0, *range(1, 31)])
    values = bootstrap_values(labels, np.linspace(1, 0, 32), patients, auroc, 500, 0)
    assert np.isfinite(values).all()


def test_bootstrap_is_wider_when_images_of_a_patient_move_together() -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat(rng.random(60) < 0.5, 10)
    scores = np.repeat(rng.normal(size=60), 10) + labels + 0.01 * rng.normal(size=600)
    by_patient = patient_bootstrap(labels, scores, np.repeat(np.arange(60), 10), auroc, 400, 0.95, 0)
    by_image = patient_bootstrap(labels, scores, np.arange(600), auroc, 400, 0.95, 0)
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    truth, covered = 0.7602, 0  # Phi(1 / sqrt(2)): two unit normals one apart
    for _ in range(200):
        labels = np.arange(120) < 60
        interval = patient_bootstrap(labels, rng.normal(size=120) + labels, np.arange(120), auroc, 200, 0.9, 0)
        covered += interval.low <= truth <= interval.high
    assert 0.82 <= covered / 200 <= 0.97


def test_bootstrap_chunks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores, patients = tied_sample(7)
    whole = patient_bootstrap(labels, scores, patients, auroc, 2000, 0.95, 0)
    monkeypatch.setattr("memmc.evaluation.metrics._CELLS_PER_CHUNK", 200 * 7)
    parts = patient_bootstrap(labels, scores, patients, auroc, 2000, 0.95, 0)
    assert parts.low == pytest.approx(whole.low, abs=0.01)
    assert parts.high == pytest.approx(whole.high, abs=0.01)


def test_bootstrap_is_seeded_and_fast() -> None:
    labels, scores, patients = tied_sample(8, 1000)
    started = time.perf_counter()
    first = patient_bootstrap(labels, scores, patients, auroc, 1000, 0.95, 3)
    assert time.perf_counter() - started < 3
    assert first == patient_bootstrap(labels, scores, patients, auroc, 1000, 0.95, 3)
    assert first != patient_bootstrap(labels, scores, patients, auroc, 1000, 0.95, 4)


def test_clopper_pearson_known_values_and_ends() -> None:
    # 5 of 100 at 95 %: 1.643 % to 11.284 %, the textbook value.
    interval = false_positive_rate_interval(5, 100, 0.95)
    assert (interval.low, interval.high) == (pytest.approx(0.01643, abs=1e-5), pytest.approx(0.11284, abs=1e-5))
    assert false_positive_rate_interval(0, 20, 0.95).low == 0.0
    assert false_positive_rate_interval(0, 20, 0.95).high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert false_positive_rate_interval(20, 20, 0.95).high == 1.0
    with pytest.raises(DataError, match="3 of 2"):
        false_positive_rate_interval(3, 2, 0.95)


def test_pixel_auroc_is_exact_for_float16_maps() -> None:
    rng = np.random.default_rng(9)
    masks = rng.random((6, 20, 20)) < 0.2
    maps = (rng.normal(size=masks.shape) + masks).astype(np.float16)
    maps[0, 0, :2] = [0.0, -0.0]
    expected = roc_auc_score(masks.ravel(), maps.astype(np.float64).ravel())
    assert pixel_auroc(iter(maps), iter(masks)) == pytest.approx(expected, abs=1e-12)


def test_aupro_counts_regions_alike_and_knows_its_ends() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[2:22, 2:22] = True
    mask[30:32, 30:32] = True
    assert aupro([mask.astype(float)], [mask]) == pytest.approx(1.0, abs=1e-9)
    only_large = mask.astype(float)
    only_large[30:32, 30:32] = 0
    # Half of the regions found at once, the other half with chance: 0.5 + 0.5 * mean of fpr up to 0.3.
    assert aupro([only_large], [mask]) == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-3)
    noise = np.random.default_rng(0).normal(size=(40, 40))
    assert aupro([noise], [mask], 1.0) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_one_class_is_refused(labels: list[int]) -> None:
    with pytest.raises(DataError, match="expected some of both"):
        auroc(labels, [0.1, 0.2])


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        auroc([0, 1], [0.1, np.nan])
    with pytest.raises(DataError, match="one key per image"):
        bootstrap_values([0, 1], [0.1, 0.2], ["a"], auroc, 5, 0)
    with pytest.raises(DataError, match="one mask per map"):
        pixel_auroc([np.zeros((2, 2))], [])
    with pytest.raises(DataError, match="equal shapes"):
        pixel_auroc([np.zeros((2, 2))], [np.zeros((3, 2))])


def test_evaluate_scores_gathers_the_parts() -> None:
    labels, scores, patients = tied_sample(10)
    flagged = scores > 1.0
    result = evaluate_scores(labels, scores, flagged, patients, resamplings=200, confidence=0.9, seed=1)
    assert result.auroc == auroc(labels, scores)
    assert result.auroc_interval == patient_bootstrap(labels, scores, patients, auroc, 200, 0.9, 1)
    assert result.auroc_interval.low < result.auroc < result.auroc_interval.high
    assert result.sensitivity == pytest.approx(operating_points(labels, scores, [1.0])[0].sensitivity)
    assert result.false_positive_rate == pytest.approx(operating_points(labels, scores, [1.0])[0].false_positive_rate)
    assert (result.num_normal, result.num_abnormal) == (int((~labels).sum()), int(labels.sum()))
    assert result.num_patients == len(set(patients.tolist()))
