"""The gates: each with what passes it and what does not, and properties over all figures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.config import PromoteConfig
from memmc.evaluation.comparison import AurocDifference
from memmc.evaluation.gates import (
    Area,
    Gate,
    false_positive_gate,
    labelled_gate,
    learning_gate,
    memory_gate,
    migration_gate,
    paired_differences,
    parity_gate,
    passed,
    refusal,
    sensitivity_gate,
    speed_gate,
)
from memmc.evaluation.metrics import Interval
from memmc.scoring.calibration import observed_rate_interval

RULES = PromoteConfig()
shares = st.floats(0, 1)


def difference(value, low, high, each=50):
    return AurocDifference(0.9, 0.9 + value, value, Interval(low, high), each, each)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (difference(-0.10, -0.15, -0.05), "fail"),
        (difference(-0.10, -0.25, +0.01), "pass"),  # not certain
        (difference(-0.01, -0.015, -0.005), "pass"),  # certain, and within the margin
        (difference(+0.10, +0.05, +0.15), "pass"),
        (difference(-0.50, -0.60, -0.40, each=9), "not applicable"),
    ],
)
def test_a_loss_is_refused_when_it_is_certain_and_beyond_the_margin(found, verdict):
    assert labelled_gate(None, found, RULES).verdict == verdict


def test_without_a_champion_a_least_auroc_holds():
    def alone(value):
        return Area(value, Interval(value - 0.1, value + 0.1), 20, 20)

    assert labelled_gate(alone(0.6), None, RULES).verdict == "pass"
    assert labelled_gate(alone(0.5), None, RULES).verdict == "fail"
    assert labelled_gate(None, None, RULES).verdict == "not applicable"


def sensitivity(found, champion, patients=None):
    names = patients or [str(number) for number in range(len(found))]
    return sensitivity_gate(found, champion, names, RULES, resamplings=400, seed=1)


def test_planted_lesions_that_the_champion_found_must_not_be_lost():
    champion = np.arange(100) < 80
    assert sensitivity(np.arange(100) < 40, champion).verdict == "fail"
    assert sensitivity(np.arange(100) < 79, champion).verdict == "pass"
    assert sensitivity(np.arange(100) < 90, champion).verdict == "pass"
    assert sensitivity(np.arange(100) < 5, np.arange(100) < 5).verdict == "fail"  # as bad as a bad champion
    assert sensitivity(np.arange(100) < 40, None).verdict == "pass"
    assert sensitivity(np.ones(19, bool), None).verdict == "not applicable"


def test_images_of_one_patient_are_resampled_together():
    """A hundred images of two patients are two draws: the loss is not certain any more."""
    champion, found = np.ones(100, bool), np.arange(100) < 50
    assert sensitivity(found, champion).verdict == "fail"
    assert sensitivity(found, champion, ["a"] * 50 + ["b"] * 50).verdict == "pass"
    assert len(set(paired_differences(found, champion, ["a"] * 50 + ["b"] * 50, 400, 1))) == 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=20, max_size=60))
def test_one_that_loses_nothing_is_never_refused_for_loss(pairs):
    champion = np.array([first for first, _ in pairs])
    better = champion | np.array([second for _, second in pairs])
    if better.mean() >= RULES.min_sensitivity:
        assert sensitivity(better, champion).verdict == "pass"


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 400), st.integers(20, 300), st.sampled_from([0.05, 0.1]), st.integers(0, 2**31))
def test_a_kept_promise_passes_nearly_always(num_calibration, num_new, rate, seed):
    """Scores of calibration and test normals from one distribution: 95 of 100 draws lie inside, at least."""
    rng = np.random.default_rng(seed)
    promised = observed_rate_interval(num_calibration, rate, num_new, 0.95)
    rank = max(1, int(np.ceil((num_calibration + 1) * (1 - rate) - 1e-9)))
    inside = 0
    for _ in range(60):
        threshold = np.sort(rng.random(num_calibration))[rank - 1]
        flagged = int((rng.random(num_new) > threshold).sum())
        inside += false_positive_gate(flagged, num_new, promised, rate, RULES).verdict == "pass"
    assert inside >= 48


def test_a_broken_promise_fails_in_both_directions():
    promised = observed_rate_interval(200, 0.10, 200, 0.95)
    assert false_positive_gate(60, 200, promised, 0.10, RULES).verdict == "fail"
    assert false_positive_gate(0, 200, promised, 0.10, RULES).verdict == "fail"
    assert false_positive_gate(20, 200, promised, 0.10, RULES).verdict == "pass"
    assert false_positive_gate(0, 19, promised, 0.10, RULES).verdict == "not applicable"


def test_a_model_that_knows_no_more_than_the_mean_has_not_learned():
    assert learning_gate(0.5, 1.0, RULES).verdict == "pass"
    for error, mean in ((0.99, 1.0), (float("nan"), 1.0), (0.1, 0.0)):
        assert learning_gate(error, mean, RULES).verdict == "fail"


def test_a_dead_memory_fails_and_no_memory_is_not_asked():
    assert memory_gate([0.0, 0.0], RULES).verdict == "fail"
    assert memory_gate([0.0, 0.4], RULES).verdict == "pass"
    assert memory_gate([], RULES).verdict == "not applicable"


def test_migration_parity_and_speed():
    assert migration_gate(15, 15, 100, RULES).verdict == "fail"
    assert migration_gate(15, 5, 100, RULES).verdict == "pass"
    unasked = migration_gate(0, 0, 0, RULES, unjudged="7 normal studies, 19 are needed")
    assert (unasked.verdict, unasked.why) == ("not applicable", "7 normal studies, 19 are needed")
    assert parity_gate({"program.pt2": 1e-6}, 1e-4, None).verdict == "pass"
    assert parity_gate({"program.pt2": 1e-3}, 1e-4, None).verdict == "fail"
    assert parity_gate({}, 1e-4, "scores otherwise").verdict == "fail"
    assert parity_gate({}, 1e-4, None).verdict == "not applicable"
    assert speed_gate(1.6, 1.0, 16, RULES).verdict == "fail"
    assert speed_gate(1.4, 1.0, 16, RULES).verdict == "pass"
    assert speed_gate(1.4, None, 16, RULES).verdict == "not applicable"


verdicts = st.sampled_from(["pass", "fail", "not applicable"])
names = st.sampled_from(["auroc", "planted lesions", "speed", "memory"])


@given(st.lists(st.tuples(names, verdicts)))
def test_one_failure_refuses_and_so_does_not_knowing_whether_anything_is_found(pairs):
    gates = [Gate(name, 1.0, 1.0, verdict, f"why {name}") for name, verdict in pairs]
    known = any(gate.verdict == "pass" and gate.name in ("auroc", "planted lesions") for gate in gates)
    failed = [gate for gate in gates if gate.verdict == "fail"]
    assert passed(gates) == (known and not failed)
    assert all(gate.why in refusal(gates) for gate in failed)
