"""Studies: the most abnormal image decides, against normal studies and not against normal images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.scoring.strata import Judge, fit_strata
from memmc.scoring.studies import (
    normal_study_minima,
    study_label,
    study_minima,
    study_p_values,
    study_rows,
    why_no_verdict,
)

RATE = 0.1


def judged(seed: int, studies: int, images: int) -> tuple[Judge, np.ndarray, list[str], list[str]]:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(studies * images)
    keys = [f"s{index // images}" for index in range(len(scores))]
    names = ["pooled"] * len(scores)
    return Judge.of(RATE, (), fit_strata(scores, names, keys, (), RATE, 20)), scores, names, keys


def test_normal_studies_are_flagged_at_the_rate_where_images_alone_flag_many_more():
    by_study, by_image = [], []
    for seed in range(60):
        judge, scores, names, keys = judged(seed, studies=100, images=4)
        minima = normal_study_minima(judge, scores, names, keys)
        assert len(minima) == 100
        new = np.random.default_rng(1000 + seed).standard_normal(400)
        p_values = judge.judge(new, names).p_value_B
        found = np.array(list(study_minima(p_values, keys).values()))
        by_study.append(np.mean(study_p_values(found, minima) <= RATE))
        by_image.append(np.mean(found <= RATE))
    error = np.std(by_study) / np.sqrt(len(by_study))
    assert np.mean(by_study) == pytest.approx(0.1, abs=0.01 + 3 * error)
    assert np.mean(by_image) > 0.3  # 1 - 0.9^4: the smallest p-value is no p-value


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 21).map(lambda value: value / 21), min_size=5, max_size=40))
def test_a_smaller_minimum_never_has_the_larger_p_value(normal_minima: list[float]):
    grid = np.linspace(0.01, 1.0, 30)
    values = study_p_values(grid, normal_minima)
    assert (np.diff(values) >= 0).all() and (values > 0).all() and (values <= 1).all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["normal", "abnormal"], "abnormal"), (["normal", "normal"], "normal"), (["normal", "unknown"], "unknown")],
)
def test_an_abnormal_image_makes_an_abnormal_study(labels: list[str], expected: str):
    assert study_label(labels) == expected


def instance(uid: str, study: str | None, p_value: float | None, label: str = "normal") -> dict:
    score = None if p_value is None else 1 - p_value
    reason = "SELECT_VIEW" if p_value is None else None
    row = {"sop_instance_uid": uid, "study_uid": study, "p_value": p_value, "anomaly_score": score, "label": label}
    return {**row, "split": "test", "model": "m/1", "not_scored": reason}


def test_one_row_per_study_the_most_abnormal_first_and_the_unscored_last():
    rows = study_rows(
        [
            instance("a1", "A", 0.5), instance("a2", "A", 0.02, "abnormal"), instance("a3", "A", None),
            instance("b1", "B", 0.3), instance("c1", None, 0.01), instance("d1", "D", None),
        ],
        [index / 20 for index in range(1, 21)],
        RATE,
    )  # fmt: skip
    assert [row["study_uid"] for row in rows] == ["c1", "A", "B", "D"]
    a, d = rows[1], rows[3]
    assert (a["num_instances"], a["num_scored"], a["worst_instance"], a["label"]) == (3, 2, "a2", "abnormal")
    assert a["is_abnormal"] and a["p_value"] == pytest.approx(1 / 21)
    assert (d["num_scored"], d["p_value"], d["is_abnormal"], d["not_scored"]) == (0, None, None, "SELECT_VIEW")
    sized = study_rows([instance("a1", "A", 0.5)], None, RATE, {"A": 4})
    assert sized[0]["num_instances"] == 4
    without = study_rows([instance("b1", "B", 0.3)], None, RATE)
    assert (without[0]["min_p_value"], without[0]["p_value"], without[0]["is_abnormal"]) == (0.3, None, None)


@pytest.mark.parametrize(("count", "judged"), [(9, True), (8, False), (1, False)])
def test_too_few_normal_studies_for_the_rate_give_no_verdict_rather_than_normal_for_ever(count: int, judged: bool):
    minima = [index / 20 for index in range(1, count + 1)]
    (row,) = study_rows([instance("a1", "A", 0.0001)], minima, RATE)
    assert row["p_value"] == pytest.approx(1 / (count + 1))
    assert row["is_abnormal"] is (True if judged else None)
    why = why_no_verdict(minima, RATE)
    assert (why is None) == judged
    assert judged or f"{count} held-out normal studies, 9 are needed" in str(why)
