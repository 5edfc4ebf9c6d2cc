"""Localisation figures against plain, slow counterparts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, label
from scipy.stats import mannwhitneyu

from memmc.errors import DataError
from memmc.evaluation.boxes import BoxImage, box_figures, froc, iou
from memmc.evaluation.localisation import aupro, dice, moved, pixel_auroc, pixel_figures

ROOM = 40


def sample(seed: int, count: int = 4, side: int = 24) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Coarse-valued maps with ties, and masks of several regions."""
    rng = np.random.default_rng(seed)
    masks = [gaussian_filter(rng.normal(size=(side, side)), 2) > 0.12 for _ in range(count)]
    maps = [np.round(rng.normal(size=mask.shape) + 1.2 * mask, 1).astype(np.float16) for mask in masks]
    return maps, masks


def slow_aupro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """Threshold by threshold, region by region, as the definition reads."""
    thresholds = np.unique(np.concatenate([item.ravel() for item in maps]))[::-1]
    points = [(0.0, 0.0)]
    for threshold in thresholds:
        overlaps, false, normal = [], 0, 0
        for anomaly_map, mask in zip(maps, masks, strict=True):
            above = anomaly_map >= threshold
            regions, num = label(mask, np.ones((3, 3)))
            overlaps += [above[regions == index].mean() for index in range(1, num + 1)]
            false, normal = false + (above & ~mask).sum(), normal + (~mask).sum()
        points.append((false / normal, float(np.mean(overlaps))))
    grid = np.linspace(0, limit, 20_001)
    x, y = np.array(points).T
    return float(np.mean(np.interp(grid, x, y)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_aupro_is_what_its_definition_gives(seed: int, limit: float) -> None:
    maps, masks = sample(seed)
    assert aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_pixel_auroc_is_the_rank_sum(seed: int) -> None:
    maps, masks = sample(seed)
    values, truth = np.concatenate(maps).astype(float), np.concatenate(masks)
    statistic = mannwhitneyu(values[truth], values[~truth]).statistic
    assert pixel_auroc(maps, masks) == pytest.approx(statistic / (truth.sum() * (~truth).sum()), abs=1e-12)


@given(seed=st.integers(0, 50), level=st.floats(-1, 2))
@example(seed=0, level=-0.0)
@settings(max_examples=60, deadline=None)
def test_dice_counts_pixels_above_the_level(seed: int, level: float) -> None:
    maps, masks = sample(seed, count=2)
    expected = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        above = {tuple(place) for place in np.argwhere(anomaly_map.astype(float) > level)}
        truth = {tuple(place) for place in np.argwhere(mask)}
        expected.append(2 * len(above & truth) / (len(above) + len(truth)))
    assert dice(maps, masks, level) == pytest.approx(np.mean(expected))


def test_dice_of_a_perfect_and_of_a_silent_map() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:5, 3:6] = True
    assert dice([mask * 3.0], [mask], 1.0) == 1.0
    assert dice([mask * 3.0], [mask], 3.0) == 0.0
    with pytest.raises(DataError):
        dice([mask * 3.0], [np.zeros((8, 8), bool)], 1.0)


def test_controls_keep_the_values_and_lose_the_place() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((32, 32), bool)
    mask[2:8, 22:30] = True
    maps = [rng.random((32, 32)) + 2 * mask for _ in range(6)]
    for place in ([0.5, 0.5], [0.0, 1.0]):
        other = moved(maps[0], np.array(place))
        np.testing.assert_array_equal(np.sort(other, axis=None), np.sort(maps[0], axis=None))
        assert np.unravel_index(other.argmax(), other.shape) in {(15, 15), (15, 16), (16, 15), (16, 16), (0, 31)}
    figures = pixel_figures(maps, [mask] * 6, level=1.5)
    assert figures["model"].dice == 1.0
    assert figures["centre prior"].dice == 0.0
    assert figures["random box"].pixel_auroc < 0.9 < figures["model"].pixel_auroc
    assert pixel_figures(maps, [mask] * 6, None)["model"].dice is None


def test_the_centre_prior_wins_where_lesions_lie_in_the_middle() -> None:
    """The control is real: it must beat a map that looks elsewhere."""
    mask = np.zeros((32, 32), bool)
    mask[12:20, 12:20] = True
    figures = pixel_figures([np.arange(1024.0).reshape(32, 32)], [mask], level=959.5)
    assert figures["centre prior"].dice == 1.0
    assert figures["model"].dice == 0.0


boxes = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 15)] * 2)


@given(first=boxes, second=boxes)
def test_iou_is_that_of_the_pixels(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    painted = np.zeros((2, ROOM, ROOM), bool)
    for canvas, (x, y, width, height) in zip(painted, (first, second), strict=True):
        canvas[y : y + height, x : x + width] = True
    expected = (painted[0] & painted[1]).sum() / (painted[0] | painted[1]).sum()
    assert iou(np.array([first], float), np.array([second], float))[0, 0] == pytest.approx(expected)


def image(truth: list[tuple[float, ...]], found: list[tuple[float, ...]], peaks: list[float]) -> BoxImage:
    return BoxImage(np.array(truth).reshape(-1, 4), np.array(found).reshape(-1, 4), np.array(peaks), ROOM)


def test_hit_rate_and_its_controls() -> None:
    corner, middle = (0.0, 0.0, 8.0, 8.0), (16.0, 16.0, 8.0, 8.0)
    figures = box_figures([
        image([corner], [corner, middle], [5.0, 3.0]),
        image([corner], [middle], [4.0]),
        image([corner], [], []),
        image([middle], [corner], [4.0]),
        image([], [corner], [9.0]),
    ])  # fmt: skip
    assert (figures.num_images, figures.num_boxes) == (5, 4)
    assert figures.hit_rate == 0.25
    assert figures.hit_rate_centre_prior == 0.25
    # An 8 px box at a random corner in [0, 32]^2 overlaps one in the image's corner by IoU >= 0.1 when the product of
    # the two overlaps is at least 128 / 11.
    overlap = np.clip(8 - np.linspace(0, 32, 4001), 0, None)
    chance = (overlap[:, None] * overlap[None] >= 128 / 11).mean()
    assert 0 < figures.hit_rate_random_box < 0.25
    random = box_figures([image([corner], [middle], [1.0])] * 40).hit_rate_random_box
    assert random == pytest.approx(chance, abs=0.01)


@pytest.mark.parametrize("seed", range(6))
def test_froc_is_what_counting_at_every_threshold_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def draw(count: int) -> list[tuple[float, ...]]:
        return [tuple(rng.integers(1, 16, 4).astype(float)) for _ in range(count)]

    images = []
    for _ in range(12):
        found = draw(rng.integers(0, 4))
        images.append(image(draw(rng.integers(0, 3)), found, np.round(rng.random(len(found)), 1).tolist()))
    total = sum(len(item.truth_T4) for item in images)
    for rate, value in froc(images, (0.0, 0.25, 0.5, 1.0, 4.0)).items():
        best = 0.0
        for threshold in np.arange(0.0, 1.05, 0.1) - 0.05:
            hit = false = 0
            for item in images:
                kept = item.found_R4[item.peaks_R >= threshold]
                good = iou(kept, item.truth_T4) >= 0.1
                hit, false = hit + good.any(0).sum(), false + (~good.any(1)).sum()
            if false / len(images) <= float(rate):
                best = max(best, hit / total)
        assert value == pytest.approx(best)


def test_no_box_anywhere_is_refused() -> None:
    with pytest.raises(DataError, match="no box among them"):
        box_figures([image([], [(0.0, 0.0, 1.0, 1.0)], [1.0])])


def test_froc_of_a_large_cohort_takes_no_time() -> None:
    peaks = [float(number) for number in range(40_000, 0, -1)]
    found = [(0.0, 0.0, 8.0, 8.0), *[(20.0, 20.0, 4.0, 4.0)] * (len(peaks) - 1)]
    assert froc([image(found[:1], found, peaks)])["0.25"] == 1.0
