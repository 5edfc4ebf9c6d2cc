"""Two models on the same studies: which change side, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from memmc.evaluation.metrics import Interval, auroc, bootstrap_values, percentile_interval

Change = Literal["flagged", "cleared", "same"]


@dataclass(frozen=True)
class StudyChange:
    """One study under two models.

    Attributes:
        study_uid: pseudonymous.
        label: abnormal, normal or unknown.
        change: flagged where only the second model calls it abnormal, cleared where only the first does.
        p_value_a, p_value_b: of the study.
        shift: log10(p_a / p_b): 1 = ten times less like a normal study under the second model.
    """

    study_uid: str
    label: str
    change: Change
    p_value_a: float
    p_value_b: float
    shift: float


@dataclass(frozen=True)
class AurocDifference:
    """AUROC of both models on the labelled studies, and of the second minus the first, patients resampled in pairs."""

    auroc_a: float
    auroc_b: float
    difference: float
    interval: Interval
    num_normal: int
    num_abnormal: int


def changes(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[StudyChange]:
    """Return the studies on which both models have a verdict, those that change side first, then by how far they moved.

    Args:
        a: study rows (`memmc.scoring.studies.study_rows`) of the first model.
        b: of the second.
    """
    first = {row["study_uid"]: row for row in a if row["is_abnormal"] is not None}
    found: list[StudyChange] = []
    for row in b:
        before = first.get(row["study_uid"])
        if before is None or row["is_abnormal"] is None:
            continue
        sides = (before["is_abnormal"], row["is_abnormal"])
        change: Change = "same" if sides[0] == sides[1] else "flagged" if sides[1] else "cleared"
        shift = float(np.log10(before["p_value"] / row["p_value"]))
        found.append(StudyChange(row["study_uid"], row["label"], change, before["p_value"], row["p_value"], shift))
    return sorted(found, key=lambda item: (item.change == "same", -abs(item.shift), item.study_uid))


def compare_auroc(
    a: Sequence[Mapping[str, Any]],
    b: Sequence[Mapping[str, Any]],
    patients: Mapping[str, str],
    *,
    resamplings: int,
    confidence: float,
    seed: int,
) -> AurocDifference | None:
    """Return the paired difference in AUROC over the labelled studies of both; None where a class is missing.

    The p-values of a study rank it: they mean the same under both models, while scores do not.

    Args:
        a: study rows of the first model.
        b: of the second.
        patients: patient by study.
        resamplings: of patients.
        confidence: of the interval.
        seed: of the bootstrap.
    """
    first = {row["study_uid"]: row for row in a if row["p_value"] is not None and row["label"] != "unknown"}
    pairs = [(first[row["study_uid"]], row) for row in b if row["study_uid"] in first and row["p_value"] is not None]
    labels = [row["label"] == "abnormal" for _, row in pairs]
    if not any(labels) or all(labels):
        return None
    keys = [patients[row["study_uid"]] for _, row in pairs]
    scores = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    values = [bootstrap_values(labels, score, keys, auroc, resamplings, seed) for score in scores]
    areas = [auroc(labels, score) for score in scores]
    return AurocDifference(
        auroc_a=areas[0],
        auroc_b=areas[1],
        difference=areas[1] - areas[0],
        interval=percentile_interval(values[1] - values[0], confidence),
        num_normal=len(labels) - sum(labels),
        num_abnormal=sum(labels),
    )


def _ranks(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return rank by p-value, ties broken by score, so that studies beyond every normal one are still told apart."""
    order = {key: rank for rank, key in enumerate(sorted({(-row["p_value"], row["anomaly_score"]) for row in rows}))}
    return [float(order[-row["p_value"], row["anomaly_score"]]) for row in rows]
