"""From instances to studies: a study is as abnormal as its most abnormal image, judged against normal studies.

The smallest of several p-values is small more often than one is, the more so the more images a study has. So it is
no p-value itself; it is compared with the smallest p-values of held-out normal studies, which gives one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.scoring.calibration import Floats, p_values, smallest_rate
from memmc.scoring.strata import Judge


def study_minima(p_values_N: ArrayLike, studies: Sequence[str]) -> dict[str, float]:
    """Return each study's smallest p-value."""
    found: dict[str, float] = {}
    for study, value in zip(studies, np.asarray(p_values_N, np.float64).tolist(), strict=True):
        found[study] = min(value, found.get(study, 1.0))
    return found


def normal_study_minima(
    judge: Judge, scores: ArrayLike, strata: Sequence[str], studies: Sequence[str]
) -> NDArray[np.float64]:
    """Return the smallest p-value of each held-out normal study, sorted.

    A held-out image is among the normals that judge it, which raises its p-value by at most 1 / (n + 1) over that of a
    new image with the same score.

    Args:
        judge: fitted on the same images.
        scores: (N,) out of fold.
        strata: (N,)
        studies: (N,) keys.
    """
    verdicts = judge.judge(scores, strata)
    counts = np.array([len(judge.strata[name].normal_scores) + 1 for name in verdicts.stratum_B])
    return np.sort(np.array(list(study_minima(verdicts.p_value_B - 1 / counts, studies).values())))


def study_p_values(minima: ArrayLike, normal_minima: ArrayLike) -> Floats:
    """Return the conformal p-value of studies from their smallest instance p-values; small is abnormal.

    Raises:
        DataError: no normal study.
    """
    return p_values(-np.asarray(minima, np.float64), -np.asarray(normal_minima, np.float64))


def why_no_verdict(normal_minima: Sequence[float] | None, rate: float) -> str | None:
    """Return why studies get no verdict at a rate; None where they do.

    No p-value from m normal studies is below 1 / (m + 1): at a smaller rate no study could ever be abnormal. There are
    fewer studies than images, so a rate that the images carry may be too small for them.
    """
    count = len(normal_minima or ())
    if count and smallest_rate(count) <= rate + 1e-12:
        return None
    needed = math.ceil(1.0 / rate - 1.0 - 1e-9)
    return f"{count} held-out normal studies, {needed} are needed for a false-positive rate of {rate:g} of studies"


def study_label(labels: Sequence[str]) -> str:
    """Return abnormal where an image is, normal where all are, else unknown."""
    if "abnormal" in labels:
        return "abnormal"
    return "normal" if set(labels) == {"normal"} else "unknown"


def study_rows(
    instances: Sequence[Mapping[str, Any]],
    normal_minima: Sequence[float] | None,
    rate: float,
    sizes: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per study, most abnormal first; studies without a score last.

    Args:
        instances: score rows with `study_uid`, `sop_instance_uid`, `p_value`, `label`, `split`, `not_scored`; one
            without a study is a study of its own.
        normal_minima: of the calibration; without them a study has no p-value and no verdict, and with too few for the
            rate it has no verdict (`why_no_verdict`).
        rate: false-positive rate, of studies.
        sizes: all instances of a study, where more than the given ones are its.
    """
    judged = why_no_verdict(normal_minima, rate) is None
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in instances:
        groups.setdefault(row["study_uid"] or row["sop_instance_uid"], []).append(row)
    found: list[dict[str, Any]] = []
    for study, rows in groups.items():
        scored = [row for row in rows if row["not_scored"] is None]
        worst = min(scored, key=lambda row: (row["p_value"], -row["anomaly_score"]), default=None)
        p_value = study_p_values([worst["p_value"]], normal_minima)[0] if worst and normal_minima else None
        found.append(
            {
                "study_uid": study,
                "label": study_label([row["label"] for row in rows]),
                "split": rows[0]["split"],
                "num_instances": max(len(rows), (sizes or {}).get(study, 0)),
                "num_scored": len(scored),
                "worst_instance": worst["sop_instance_uid"] if worst else None,
                "anomaly_score": worst["anomaly_score"] if worst else None,
                "min_p_value": worst["p_value"] if worst else None,
                "p_value": None if p_value is None else float(p_value),
                "is_abnormal": None if p_value is None or not judged else bool(p_value <= rate + 1e-12),
                "model": rows[0]["model"],
                "not_scored": None if worst else rows[0]["not_scored"],
            }
        )
    found.sort(key=lambda row: (row["num_scored"] == 0, row["min_p_value"] or 0, -(row["anomaly_score"] or 0)))
    return found
