"""The model on parts of the images: sex, age band, view, scanner. Small parts say little; their intervals say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memmc.evaluation.metrics import Interval, auroc, patient_bootstrap
from memmc.evaluation.report_data import GroupResult

NOT_STATED = "not stated"
GROUPINGS: Mapping[str, str] = {
    "patient_sex": "sex",
    "patient_age_years": "age band",
    "view_position": "view position",
    "manufacturer": "manufacturer",
}
AGE_BANDS = ((0, 17), (18, 39), (40, 59), (60, 79))  # years; older is the last band
MIN_PATIENTS = 5  # of each class: below, resampling patients says nothing


def group_of(column: str, value: Any) -> str:
    """Return the part an image belongs to by one of its values."""
    if value is None or value == "":
        return NOT_STATED
    if column != "patient_age_years":
        return str(value)
    return next((f"{low} - {high}" for low, high in AGE_BANDS if low <= value <= high), "80 and over")


def subgroups(
    rows: Sequence[Mapping[str, Any]], *, resamplings: int, confidence: float, seed: int
) -> tuple[GroupResult, ...]:
    """Return the model's figures per part, where a grouping has at least two parts.

    Args:
        rows: labelled and scored instances: columns of `GROUPINGS`, label, anomaly_score, is_abnormal, patient_key.
        resamplings: of patients, within a part.
        confidence: of the AUROC's interval; a part with fewer than 5 patients of a class has none.
        seed: of the bootstrap.
    """
    found: list[GroupResult] = []
    for column, title in GROUPINGS.items():
        names = [group_of(column, row[column]) for row in rows]
        if len(set(names)) < 2:
            continue
        for name in sorted(set(names)):
            mine = [row for row, group in zip(rows, names, strict=True) if group == name]
            found.append(_group(title, name, mine, resamplings, confidence, seed))
    return tuple(found)


def _group(
    title: str, name: str, rows: list[Mapping[str, Any]], resamplings: int, confidence: float, seed: int
) -> GroupResult:
    labels = [row["label"] == "abnormal" for row in rows]
    scores = [row["anomaly_score"] for row in rows]
    patients = [row["patient_key"] for row in rows]
    flagged = {kind: [row["is_abnormal"] for row in rows if row["label"] == kind] for kind in ("normal", "abnormal")}
    area: float | None = None
    interval: Interval | None = None
    if all(flagged.values()):
        area = auroc(labels, scores)
        people = [len({row["patient_key"] for row in rows if row["label"] == kind}) for kind in flagged]
        if min(people) >= MIN_PATIENTS:
            interval = patient_bootstrap(labels, scores, patients, auroc, resamplings, confidence, seed)
    return GroupResult(
        grouping=title,
        group=name,
        num_normal=len(flagged["normal"]),
        num_abnormal=len(flagged["abnormal"]),
        auroc=area,
        interval=interval,
        sensitivity=_share(flagged["abnormal"]),
        false_positive_rate=_share(flagged["normal"]),
    )


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
