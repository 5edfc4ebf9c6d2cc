"""The gates between a trained model and the champion's place: figures in, verdicts out; nothing is measured here.

Against a champion a gate asks what would be lost; before the first one it asks for a least figure. A gate without the
data it needs is `not applicable` and says why: it neither passes nor holds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.config import PromoteConfig
from memmc.evaluation.comparison import AurocDifference
from memmc.evaluation.metrics import Interval, percentile_interval, proportion_interval

Verdict = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class Gate:
    """One question and its answer.

    Attributes:
        name: of the gate.
        measured: the figure, None where there is none.
        limit: what it was held against, None where there is none.
        verdict: of the gate.
        why: the figures in words; for `not applicable`, what is missing.
    """

    name: str
    measured: float | None
    limit: float | None
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Area:
    """AUROC of one model on labelled cases."""

    auroc: float
    interval: Interval
    num_normal: int
    num_abnormal: int


QUALITY = ("auroc", "planted lesions")
"""The gates that say whether a model finds anything: without one of them none is promoted."""


def passed(gates: Sequence[Gate]) -> bool:
    """Return whether no gate fails, and one that says whether the model finds anything could be asked."""
    found = any(gate.verdict == "pass" and gate.name in QUALITY for gate in gates)
    return found and all(gate.verdict != "fail" for gate in gates)


def refusal(gates: Sequence[Gate]) -> str:
    """Return the gates that fail, in words; else those that could not be asked."""
    failed = [gate for gate in gates if gate.verdict == "fail"]
    return "; ".join(f"{gate.name}: {gate.why}" for gate in failed or gates if failed or gate.name in QUALITY)


def labelled_gate(alone: Area | None, against: AurocDifference | None, rules: PromoteConfig) -> Gate:
    """Judge AUROC on labelled studies: a certain loss beyond the margin against the champion, else a least value.

    Args:
        alone: of the challenger; None where a class is missing.
        against: champion first, challenger second, on the same studies; None without a champion.
    """
    name = "auroc"
    found = against or alone
    fewest = min(found.num_normal, found.num_abnormal) if found else 0
    if found is None or fewest < rules.min_labelled:
        counts = f"{found.num_normal} normal and {found.num_abnormal} abnormal" if found else "no"
        why = f"{counts} labelled cases of unmet patients, {rules.min_labelled} of each are needed"
        return Gate(name, None, None, "not applicable", why)
    if against is not None:
        low, high = against.interval.low, against.interval.high
        limit = -rules.max_auroc_loss
        why = (
            f"{against.auroc_a:.3f} -> {against.auroc_b:.3f}, difference {against.difference:+.3f} "
            f"({low:+.3f} to {high:+.3f}), refused when certainly below {limit:+.3f}"
        )
        return Gate(name, against.difference, limit, "fail" if high < limit else "pass", why)
    assert alone is not None
    why = f"{alone.auroc:.3f} ({alone.interval.low:.3f} to {alone.interval.high:.3f}), at least {rules.min_auroc:.3f}"
    return Gate(name, alone.auroc, rules.min_auroc, _at_least(alone.auroc, rules.min_auroc), why)


def sensitivity_gate(
    found: ArrayLike,
    champion: ArrayLike | None,
    patients: Sequence[str],
    rules: PromoteConfig,
    *,
    resamplings: int,
    seed: int,
) -> Gate:
    """Judge how many planted lesions lie above the calibrated threshold.

    Args:
        found: (N,) by the challenger.
        champion: (N,) by the champion, of the same lesions in the same images; None without a champion.
        patients: (N,) keys; images of one are resampled together.
        resamplings: of patients.
        seed: of the bootstrap.
    """
    name = "planted lesions"
    found_N = np.asarray(found, bool)
    if len(found_N) < rules.min_probes:
        why = f"{len(found_N)} held-out normal images to plant lesions in, {rules.min_probes} are needed"
        return Gate(name, None, None, "not applicable", why)
    share = float(found_N.mean())
    interval = proportion_interval(int(found_N.sum()), len(found_N), rules.confidence)
    if share < rules.min_sensitivity or champion is None:
        why = f"{share:.1%} found ({interval.low:.1%} to {interval.high:.1%}), at least {rules.min_sensitivity:.1%}"
        return Gate(name, share, rules.min_sensitivity, _at_least(share, rules.min_sensitivity), why)
    champion_N = np.asarray(champion, bool)
    differences = paired_differences(found_N, champion_N, patients, resamplings, seed)
    between = percentile_interval(differences, rules.confidence)
    limit = -rules.max_sensitivity_loss
    why = (
        f"{champion_N.mean():.1%} -> {share:.1%} found, difference "
        f"({between.low:+.1%} to {between.high:+.1%}), refused when certainly below {limit:+.1%}"
    )
    return Gate(name, share - float(champion_N.mean()), limit, "fail" if between.high < limit else "pass", why)


def paired_differences(
    found_N: NDArray[np.bool_], champion_N: NDArray[np.bool_], patients: Sequence[str], resamplings: int, seed: int
) -> NDArray[np.float64]:
    """Return the difference in share found, challenger less champion, of each resampling of patients, (R,)."""
    keys, patient_N = np.unique(np.asarray(patients), return_inverse=True)
    gain_P = np.bincount(patient_N, weights=found_N.astype(float) - champion_N, minlength=len(keys))
    images_P = np.bincount(patient_N, minlength=len(keys))
    draws_RP = np.random.default_rng(seed).multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=resamplings)
    return (draws_RP @ gain_P) / (draws_RP @ images_P)


def false_positive_gate(
    flagged: int, num_normal: int, promised: tuple[float, float], rate: float, rules: PromoteConfig
) -> Gate:
    """Judge whether held-out normals are flagged as often as the calibration promised, neither more nor less.

    Far fewer than promised means that the normals it was calibrated on were not like these: abnormal ones among them
    raise the threshold.

    Args:
        flagged: normals above the threshold of their stratum.
        num_normal: held-out normals, one a patient: the interval takes them as independent.
        promised: interval of the observed rate (`scoring.calibration.observed_rate_interval`).
        rate: that the threshold was set for.
    """
    name = "false positives"
    if num_normal < rules.min_probes:
        why = f"held-out normal images of {num_normal} patients, {rules.min_probes} are needed"
        return Gate(name, None, None, "not applicable", why)
    observed = flagged / num_normal
    low, high = promised
    why = (
        f"{flagged} of {num_normal} held-out normals flagged, one a patient, {observed:.1%}; {rate:.1%} promised, "
        f"{low:.1%} to {high:.1%} expected"
    )
    inside = low - 1e-12 <= observed <= high + 1e-12
    return Gate(name, observed, high if observed >= rate else low, "pass" if inside else "fail", why)


def learning_gate(error: float, error_of_mean: float, rules: PromoteConfig) -> Gate:
    """Judge whether hidden patches are predicted better than by one grey everywhere.

    Args:
        error: mean absolute error on hidden patches of held-out normals.
        error_of_mean: of the mean grey, on the same images.
    """
    ratio = error / error_of_mean if error_of_mean > 0 and np.isfinite(error) else float("inf")
    why = f"error on hidden patches {error:.4f}, of the mean grey {error_of_mean:.4f}: {ratio:.2f} of it"
    why += f", at most {rules.max_error_ratio:.2f}"
    verdict: Verdict = "pass" if ratio <= rules.max_error_ratio else "fail"
    return Gate("learned", ratio if np.isfinite(ratio) else None, rules.max_error_ratio, verdict, why)


def memory_gate(slots_used: Sequence[float], rules: PromoteConfig) -> Gate:
    """Judge whether a memory is in use at all: dead slots, or all attention on one.

    Args:
        slots_used: share of slots in use, by encoder layer; empty without a memory.
    """
    if not slots_used:
        return Gate("memory", None, None, "not applicable", "the model has no memory")
    best = max(slots_used)
    shares = ", ".join(f"{share:.0%}" for share in slots_used)
    why = f"slots in use by layer {shares}; at least {rules.min_slots_used:.0%} in one of them"
    return Gate("memory", best, rules.min_slots_used, _at_least(best, rules.min_slots_used), why)


def migration_gate(
    flagged: int, cleared: int, num_studies: int, rules: PromoteConfig, *, unjudged: str | None = None
) -> Gate:
    """Judge how many studies change side.

    Args:
        flagged: abnormal under the challenger only.
        cleared: abnormal under the champion only.
        num_studies: on which both have a verdict.
        unjudged: why there is none, if that is known.
    """
    if not num_studies:
        return Gate("migration", None, None, "not applicable", unjudged or "no study has a verdict of both models")
    share = (flagged + cleared) / num_studies
    why = f"{flagged} newly abnormal and {cleared} no longer, of {num_studies} studies; at most {rules.max_changed:.0%}"
    return Gate("migration", share, rules.max_changed, "pass" if share <= rules.max_changed else "fail", why)


def parity_gate(
    differences: Mapping[str, float], limit: float, refused: str | None, unasked: str = "promote.parity names no format"
) -> Gate:
    """Judge whether exported files score as the lake does.

    Args:
        differences: largest difference in score by file, as a share of the score's scale.
        limit: of `differences`.
        refused: why an export was refused.
        unasked: why there are no differences.
    """
    if refused is not None:
        return Gate("export parity", None, limit, "fail", refused)
    if not differences:
        return Gate("export parity", None, None, "not applicable", unasked)
    worst = max(differences.values())
    files = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return Gate("export parity", worst, limit, "pass" if worst <= limit else "fail", f"score differs by {files}")


def speed_gate(seconds: float, champion_seconds: float | None, images: int, rules: PromoteConfig) -> Gate:
    """Judge the time to score against the champion's.

    Args:
        seconds: for `images` images.
        champion_seconds: for the same images in turn; None without a champion.
        images: scored.
    """
    pace = f"{images / max(seconds, 1e-9):.0f} images/s"
    if champion_seconds is None:
        return Gate("speed", None, None, "not applicable", f"{pace}; no champion to compare with")
    ratio = seconds / max(champion_seconds, 1e-9)
    why = f"{pace}, {ratio:.2f} times the champion's time, at most {rules.max_slowdown:.2f}"
    return Gate("speed", ratio, rules.max_slowdown, "pass" if ratio <= rules.max_slowdown else "fail", why)


def _at_least(value: float, limit: float) -> Verdict:
    return "pass" if value >= limit else "fail"
