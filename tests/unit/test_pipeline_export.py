"""Exported score rows: of the newest calibration where it has any, and never ranked among those of another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from watched_lake import START, batch

from memmc.config import Config, load_config
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline import export, select
from memmc.pipeline.models import OpenModel


@pytest.fixture
def site(tmp_path, monkeypatch) -> tuple[Config, list[str], OpenModel]:
    """Four instances of one study: two scored by the old calibration, two by both, the old scores being larger."""
    config = load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])
    lake = Lake(config.lake.uri)
    instances = batch(1, 5, START).drop_columns("study_uid").append_column("study_uid", pa.array(["2.25.1"] * 5))
    uids = instances["sop_instance_uid"].to_pylist()
    lake.append(INSTANCES, instances)
    info = {"cohort": "cxr", "dataset_version": lake.version(INSTANCES), "preprocess_id": "p"}
    model = OpenModel("memmc-cxr/1", "d", tmp_path, info)
    shared = {"model": model.ref, "model_digest": model.digest, "cohort": "cxr", "dataset_version": 0}
    shared |= {"preprocess_id": "p", "scorer": "l1"}
    for number, name in enumerate(("old", "new")):
        row = {**shared, "calibration_id": name, "false_positive_rate": 0.1, "threshold": 1.0, "num_normals": 9}
        row |= {"map_scale": 1.0, "created_at": START + timedelta(days=number), "study_p_values": [0.5] * 19}
        lake.append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]))
    rows = [score(shared, uid, "new", 1.0, 1) for uid in uids[:2]]
    rows += [score(shared, uid, "old", 9.0, 2) for uid in uids[:4]]  # an older calibration's run that ended later
    lake.append(SCORES, pa.Table.from_pylist(rows, schema=SCHEMAS[SCORES]))
    monkeypatch.chdir(tmp_path)
    for module in (export, select):
        monkeypatch.setattr(module, "open_model", lambda *_given: model)
    return config, uids, model


def score(shared: dict[str, Any], uid: str, calibration: str, value: float, days: int) -> dict[str, Any]:
    found = {**shared, "sop_instance_uid": uid, "calibration_id": calibration, "anomaly_score": value, "p_value": 0.5}
    found |= {"is_abnormal": False, "score_spread": 0.0, "study_uid": "2.25.1", "patient_key": "k"}
    return {**found, "scored_at": START + timedelta(days=days), "run": calibration}


def test_the_newest_calibration_comes_first_and_each_row_names_its_own(site):
    config, uids, _ = site
    table = export.export_scores(config, "cxr", None, None)
    assert table.column_names[-1] == "calibration_id"
    rows = table.to_pylist()
    assert [row["calibration_id"] for row in rows] == ["new", "new", "old", "old"]
    assert {row["sop_instance_uid"] for row in rows[:2]} == set(uids[:2])
    assert [row["anomaly_score"] for row in rows] == [1.0, 1.0, 9.0, 9.0]


def test_a_study_counts_all_its_instances(site):
    config, _, _ = site
    (study,) = export.export_scores(config, "cxr", None, None, "study").to_pylist()
    assert (study["num_instances"], study["num_scored"], study["anomaly_score"]) == (5, 2, 1.0)


def test_scores_of_some_instances_are_read_alone(site):
    config, uids, model = site
    assert list(select.score_rows(Lake(config.lake.uri), "cxr", model, "new", uids=uids[1:2])) == [uids[1]]
