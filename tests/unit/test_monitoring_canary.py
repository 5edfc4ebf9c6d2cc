"""Planted lesions: of the size and contrast that is asked for, at the same place for the same seed."""

import numpy as np
import pytest

from memmc.monitoring.canary import Planted, chance_of_no_fall, plant, sensitivity, shadow


def film(seed=0, side=96):
    rng = np.random.default_rng(seed)
    return (0.3 + 0.3 * rng.random((side, side))).astype(np.float32)


@pytest.mark.parametrize("diameter", [8.0, 20.0, 40.0])
def test_the_shadow_is_as_wide_as_it_says(diameter):
    shadow_hw = shadow(3, diameter)
    assert shadow_hw.max() == pytest.approx(1.0)
    area = (shadow_hw > 0.05).sum()
    # The main sphere's disc and two lobulations that reach a little beyond it.
    assert 0.85 * np.pi * diameter**2 / 4 < area < 1.5 * np.pi * diameter**2 / 4 + 8
    edge = np.concatenate([shadow_hw[0], shadow_hw[-1], shadow_hw[:, 0], shadow_hw[:, -1]])
    assert edge.max() < 0.35


@pytest.mark.parametrize("contrast", [0.25, 0.5])
def test_the_lesion_is_as_bright_as_it_says_and_nothing_else_changes(contrast):
    before = film()
    after = plant(before, Planted(0.2, contrast, 5))
    dark, bright = np.quantile(before, (0.1, 0.9))
    assert (after - before).max() == pytest.approx(contrast * (bright - dark), rel=1e-4)
    assert (after - before).min() >= -1e-7
    assert 0.01 < (after != before).mean() < 0.12
    assert np.array_equal(before, film())


def test_seeds_fix_place_and_shape_and_others_move_it():
    places = set()
    for seed in range(8):
        change = plant(film(), Planted(0.14, 0.5, seed)) - film()
        assert np.array_equal(change, plant(film(), Planted(0.14, 0.5, seed)) - film())
        places.add(tuple(np.unravel_index(change.argmax(), change.shape)))
    assert len(places) > 5


def test_an_interval_widens_with_fewer_scans_and_holds_the_mean():
    many, few = sensitivity([1.0, 0.5] * 40, 0.95, 0), sensitivity([1.0, 0.5] * 4, 0.95, 0)
    assert many.sensitivity == few.sensitivity == 0.75
    assert few.high - few.low > 2 * (many.high - many.low)


def test_a_fall_is_certain_or_it_is_not():
    rng = np.random.default_rng(0)
    before = rng.binomial(9, 0.8, 24) / 9
    assert chance_of_no_fall(before, rng.binomial(9, 0.3, 24) / 9) < 0.001
    assert chance_of_no_fall(before, rng.binomial(9, 0.8, 24) / 9) > 0.01
    assert chance_of_no_fall([1.0] * 5, [1.0] * 5) == 1.0
