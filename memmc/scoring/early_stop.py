"""Stopping the passes of an image once its verdict is certain, with the chance of another verdict bounded.

After some of the passes an image has a score of that stage, by a scorer fitted on held-out normals after as many
passes. What the remaining passes still change is known from the same normals: the ratio r of the score after all
passes to that of the stage. A stage's band [low, high] holds r of a new normal but with probability ``bound / stages``
(split conformal, half of it on each side), and is widened until no held-out normal is stopped on the wrong side. An
image of stage score s stops where the thresholds of all passes, of its stratum and of the pooled normals, lie outside
[s low, s high]: only an r outside the band could still take it across.

So the verdict of a new normal differs from that of all passes with probability at most the bound (a union bound over
stages and sides). Of an abnormal image nothing is promised but what it shares with normals, that further passes move
its score by no larger a ratio; `infra/benchmarks/early_stop.py` counts both.

P-values stay valid: the held-out normals are scored by the same rule as any image. It never takes one of them across
a threshold, nor stops the one whose score is the threshold, so that the thresholds stay what they were. A score within
rounding of a band's edge may stop in one batch and go on in another; all else is as reproducible as without the rule.

Source: Wald, Sequential Tests of Statistical Hypotheses, Annals of Mathematical Statistics 1945, for the idea; the
conformal band is [choice].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memmc.errors import GateRefused
from memmc.scoring.strata import POOLED

if TYPE_CHECKING:
    from memmc.scoring.cross_fit import CrossFit

Floats = NDArray[np.float64]

MIN_PASSES = 2
_TINY, _ROUNDING = 1e-12, 1e-12


@dataclass(frozen=True)
class Stage:
    """A number of passes after which images may stop.

    Attributes:
        passes: so far.
        low, high: band of the ratio of the final score to the stage's.
        scorer_state: the scorer fitted after so many passes.
    """

    passes: int
    low: float
    high: float
    scorer_state: bytes


@dataclass(frozen=True)
class StopRule:
    """When an image needs no further pass.

    Attributes:
        bound: of the probability that the verdict of a normal image differs from that of all passes.
        thresholds: of all passes, by stratum; `POOLED` for every other.
        stages: fewest passes first; the last stage of all passes is not among them.
    """

    bound: float
    thresholds: Mapping[str, float]
    stages: tuple[Stage, ...]

    def stops(self, stage: Stage, scores: Floats, strata: Sequence[str]) -> NDArray[np.bool_]:
        """Return which of B images stop at this stage."""
        near_B = np.zeros(len(scores), bool)
        for thresholds_B in self.thresholds_of(strata):
            near_B |= (scores * stage.low <= thresholds_B) & (thresholds_B <= scores * stage.high)
        return ~near_B

    def thresholds_of(self, strata: Sequence[str]) -> tuple[Floats, Floats]:
        """Return the thresholds that B images are kept from crossing: of their stratum, and of the pooled normals."""
        pooled = self.thresholds[POOLED]
        return np.array([self.thresholds.get(name, pooled) for name in strata]), np.full(len(strata), pooled)

    def scorer_state(self, passes: int | None, final: bytes) -> bytes:
        """Return the scorer that judged an image after so many passes; `final` where they were all."""
        return next((stage.scorer_state for stage in self.stages if stage.passes == passes), final)

    def as_row(self) -> dict[str, Any]:
        """Return the value that the table `calibrations` keeps."""
        thresholds = [{"stratum": name, "threshold": value} for name, value in self.thresholds.items()]
        return {"bound": self.bound, "thresholds": thresholds, "stages": [asdict(stage) for stage in self.stages]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any] | None) -> StopRule | None:
        """Return the rule that `as_row` described; None where every image has all passes."""
        if row is None:
            return None
        thresholds = {item["stratum"]: item["threshold"] for item in row["thresholds"]}
        return cls(row["bound"], thresholds, tuple(Stage(**item) for item in row["stages"]))


def stage_passes(num_patches: int, num_keep: int, passes: int) -> list[int]:
    """Return after how many passes an image may stop, the last being all: halves, while every patch has been hidden."""
    from memmc.scoring.masks import complementary_groups, num_rounds

    groups_GK = complementary_groups(num_patches, num_keep, [b""])
    shown_L = np.cumsum(np.stack([np.isin(np.arange(num_patches), row) for row in groups_GK.numpy()]), axis=0)
    whole = next(count for count, seen_L in enumerate(shown_L, start=1) if (seen_L < count).all())
    found = [num_rounds(passes, num_patches, num_keep) * len(groups_GK)]
    while found[0] // 2 >= max(whole, MIN_PASSES):
        found.insert(0, found[0] // 2)
    return found


def fit_early_stop(
    fits: Mapping[int, CrossFit], final: CrossFit, strata: Sequence[str], thresholds: Mapping[str, float], bound: float
) -> tuple[StopRule, CrossFit]:
    """Return the rule, and what held-out normals score by it.

    Args:
        fits: of every stage but that of all passes, by number of passes.
        final: of all passes.
        strata: (N,) names, of the normals.
        thresholds: of all passes, by stratum.
        bound: of the probability that a normal gets another verdict.

    Raises:
        GateRefused: fewer normals than the bound needs.
    """
    rule = StopRule(bound, dict(thresholds), ())
    limits, ordered = rule.thresholds_of(strata), sorted(fits)
    bands = [_band(fits[n].normal_scores_N, final.normal_scores_N, limits, bound / len(fits)) for n in ordered]
    stages = [Stage(n, *band, fits[n].scorer.state_to_bytes()) for n, band in zip(ordered, bands, strict=True)]
    rule = StopRule(bound, rule.thresholds, tuple(stages))
    scores_N, peaks_N = final.normal_scores_N.copy(), final.normal_peaks_N.copy()
    for stage in reversed(rule.stages):  # the earliest stage that stops an image decides
        fit = fits[stage.passes]
        stopped_N = rule.stops(stage, fit.normal_scores_N, strata)
        scores_N[stopped_N], peaks_N[stopped_N] = fit.normal_scores_N[stopped_N], fit.normal_peaks_N[stopped_N]
    return rule, replace(final, normal_scores_N=scores_N, normal_peaks_N=peaks_N)


def _band(
    stage_scores: Floats, final_scores: Floats, thresholds: Sequence[Floats], bound: float
) -> tuple[float, float]:
    """Return the band of the ratio of final to stage score; see the module."""
    count = len(stage_scores)
    rank = math.ceil((count + 1) * (1 - bound / 2) - 1e-9)
    if rank > count:
        raise GateRefused(
            f"{count} held-out normal images cannot bound a changed verdict so tightly; expected at least "
            f"{math.ceil(2 / bound - 1 - 1e-9)}: add normals, raise score.early_stop, lower score.passes or set "
            "score.early_stop to 0"
        )
    stage = np.maximum(stage_scores, _TINY)
    ratio = np.sort(final_scores / stage)
    low, high = float(ratio[count - rank]), float(ratio[rank - 1])
    for limit in thresholds:
        high = max([high, *(limit / stage)[final_scores >= limit].tolist()])
        low = min([low, *(limit / stage)[final_scores <= limit].tolist()])
    return low * (1 - _ROUNDING), high * (1 + _ROUNDING)
