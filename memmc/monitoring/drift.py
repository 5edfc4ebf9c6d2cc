"""Has the stream changed? A window of new instances against the baseline of a model, without a label.

Five kinds of evidence: headers, pixel statistics, embeddings, scores, p-values; over all instances and per scanner.
All tests of a window are adjusted together, so that a quiet window alarms with probability `false_alarm_rate` at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from memmc.config import MonitorConfig
from memmc.monitoring import shift
from memmc.monitoring.shift import Difference, Floats

POOLED = "pooled"


@dataclass(frozen=True)
class Sample:
    """What is compared of instances, one a patient.

    Attributes:
        headers: words per attribute, an absent one as a word of its own.
        numbers: values per attribute, NaN where absent.
        pixels: statistics of the pixels by name, (N,) each.
        embeddings_ND: of the model's encoder.
        strata: scanner of each instance.
        scores: anomaly scores by stratum, of instances that no part of the model was fitted on.
        flagged: instances above the threshold, and all that were judged.
    """

    headers: Mapping[str, Sequence[str]]
    numbers: Mapping[str, Floats]
    pixels: Mapping[str, Floats]
    embeddings_ND: Floats
    strata: Sequence[str]
    scores: Mapping[str, Floats]
    flagged: tuple[int, int]

    def __len__(self) -> int:
        return len(self.strata)


@dataclass(frozen=True)
class Conformal:
    """p-values of the window, by the stratum that judged, and the sizes of the calibration sets behind them."""

    p_values: Mapping[str, Floats]
    num_normals: Mapping[str, int]


@dataclass(frozen=True)
class Shift:
    """One test of a window.

    Attributes:
        group: headers, pixels, embedding, scores or p_values.
        name: the attribute or statistic.
        stratum: `pooled`, or the scanner.
        p_value: of no difference.
        effect: size, [0, 1]; see `memmc.monitoring.shift`.
        adjusted: the p-value after Benjamini and Hochberg over all tests of the window.
        drifted: adjusted and effect are both beyond what the settings accept.
    """

    group: str
    name: str
    stratum: str
    num_baseline: int
    num_window: int
    p_value: float
    effect: float
    adjusted: float = 1.0
    drifted: bool = False


def compare(baseline: Sample, window: Sample, conformal: Conformal, rules: MonitorConfig) -> list[Shift]:
    """Return all tests of a window, most surprising first; the same for the same arguments."""
    rng = np.random.default_rng(rules.seed)
    found = [
        *_headers(baseline, window, rules, rng),
        *_pixels(baseline, window),
        *_strata(baseline, window, rules, rng),
        *_scores(baseline, window, conformal, rules, rng),
    ]
    return adjust(found, rules)


def adjust(found: Sequence[Shift], rules: MonitorConfig) -> list[Shift]:
    """Return tests with their adjusted p-values and verdicts, most surprising first.

    Source: Benjamini and Hochberg, JRSS B 1995; where nothing has changed, any alarm at all is then as rare as the
    rate says.
    """
    from scipy.stats import false_discovery_control

    if not found:
        return []
    adjusted = false_discovery_control([test.p_value for test in found], method="bh")
    judged = [
        replace(
            test,
            adjusted=float(value),
            drifted=bool(value <= rules.false_alarm_rate and test.effect >= _least(test, rules)),
        )
        for test, value in zip(found, adjusted, strict=True)
    ]
    return sorted(judged, key=lambda test: (test.adjusted, -test.effect, test.group, test.name, test.stratum))


def _least(test: Shift, rules: MonitorConfig) -> float:
    return rules.min_flagged_change if test.name == "flagged share" else rules.min_effect


def _headers(baseline: Sample, window: Sample, rules: MonitorConfig, rng: np.random.Generator) -> list[Shift]:
    found: list[Shift] = []
    words = {name: (list(old), list(window.headers[name])) for name, old in baseline.headers.items()}
    for name, old in baseline.numbers.items():
        words[f"{name} present"] = (_presence(old), _presence(window.numbers[name]))
    for name, (old, new) in words.items():
        if len({*old, *new}) > 1:
            found.append(_shift("headers", name, POOLED, len(old), len(new),
                                shift.categories(old, new, rules.resamplings, rng)))  # fmt: skip
    for name, values in baseline.numbers.items():
        old, new = (side[~np.isnan(side)] for side in (values, window.numbers[name]))
        found += _number("headers", name, old, new)
    return found


def _presence(values: Floats) -> list[str]:
    return ["absent" if absent else "present" for absent in np.isnan(values).tolist()]


def _pixels(baseline: Sample, window: Sample) -> list[Shift]:
    return [test for name, old in baseline.pixels.items() for test in _number("pixels", name, old, window.pixels[name])]


def _strata(baseline: Sample, window: Sample, rules: MonitorConfig, rng: np.random.Generator) -> list[Shift]:
    """Compare embeddings and all pixel statistics at once: over everything, and per scanner that both sides know."""
    old_N, new_M = np.asarray(baseline.strata), np.asarray(window.strata)
    masks = {POOLED: (np.ones(len(old_N), bool), np.ones(len(new_M), bool))}
    if len({*baseline.strata, *window.strata}) > 1:
        masks |= {name: (old_N == name, new_M == name) for name in sorted({*window.strata})}
    statistics = [np.stack(list(side.pixels.values()), axis=1) for side in (baseline, window)]
    found: list[Shift] = []
    for stratum, (old, new) in masks.items():
        if min(old.sum(), new.sum()) < rules.min_stratum:
            continue
        for group, name, left, right in (
            ("pixels", "all statistics", statistics[0][old], statistics[1][new]),
            ("embedding", "encoder", baseline.embeddings_ND[old], window.embeddings_ND[new]),
        ):
            test = shift.vectors(left, right, rules.resamplings, rng)
            found.append(_shift(group, name, stratum, len(left), len(right), test))
    return found


def _scores(
    baseline: Sample, window: Sample, conformal: Conformal, rules: MonitorConfig, rng: np.random.Generator
) -> list[Shift]:
    found: list[Shift] = []
    pairs = {POOLED: tuple(np.concatenate([*side.scores.values(), np.empty(0)]) for side in (baseline, window))}
    if len({*baseline.scores, *window.scores}) > 1:
        pairs |= {name: (baseline.scores.get(name, np.empty(0)), new) for name, new in window.scores.items()}
    for stratum, (old, new) in pairs.items():
        if min(len(old), len(new)) >= rules.min_stratum:
            found += _number("scores", "anomaly score", old, new, stratum)
    if min(baseline.flagged[1], window.flagged[1]) >= rules.min_stratum:
        test = shift.share(baseline.flagged, window.flagged)
        found.append(_shift("scores", "flagged share", POOLED, baseline.flagged[1], window.flagged[1], test))
    judged = sum(len(values) for values in conformal.p_values.values())
    if judged >= rules.min_stratum:
        test = shift.uniform(conformal.p_values, conformal.num_normals, rules.uniform_above, rules.resamplings, rng)
        found.append(_shift("p_values", "uniform", POOLED, sum(conformal.num_normals.values()), judged, test))
    return found


def _number(group: str, name: str, old: Floats, new: Floats, stratum: str = POOLED) -> list[Shift]:
    """Return the test of a number; none where there is nothing to compare."""
    if not old.size or not new.size or np.ptp(np.concatenate([old, new])) == 0:
        return []
    return [_shift(group, name, stratum, len(old), len(new), shift.numbers(old, new))]


def _shift(group: str, name: str, stratum: str, num_baseline: int, num_window: int, test: Difference) -> Shift:
    return Shift(group, name, stratum, num_baseline, num_window, test.p_value, test.effect)
