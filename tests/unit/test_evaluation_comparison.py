"""Two models on the same studies."""

from __future__ import annotations

import judged_lake
import numpy as np
import pyarrow as pa
import pytest
from watched_lake import START, batch

from memmc.cli.comparing import summary
from memmc.evaluation.comparison import changes, compare_auroc
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, QUALITY, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline import compare as module
from memmc.pipeline import select
from memmc.pipeline.compare import CompareResult

SETTINGS = {"resamplings": 200, "confidence": 0.95, "seed": 0}


def study(uid: str, p_value: float | None, label: str = "normal", score: float = 0.0) -> dict:
    flagged = None if p_value is None else p_value <= 0.05
    return {"study_uid": uid, "label": label, "p_value": p_value, "is_abnormal": flagged, "anomaly_score": score}


def test_studies_that_change_side_come_first_and_unjudged_ones_not_at_all():
    a = [study("s1", 0.5), study("s2", 0.04), study("s3", 0.9), study("s4", 0.01), study("s5", None), study("s6", 0.1)]
    b = [study("s1", 0.005), study("s2", 0.4), study("s3", 0.09), study("s4", 0.01), study("s5", 0.01)]
    found = changes(a, b)
    assert [(item.study_uid, item.change) for item in found] == [
        ("s1", "flagged"), ("s2", "cleared"), ("s3", "same"), ("s4", "same"),
    ]  # fmt: skip
    assert found[0].shift == pytest.approx(2.0) and found[1].shift == pytest.approx(-1.0)


def test_a_study_without_a_verdict_has_not_stayed_on_its_side():
    unjudged = {**study("s1", 0.04), "is_abnormal": None}
    assert changes([unjudged, study("s2", 0.5)], [study("s1", 0.5), study("s2", 0.5)])[0].study_uid == "s2"
    assert changes([study("s1", 0.5)], [unjudged]) == []


def test_a_better_model_is_better_and_the_same_model_is_not():
    rng = np.random.default_rng(0)
    labels = ["abnormal" if index % 2 else "normal" for index in range(200)]
    patients = {f"s{index}": f"p{index // 2}" for index in range(200)}

    def rows(power: float) -> list[dict]:
        values = rng.uniform(size=200)
        return [
            study(f"s{index}", float(value ** (power if label == "abnormal" else 1.0)), label)
            for index, (value, label) in enumerate(zip(values, labels, strict=True))
        ]

    poor, good = rows(1.2), rows(5.0)
    better = compare_auroc(poor, good, patients, **SETTINGS)
    assert better and better.interval.low > 0 and (better.num_normal, better.num_abnormal) == (100, 100)
    same = compare_auroc(good, good, patients, **SETTINGS)
    assert same and same.difference == same.interval.low == same.interval.high == 0.0
    assert compare_auroc([study("s1", 0.1)], [study("s1", 0.2)], patients, **SETTINGS) is None


def test_among_equal_p_values_the_score_still_ranks():
    rows = [study("s1", 0.01, "abnormal", 9.0), study("s2", 0.01, "normal", 3.0)]
    found = compare_auroc(rows, rows, {"s1": "p1", "s2": "p2"}, **SETTINGS)
    assert found and found.auroc_a == 1.0


def test_the_summary_names_what_moved():
    moved = {"change": "flagged", "label": "normal", "p_value_a": 0.5, "p_value_b": 0.001, "study_uid": "2.25.1"}
    result = CompareResult("m/1", "m/2", "c", 30, 25, 0, 1, 26, None, [moved] * 25)
    text = summary(result)
    assert "25 newly abnormal, 0 no longer" in text and "p 0.5000 -> 0.0010" in text and "and 5 more" in text


def test_too_few_normal_studies_are_said_and_copies_are_not_unseen(tmp_path, monkeypatch):
    config, model = judged_lake.unscored(tmp_path)
    lake = Lake(config.lake.uri)
    (row,) = lake.read(CALIBRATIONS, SCHEMAS[CALIBRATIONS].names).to_pylist()
    row |= {"calibration_id": "n", "study_p_values": [0.1, 0.5, 0.9], "created_at": START.replace(year=2027)}
    lake.append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]))
    rows = [row for label in ("normal", "abnormal") for row in seen(label)]
    lake.append(INSTANCES, pa.Table.from_pylist(rows, schema=SCHEMAS[INSTANCES]))
    scores = [scored(row, model.digest) for row in rows]
    lake.append(SCORES, pa.Table.from_pylist(scores, schema=SCHEMAS[SCORES]))
    for place in (module, select):
        monkeypatch.setattr(place, "open_model", lambda *_given: model)
    monkeypatch.setattr("memmc.pipeline.score.score_all", lambda *_given, **_named: None)
    found = module.compare(config, model.ref, model.ref, "prod")
    assert (found.num_studies, found.studies) == (0, [])
    assert "3 held-out normal studies, 9 are needed" in str(found.unjudged)
    assert found.quality is not None and (found.quality["num_normal"], found.quality["num_abnormal"]) == (6, 6)

    flags = {"cohort": "prod", "sop_instance_uid": rows[0]["sop_instance_uid"], "flags": ["QC_DUPLICATE_PIXELS"]}
    flags |= {"patient_key": "k", "perceptual_hash": "0" * 16, "thumbnail": b"", "gate_id": "g", "run": "r"}
    lake.append(QUALITY, pa.Table.from_pylist([{**flags, "gated_at": START}], schema=SCHEMAS[QUALITY]))
    found = module.compare(config, model.ref, model.ref, "prod")
    assert found.quality is not None and (found.quality["num_normal"], found.quality["num_abnormal"]) == (5, 6)


def seen(label: str) -> list[dict]:
    rows = batch(len(label), 6, START, cohort="prod", label=label, split="test").to_pylist()
    return [{**row, "study_uid": f"{row['study_uid']}.{len(label)}"} for row in rows]


def scored(row: dict, digest: str) -> dict:
    found = {name: row[name] for name in ("cohort", "sop_instance_uid", "patient_key", "study_uid", "preprocess_id")}
    found |= {"model": "m/1", "model_digest": digest, "calibration_id": "n", "scorer": "l1", "dataset_version": 1}
    found |= {"anomaly_score": 1.0, "p_value": 0.5, "is_abnormal": False, "score_spread": 0.0}
    return {**found, "run": "r", "scored_at": START}
