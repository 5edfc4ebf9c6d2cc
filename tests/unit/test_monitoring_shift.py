"""Two-sample tests: exact levels where nothing has changed, certainty where much has."""

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from memmc.config import MonitorConfig
from memmc.monitoring import shift
from memmc.monitoring.drift import Conformal, Sample, Shift, adjust, compare
from memmc.monitoring.pixels import pixel_statistics

RULES = MonitorConfig(resamplings=1999)


def rng(seed=0):
    return np.random.default_rng(seed)


def level(p_values, at=0.1):
    """Share of p-values at most `at`; for a valid test no more than `at`, up to chance (4 standard errors)."""
    return np.mean(np.asarray(p_values) <= at) - 4 * np.sqrt(at * (1 - at) / len(p_values))


def test_categories_agree_with_the_chi_square_distribution_where_counts_are_large():
    old, new = ["a"] * 300 + ["b"] * 200 + ["c"] * 100, ["a"] * 90 + ["b"] * 80 + ["c"] * 30
    found = shift.categories(old, new, 9999, rng())
    known = chi2_contingency([[300, 200, 100], [90, 80, 30]], correction=False).pvalue
    assert found.p_value == pytest.approx(known, abs=0.02)
    assert found.effect == pytest.approx(0.5 * (abs(0.5 - 0.45) + abs(1 / 3 - 0.4) + abs(1 / 6 - 0.15)))


def test_categories_hold_their_level_where_counts_are_small():
    draw = rng(1)
    found = [
        shift.categories(list(draw.choice(list("abcdefgh"), 30)), list(draw.choice(list("abcdefgh"), 12)), 199, draw)
        for _ in range(200)
    ]
    assert level([item.p_value for item in found]) <= 0.1


def test_a_maker_nobody_knew_is_noticed_in_a_small_window():
    found = shift.categories(["a"] * 40 + ["b"] * 40, ["a"] * 12 + ["new"] * 8, 9999, rng())
    assert found.p_value < 0.001
    assert found.effect >= 0.4


def test_vectors_hold_their_level_and_see_a_moved_mean():
    draw = rng(2)
    quiet = [shift.vectors(draw.normal(size=(40, 6)), draw.normal(size=(15, 6)), 199, draw).p_value for _ in range(100)]
    assert level(quiet) <= 0.1
    assert min(quiet) < 0.2  # and it is no test that always says no
    moved = shift.vectors(draw.normal(size=(80, 6)), draw.normal(size=(30, 6)) + 1.2, 1999, draw)
    assert moved.p_value < 0.001
    assert moved.effect > 0.3


def test_uniform_holds_its_level_with_a_small_calibration_set_and_abnormal_images_in_the_stream():
    draw, found = rng(3), []
    for _ in range(100):
        normals = np.sort(draw.normal(size=40))
        scores = np.concatenate([draw.normal(size=45), draw.normal(size=5) + 4])
        p_values = (1 + len(normals) - np.searchsorted(normals, scores)) / (len(normals) + 1)
        found.append(shift.uniform({"pooled": p_values}, {"pooled": 40}, 0.2, 199, draw).p_value)
    assert level(found) <= 0.1


def test_uniform_sees_scores_that_have_moved():
    draw = rng(4)
    normals = np.sort(draw.normal(size=200))
    p_values = (1 + 200 - np.searchsorted(normals, draw.normal(size=60) - 1)) / 201
    assert shift.uniform({"pooled": p_values}, {"pooled": 200}, 0.2, 1999, draw).p_value < 0.01


def test_a_window_of_abnormal_images_alone_is_not_uniform():
    found = shift.uniform({"pooled": np.full(30, 0.01)}, {"pooled": 100}, 0.2, 999, rng())
    assert (found.p_value, found.effect) == (0.001, 1.0)
    assert shift.uniform({"pooled": np.full(2, 0.01)}, {"pooled": 100}, 0.2, 999, rng()).p_value == pytest.approx(0.04)


def sample(draw, count, *, makers=("a", "b", "c"), gain=1.0, moved=0.0, flagged=0.05, scores=0.0):
    strata = list(draw.choice(makers, count))
    images = np.clip(
        gain * (0.5 + 0.05 * draw.normal(size=(count, 1, 1)) + 0.2 * draw.normal(size=(count, 8, 8))), 0, 1
    )
    values = draw.normal(size=count) + scores
    return Sample(
        headers={"manufacturer": strata, "patient_sex": list(draw.choice(["F", "M", "absent"], count))},
        numbers={"patient_age_years": np.where(draw.random(count) < 0.1, np.nan, draw.integers(20, 90, count))},
        pixels=pixel_statistics(images.astype(np.float32)),
        embeddings_ND=draw.normal(size=(count, 16)) + moved,
        strata=strata,
        scores={name: values[np.array(strata) == name] for name in set(strata)},
        flagged=(int((draw.random(count) < flagged).sum()), count),
    )


def conformal(draw, count):
    return Conformal({"pooled": np.ceil(draw.random(count) * 101) / 101}, {"pooled": 100})


def test_quiet_windows_alarm_as_rarely_as_promised():
    draw = rng(5)
    rules = MonitorConfig(resamplings=999, false_alarm_rate=0.1)
    alarms = [
        any(
            item.drifted
            for item in compare(
                sample(draw, 90), sample(draw, 30), conformal(draw, 30), rules.model_copy(update={"seed": n})
            )
        )
        for n in range(12)
    ]
    assert sum(alarms) <= 4  # 12 windows at 10 %: more than 4 happen once in 200


@pytest.mark.parametrize(
    ("change", "group"),
    [
        ({"makers": ("a", "b", "new")}, "headers"),
        ({"gain": 0.8}, "pixels"),
        ({"moved": 1.5}, "embedding"),
        ({"scores": 2.0}, "scores"),
        ({"flagged": 0.5}, "scores"),
    ],
)
def test_each_kind_of_change_is_found_where_it_lies(change, group):
    draw = rng(6)
    found = compare(sample(draw, 150), sample(draw, 40, **change), conformal(draw, 40), MonitorConfig(resamplings=2999))
    assert group in {item.group for item in found if item.drifted}


def test_the_same_samples_give_the_same_answer():
    old, new = sample(rng(7), 60), sample(rng(8), 25)
    assert compare(old, new, conformal(rng(9), 25), RULES) == compare(old, new, conformal(rng(9), 25), RULES)


def test_a_certain_but_tiny_change_is_no_drift():
    tiny = Shift("scores", "anomaly score", "pooled", 10**6, 10**6, 1e-12, 0.02)
    large = Shift("scores", "anomaly score", "pooled", 10**6, 10**6, 1e-12, 0.2)
    assert [item.drifted for item in adjust([tiny, large], RULES)] == [True, False]


def test_more_tests_ask_for_more_certainty():
    one = Shift("headers", "lossy", "pooled", 90, 30, 0.004, 0.5)
    others = [Shift("headers", f"h{n}", "pooled", 90, 30, 0.5, 0.5) for n in range(20)]
    assert adjust([one], RULES)[0].drifted
    assert not any(item.drifted for item in adjust([one, *others], RULES))


def test_pixel_statistics_follow_gain_and_blur():
    image = rng(10).random((2, 16, 16)).astype(np.float32) * 0.8
    plain, bright = pixel_statistics(image), pixel_statistics(image * 1.1)
    assert bright["mean"] == pytest.approx(1.1 * plain["mean"], rel=1e-5)
    assert bright["sharpness"] == pytest.approx(plain["sharpness"], rel=1e-5)
    blurred = pixel_statistics((image + np.roll(image, 1, 2)) / 2)
    assert (blurred["sharpness"] < 0.9 * plain["sharpness"]).all()
    clipped = pixel_statistics(np.clip(image * 2, 0, 1))
    assert (clipped["share at white"] > 0.2).all()
    assert (plain["share at white"] == 0).all()
