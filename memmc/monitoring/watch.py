"""Silence is an alarm: what must have happened lately, and what must not look as it does.

Every rule takes facts and returns an alarm or None. No fact is of a patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np

from memmc.config import MonitorConfig

AlarmName = Literal[
    "no_data",
    "constant_scores",
    "broken_weights",
    "no_champion",
    "stale_alias",
    "old_champion",
    "scoring_backlog",
    "quarantine_rate",
    "damaged_data",
    "preprocess_mismatch",
    "golden_set",
    "canary_sensitivity",
    "drift",
]

TO_DO: dict[AlarmName, str] = {
    "no_data": "look at the source and the ingest schedule: is the archive reachable, has the last ingest run failed?",
    "constant_scores": "write no results back; score the golden set, then roll back to the champion before",
    "broken_weights": "write no results back; roll back to the champion before (memmc rollback) and train again",
    "no_champion": "promote a model (memmc promote), or register the one that is meant",
    "stale_alias": "score with the champion again (memmc score), or put the alias back on the model in use",
    "old_champion": "train on newer normals (memmc retrain), or raise monitor.max_model_age_days",
    "scoring_backlog": "look at the score schedule and its last run, then run memmc score",
    "quarantine_rate": "look at the reasons of the last ingest: a device or an archive may write otherwise now",
    "damaged_data": "restore the shards that are named from a copy (memmc lake verify lists all), then look again",
    "preprocess_mismatch": "ingest with the data.* settings of the model, or train on this cohort",
    "golden_set": "write no results back: the same images score otherwise; look for a changed library, device or model",
    "canary_sensitivity": "look at drift; calibrate or train again before trusting a negative result",
    "drift": "look at what has changed; calibrate anew for a new scanner, train anew where the images changed",
}
_FEW = 10  # scores or objects on which nothing is said
_CERTAIN = 1e-3


@dataclass(frozen=True)
class Alarm:
    """Something is wrong: its name, what was found, what to do."""

    name: AlarmName
    found: str
    to_do: str

    @classmethod
    def of(cls, name: AlarmName, found: str) -> Alarm:
        """Return the alarm with the advice that belongs to its name."""
        return cls(name, found, TO_DO[name])


@dataclass(frozen=True)
class Weights:
    """The weight matrices of a model: how many there are, and how many hold one value only; or why it cannot load."""

    matrices: int
    constant: int
    error: str | None = None


def no_data(newest: datetime | None, now: datetime, rules: MonitorConfig) -> Alarm | None:
    """Alarm when nothing was stored for too long, or ever."""
    if newest is None:
        return Alarm.of("no_data", "nothing was ever stored")
    hours = (now - newest).total_seconds() / 3600
    if hours <= rules.max_silence_hours:
        return None
    return Alarm.of(
        "no_data", f"the newest instance is {hours:.0f} h old, at most {rules.max_silence_hours:g} h expected"
    )


def constant_scores(scores: Sequence[float]) -> Alarm | None:
    """Alarm when more than half of the latest scores are one value: images never are."""
    if len(scores) < _FEW:
        return None
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all():
        return Alarm.of(
            "constant_scores", f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite"
        )
    # Scores that differ by rounding alone are one value.
    scale = max(float(np.abs(values).max()), 1e-12)
    _, counts = np.unique(np.round(values / scale, 9), return_counts=True)
    if counts.max() <= values.size / 2:
        return None
    return Alarm.of("constant_scores", f"{counts.max()} of the latest {values.size} scores are the same")


def broken_weights(weights: Weights) -> Alarm | None:
    """Alarm when the weights cannot be loaded (not a number, cut off, another digest) or half of them are constant."""
    if weights.error is not None:
        return Alarm.of("broken_weights", weights.error)
    if 2 * weights.constant <= weights.matrices:
        return None
    return Alarm.of("broken_weights", f"{weights.constant} of {weights.matrices} weight matrices hold one value only")


def stale_alias(champion: str | None, used: Sequence[str]) -> Alarm | None:
    """Alarm when there is no champion, or the latest scores are none of its.

    Args:
        champion: name/version that holds the alias.
        used: models behind the latest scores, the newest first.
    """
    if champion is None:
        return Alarm.of("no_champion", "no model holds the alias champion")
    if not used or champion in used:
        return None
    return Alarm.of("stale_alias", f"the champion is {champion}, the latest scores are of {used[0]}")


def old_champion(trained: datetime | None, now: datetime, rules: MonitorConfig) -> Alarm | None:
    """Alarm when the champion was trained too long ago."""
    if trained is None or (now - trained).total_seconds() / 86400 <= rules.max_model_age_days:
        return None
    days = (now - trained).total_seconds() / 86400
    return Alarm.of(
        "old_champion", f"the champion is {days:.0f} days old, at most {rules.max_model_age_days:g} expected"
    )


def scoring_backlog(unscored: Sequence[datetime], now: datetime, rules: MonitorConfig) -> Alarm | None:
    """Alarm when instances have waited for a score for too long; takes when each unscored one was stored."""
    late = [moment for moment in unscored if (now - moment).total_seconds() / 3600 > rules.max_backlog_hours]
    if not late:
        return None
    return Alarm.of("scoring_backlog", f"{len(late)} instances have no score after {rules.max_backlog_hours:g} h")


def quarantine_rate(before: tuple[int, int], window: tuple[int, int], rules: MonitorConfig) -> Alarm | None:
    """Alarm when the quarantined share of a window is far above that of before; takes (quarantined, seen) of both."""
    from scipy.stats import fisher_exact

    if min(before[1], window[1]) < _FEW:
        return None
    old, new = before[0] / before[1], window[0] / window[1]
    table = [[window[0], window[1] - window[0]], [before[0], before[1] - before[0]]]
    chance = float(fisher_exact(table, alternative="greater").pvalue)  # type: ignore[union-attr]
    if new < rules.quarantine_factor * old or chance > _CERTAIN:
        return None
    return Alarm.of("quarantine_rate", f"{new:.1%} of the latest {window[1]} objects are quarantined, {old:.1%} before")
