"""Each control must win where its feature is what tells abnormal from normal."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from memmc.errors import DataError
from memmc.evaluation.controls import FittedControls, control_scores, evaluate_controls, reduce_images
from memmc.evaluation.metrics import auroc

LABELS = np.arange(200) < 100
SIDE = 32
Sample = Callable[[np.random.Generator, int, bool], np.ndarray]


def enlarge(cells: np.ndarray) -> np.ndarray:
    """(N, 8, 8) -> (N, SIDE, SIDE), whose 8 x 8 area means are the cells."""
    return np.repeat(np.repeat(cells, SIDE // 8, axis=1), SIDE // 8, axis=2)


def centred(rng: np.random.Generator, num: int, scale: float) -> np.ndarray:
    """Cells of random contrast whose mean is zero."""
    cells = rng.normal(size=(num, 8, 8)) * scale
    return cells - cells.mean(axis=(1, 2), keepdims=True)


def checkerboard() -> np.ndarray:
    """+-1 per pixel: zero in every area mean."""
    return np.indices((SIDE, SIDE)).sum(axis=0) % 2 * 2.0 - 1


def brighter(rng: np.random.Generator, num: int, abnormal: bool) -> np.ndarray:
    level = 0.45 + 0.05 * rng.normal(size=(num, 1, 1)) + 0.07 * abnormal
    return enlarge(level + centred(rng, num, 0.05))


def smoother(rng: np.random.Generator, num: int, abnormal: bool) -> np.ndarray:
    amplitude = (0.08 if abnormal else 0.12) + 0.01 * rng.normal(size=(num, 1, 1))
    return enlarge(0.5 + centred(rng, num, 0.02)) + amplitude * checkerboard()


def off_the_plane(rng: np.random.Generator, num: int, abnormal: bool) -> np.ndarray:
    """Large normal variation along 4 patterns; abnormals leave them by less than it."""
    patterns = np.linalg.qr(centred(np.random.default_rng(42), 5, 1.0).reshape(5, 64).T)[0].T.reshape(5, 8, 8)
    weights = rng.normal(size=(num, 4)) * 0.8
    cells = 0.5 + np.einsum("nk,kij->nij", weights, patterns[:4]) + centred(rng, num, 0.01)
    return enlarge(cells + 0.08 * abnormal * patterns[4])


def between_clusters(rng: np.random.Generator, num: int, abnormal: bool) -> np.ndarray:
    """Normals at the corners of a square, abnormals as far from its middle along the axes."""
    first = np.indices((8, 8))[0] % 2 * 0.2 - 0.1
    second = np.indices((8, 8))[1] % 2 * 0.2 - 0.1
    angle = rng.integers(0, 4, num) * np.pi / 2 + (0 if abnormal else np.pi / 4)
    place = np.cos(angle)[:, None, None] * first + np.sin(angle)[:, None, None] * second
    return enlarge(0.5 + place + centred(rng, num, 0.01))


@pytest.mark.parametrize(
    ("winner", "sample"),
    [
        ("mean_intensity", brighter),
        ("sharpness", smoother),
        ("pca_8x8", off_the_plane),
        ("knn_8x8", between_clusters),
    ],
)
def test_each_control_wins_on_its_own_ground(winner: str, sample: Sample) -> None:
    rng = np.random.default_rng(0)
    train = sample(rng, 300, False)
    scores = control_scores(train, np.concatenate([sample(rng, 100, True), sample(rng, 100, False)]))
    areas = {name: max(auroc(LABELS, s), 1 - auroc(LABELS, s)) for name, s in scores.items()}
    assert max(areas, key=areas.__getitem__) == winner, areas
    assert areas[winner] > 0.8
    assert areas[winner] > sorted(areas.values())[-2] + 0.05, areas


def test_reduction_is_the_area_mean_also_of_odd_sizes() -> None:
    rng = np.random.default_rng(1)
    images = rng.random((3, 24, 40))
    expected = images.reshape(3, 8, 3, 8, 5).mean(axis=(2, 4)).reshape(3, 64)
    np.testing.assert_allclose(reduce_images(images), expected)
    odd = rng.random((2, 37, 29))
    fine = np.repeat(np.repeat(odd, 8, axis=1), 8, axis=2)
    np.testing.assert_allclose(reduce_images(odd), reduce_images(fine))
    np.testing.assert_allclose(reduce_images(odd).mean(axis=1), odd.mean(axis=(1, 2)))


def test_distances_equal_sklearn() -> None:
    rng = np.random.default_rng(2)
    train, test = rng.random((60, 16, 16)), rng.random((300, 16, 16))
    scores = control_scores(train, test)
    train_F, test_F = reduce_images(train), reduce_images(test)
    distances, _ = NearestNeighbors(n_neighbors=5).fit(train_F).kneighbors(test_F)
    np.testing.assert_allclose(scores["knn_8x8"], distances.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(scores["mean_intensity"], test.mean(axis=(1, 2)))
    np.testing.assert_allclose(scores["sharpness"][0], np.mean(np.abs(test[0, :, 1:] - test[0, :, :-1])))
    # Eight patterns: all variation lies within the kept components, so this is the plain Mahalanobis distance.
    patterns = rng.random((8, 16, 16)) / 8
    train = np.tensordot(rng.random((90, 8)), patterns, 1)
    test = np.tensordot(rng.random((20, 8)), patterns, 1)
    basis = np.linalg.svd(reduce_images(train) - reduce_images(train).mean(axis=0), full_matrices=False)[2][:8]
    covariance = EmpiricalCovariance().fit(reduce_images(train) @ basis.T)
    expected = np.sqrt(covariance.mahalanobis(reduce_images(test) @ basis.T) * 89 / 90)
    np.testing.assert_allclose(control_scores(train, test)["pca_8x8"], expected, rtol=0.02)


def test_an_image_is_scored_alike_alone_and_among_others() -> None:
    rng = np.random.default_rng(4)
    train, test = rng.random((60, 16, 16)), rng.random((20, 16, 16))
    fitted = FittedControls.fit(train)
    for name, values in control_scores(train, test).items():
        alone = [fitted.scores(test[number : number + 1])[name][0] for number in range(len(test))]
        np.testing.assert_allclose(alone, values, rtol=1e-9)


def test_evaluation_turns_a_control_and_pairs_the_gain() -> None:
    rng = np.random.default_rng(3)
    patients = np.arange(200)
    good = LABELS + rng.normal(size=200) * 0.4
    results = evaluate_controls(
        {"copy": good, "reversed": -good, "noise": rng.normal(size=200)},
        LABELS, good, patients, resamplings=300, confidence=0.95, seed=0,
    )  # fmt: skip
    by_name = {result.name: result for result in results}
    assert by_name["reversed"].flipped
    assert not by_name["copy"].flipped
    assert by_name["reversed"].auroc == pytest.approx(by_name["copy"].auroc) == auroc(LABELS, good)
    assert by_name["copy"].gain_interval.low == by_name["copy"].gain_interval.high == 0.0
    assert by_name["noise"].gain_interval.low > 0.2
    assert by_name["noise"].auroc >= 0.5
    assert results[-1].name == "noise"


def test_unusable_images_are_refused() -> None:
    with pytest.raises(DataError, match="M >= 2"):
        control_scores(np.zeros((1, 8, 8)), np.zeros((3, 8, 8)))
    with pytest.raises(DataError, match="same size"):
        control_scores(np.zeros((4, 8, 8)), np.zeros((3, 9, 8)))


def test_constant_training_images_do_not_divide_by_zero() -> None:
    scores = control_scores(np.full((4, 8, 8), 0.5), np.random.default_rng(0).random((3, 8, 8)))
    assert all(np.isfinite(values).all() for values in scores.values())


def test_sharpness_alone_separates_the_children_set() -> None:
    root = os.environ.get("MEMMC_TEST_DATA")
    if not root or not (Path(root) / "cxr-kermany").is_dir():
        pytest.skip("MEMMC_TEST_DATA is not set or holds no cxr-kermany")
    from PIL import Image

    folder = Path(root) / "cxr-kermany"

    def load(pattern: str, num: int) -> np.ndarray:
        files = sorted(folder.glob(pattern))[:num]
        return np.stack([np.asarray(Image.open(f).convert("L").resize((64, 64)), dtype=float) / 255 for f in files])

    normal, abnormal = load("val/normal/*", 80), load("val/abnormal/*", 80)
    scores = control_scores(load("train/**/*.*", 100), np.concatenate([abnormal, normal]))
    area = auroc(np.arange(len(abnormal) + len(normal)) < len(abnormal), scores["sharpness"])
    assert max(area, 1 - area) > 0.75
