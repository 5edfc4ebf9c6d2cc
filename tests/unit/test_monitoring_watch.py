"""The dead-man switch: each alarm, and beside it the case that must stay quiet."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from memmc.config import MonitorConfig
from memmc.monitoring import watch
from memmc.monitoring.watch import Weights

NOW = datetime(2026, 3, 1, tzinfo=UTC)
RULES = MonitorConfig()


def ago(**time):
    return NOW - timedelta(**time)


def name(alarm):
    return None if alarm is None else alarm.name


def test_every_alarm_says_what_to_do():
    assert set(watch.TO_DO) == set(watch.AlarmName.__args__)
    alarm = watch.no_data(None, NOW, RULES)
    assert alarm is not None
    assert alarm.to_do == watch.TO_DO["no_data"]


@pytest.mark.parametrize(("newest", "expected"), [(ago(hours=71), None), (ago(hours=73), "no_data"), (None, "no_data")])
def test_a_source_that_stopped(newest, expected):
    assert name(watch.no_data(newest, NOW, RULES)) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0] * 30, "constant_scores"),
        ([1.0 + 1e-13 * n for n in range(30)], "constant_scores"),
        ([0.0] * 30, "constant_scores"),
        ([1.0] * 16 + list(range(14)), "constant_scores"),
        ([1.0] * 29 + [float("nan")], "constant_scores"),
        (list(np.random.default_rng(0).normal(size=30)), None),
        ([1e-6 * n for n in range(30)], None),
        ([1.0] * 9, None),
    ],
)
def test_scores_that_are_all_one(scores, expected):
    assert name(watch.constant_scores(scores)) == expected


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (Weights(20, 20), "broken_weights"),
        (Weights(20, 11), "broken_weights"),
        (Weights(0, 0, "NaN"), "broken_weights"),
        (Weights(20, 2), None),
    ],
)
def test_weights_of_zero_or_not_a_number(weights, expected):
    assert name(watch.broken_weights(weights)) == expected


@pytest.mark.parametrize(
    ("champion", "used", "expected"),
    [
        (None, ["m/1"], "no_champion"),
        ("m/2", ["m/1"], "stale_alias"),
        ("m/2", ["m/1", "m/2"], None),
        ("m/2", ["m/2"], None),
        ("m/2", [], None),
    ],
)
def test_an_alias_that_nobody_follows(champion, used, expected):
    assert name(watch.stale_alias(champion, used)) == expected


def test_an_old_champion():
    assert name(watch.old_champion(ago(days=366), NOW, RULES)) == "old_champion"
    assert watch.old_champion(ago(days=364), NOW, RULES) is None
    assert watch.old_champion(None, NOW, RULES) is None


def test_a_backlog_counts_only_what_has_waited():
    assert watch.scoring_backlog([ago(hours=1)] * 9, NOW, RULES) is None
    alarm = watch.scoring_backlog([ago(hours=1), ago(hours=25), ago(hours=30)], NOW, RULES)
    assert name(alarm) == "scoring_backlog"
    assert alarm.found.startswith("2 instances")


@pytest.mark.parametrize(
    ("before", "window", "expected"),
    [
        ((2, 200), (12, 40), "quarantine_rate"),
        ((0, 200), (8, 40), "quarantine_rate"),
        ((2, 200), (1, 40), None),
        ((20, 200), (7, 40), None),  # chance
        ((400_000, 1_000_000), (5_000, 10_000), None),  # certain, and not twice as many
        ((0, 200), (5, 5), None),  # too few to say
    ],
)
def test_a_jump_of_the_quarantined_share(before, window, expected):
    assert name(watch.quarantine_rate(before, window, RULES)) == expected
