"""Thresholds per stratum: images of one scanner and view judged by their own held-out normals, where these suffice.

Pooled thresholds promise a false-positive rate over the mix of scanners that was
calibrated on, not on each of them: a scanner whose normals score higher gets
most of the false alarms. A stratum (the values of some columns of `instances`)
has thresholds of its own where its normals carry them; elsewhere the pooled ones
hold, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.errors import GateRefused
from memmc.scoring.calibration import Floats, false_positive_interval, p_values, smallest_rate, threshold_at

POOLED = "pooled"
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class RateThreshold:
    """The threshold for one false-positive rate.

    Attributes:
        rate: the rate that is promised.
        threshold: a score above it is abnormal; None where `refused`.
        low, high: 95 % interval of the true rate at this threshold (a Beta distribution over calibration sets).
        refused: why there is none.
    """

    rate: float
    threshold: float | None = None
    low: float | None = None
    high: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Stratum:
    """The held-out normals of one stratum.

    Attributes:
        stratum: `POOLED`, or ``column=value;column=value``.
        normal_scores: sorted.
        thresholds: one per rate.
        refused: why scores of this stratum are judged by the pooled normals; None where its own judge them.
    """

    stratum: str
    num_normals: int
    num_patients: int
    normal_scores: tuple[float, ...]
    thresholds: tuple[RateThreshold, ...] = ()
    refused: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the value that the table `calibrations` keeps."""
        return {**asdict(self), "thresholds": [asdict(item) for item in self.thresholds]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Stratum:
        """Return the stratum that `as_row` described."""
        values: dict[str, Any] = dict(row)
        values["normal_scores"] = tuple(row["normal_scores"])
        values["thresholds"] = tuple(RateThreshold(**item) for item in row["thresholds"])
        return cls(**values)


def stratum_names(columns: Mapping[str, Sequence[Any]], count: int) -> list[str]:
    """Return the stratum of each of `count` images, from their values in the columns; `POOLED` without columns."""
    if not columns:
        return [POOLED] * count
    values = zip(*columns.values(), strict=True)
    return [
        ";".join(f"{name}={UNKNOWN if value is None else value}" for name, value in zip(columns, row, strict=True))
        for row in values
    ]


def fit_strata(
    scores: ArrayLike,
    names: Sequence[str],
    patients: Sequence[str],
    rates: Sequence[float],
    rate: float,
    min_normals: int,
) -> list[Stratum]:
    """Return the pooled normals first, then every stratum, by name.

    Args:
        scores: (N,) of held-out normals, out of fold.
        names: (N,) strata.
        patients: (N,) keys.
        rates: false-positive rates to keep thresholds for.
        rate: the one that decides; a stratum that cannot carry it is refused.
        min_normals: a stratum with fewer is refused.

    Raises:
        GateRefused: all normals together cannot carry `rate`.
    """
    scores_N, names_N, patients_N = np.asarray(scores, np.float64), np.asarray(names), np.asarray(patients)
    wanted = sorted({*rates, rate})
    threshold_at(scores_N, rate)
    pooled = _fit(POOLED, scores_N, patients_N, wanted)
    if set(names) == {POOLED}:
        return [pooled]
    own: list[Stratum] = []
    for name in sorted(set(names)):
        mine = names_N == name
        own.append(_fit(name, scores_N[mine], patients_N[mine], wanted, _refusal(int(mine.sum()), rate, min_normals)))
    return [pooled, *own]


@dataclass(frozen=True)
class Verdicts:
    """What a calibration says of B scores.

    Attributes:
        p_value_B: conformal, small is abnormal.
        is_abnormal_B: the score lies above the threshold of the chosen rate.
        stratum_B: whose normals judged.
    """

    p_value_B: Floats
    is_abnormal_B: NDArray[np.bool_]
    stratum_B: list[str]


@dataclass(frozen=True)
class Judge:
    """Turns scores into p-values and verdicts at one false-positive rate.

    Attributes:
        columns: of `instances`, whose values name a stratum.
        strata: those that judge, by name; `POOLED` for every other.
    """

    rate: float
    columns: tuple[str, ...]
    strata: Mapping[str, Stratum]

    @classmethod
    def of(cls, rate: float, columns: Sequence[str], strata: Sequence[Stratum]) -> Judge:
        """Return the judge of fitted strata."""
        return cls(rate, tuple(columns), {item.stratum: item for item in strata if item.refused is None})

    def threshold(self, stratum: str = POOLED) -> float:
        """Return the score above which an image of the stratum is abnormal."""
        return threshold_at(self.strata.get(stratum, self.strata[POOLED]).normal_scores, self.rate)

    def fewest_normals(self, names: Iterable[str | None], rate: float) -> int:
        """Return how many normals the weakest threshold of the named strata rests on, of those that carry the rate."""
        pooled = self.strata[POOLED]
        counts = [len(self.strata.get(name or POOLED, pooled).normal_scores) for name in set(names)]
        able = [count for count in counts if smallest_rate(count) <= rate + 1e-12]
        return min(able, default=len(pooled.normal_scores))

    def at(self, rate: float) -> Judge:
        """Return the judge at another rate; strata whose own normals cannot carry it are judged by the pooled ones.

        Raises:
            GateRefused: the pooled normals cannot carry it either.
        """
        threshold_at(self.strata[POOLED].normal_scores, rate)
        able = {
            name: item
            for name, item in self.strata.items()
            if name == POOLED or smallest_rate(len(item.normal_scores)) <= rate + 1e-12
        }
        return Judge(rate, self.columns, able)

    def judge(self, scores: ArrayLike, names: Sequence[str]) -> Verdicts:
        """Return the verdicts of scores of the named strata."""
        scores_B = np.asarray(scores, np.float64)
        judged = [name if name in self.strata else POOLED for name in names]
        p_value_B, is_abnormal_B = np.empty(len(scores_B)), np.zeros(len(scores_B), bool)
        for name in set(judged):
            mine = np.array([item == name for item in judged])
            p_value_B[mine] = p_values(scores_B[mine], self.strata[name].normal_scores)
            is_abnormal_B[mine] = scores_B[mine] > self.threshold(name)
        return Verdicts(p_value_B, is_abnormal_B, judged)


def judge_of(calibration: Mapping[str, Any]) -> Judge:
    """Return the judge of a row of `calibrations`; one without strata is pooled."""
    strata = [Stratum.from_row(row) for row in calibration["strata"] or ()]
    if not strata:
        scores = tuple(calibration["normal_scores"])
        strata = [Stratum(POOLED, len(scores), 0, scores)]
    return Judge.of(calibration["false_positive_rate"], calibration["strata_columns"] or (), strata)


def _fit(
    name: str, scores_N: Floats, patients_N: NDArray[Any], rates: Sequence[float], refused: str | None = None
) -> Stratum:
    ordered = tuple(float(score) for score in np.sort(scores_N))
    thresholds = tuple(_at(ordered, rate) for rate in rates)
    return Stratum(name, len(ordered), len(set(patients_N.tolist())), ordered, thresholds, refused)


def _at(scores: tuple[float, ...], rate: float) -> RateThreshold:
    try:
        low, high = false_positive_interval(len(scores), rate)
        return RateThreshold(rate, threshold_at(scores, rate), low, high)
    except GateRefused as refusal:
        return RateThreshold(rate, refused=str(refusal))


def _refusal(count: int, rate: float, min_normals: int) -> str | None:
    needed = max(min_normals, int(np.ceil(1.0 / rate - 1.0 - 1e-9)))
    if count >= needed:
        return None
    return f"{count} held-out normal images, {needed} are needed (calibrate.min_stratum_normals and the rate)"
