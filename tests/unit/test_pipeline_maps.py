"""Pictures of scans that were refused before they were scored: they have a row of each kind."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from watched_lake import SIDE, START, batch

from memmc.config import Config, load_config
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline import cockpit, maps
from memmc.pipeline.models import OpenModel
from memmc.scoring.maps import encode_map

MODEL = OpenModel("memmc-cxr/1", "d", Path(), {"cohort": "cxr", "dataset_version": 1, "preprocess_id": "p"})


@pytest.fixture
def site(tmp_path, monkeypatch) -> tuple[Config, list[str]]:
    """A lake in which each scan has a score, and in the same shard, read after it, the older row of its refusal."""
    config = load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])
    lake = Lake(config.lake.uri)
    instances = batch(1, 4, START)
    uids = instances["sop_instance_uid"].to_pylist()
    lake.append(INSTANCES, instances)
    shared = {"model": MODEL.ref, "model_digest": MODEL.digest, "cohort": "cxr", "dataset_version": 1}
    shared |= {"calibration_id": "c", "preprocess_id": "p", "scorer": "l1"}
    calibration = {**shared, "false_positive_rate": 0.1, "threshold": 1.0, "num_normals": 9, "map_scale": 1.0}
    lake.append(CALIBRATIONS, pa.Table.from_pylist([{**calibration, "created_at": START}]))
    heat = encode_map(np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE))
    score = {"anomaly_score": 1.0, "p_value": 0.5, "is_abnormal": False, "score_spread": 0.0}
    score |= {"anomaly_map": heat, "map_height": SIDE, "map_width": SIDE, "scored_at": START, "run": "score-2"}
    refused = {"not_scored": "QC_OOD", "scored_at": START - timedelta(hours=1), "run": "score-1"}
    rows = [{**shared, "sop_instance_uid": uid, **kind} for kind in (score, refused) for uid in uids]
    lake.append(SCORES, pa.Table.from_pylist(rows, schema=SCHEMAS[SCORES]))
    for module in (cockpit, maps):
        monkeypatch.setattr(module, "open_model", lambda *_arguments: MODEL)
    return config, uids


def test_each_picture_is_that_of_the_score(site, tmp_path):
    config, uids = site
    result = maps.maps(config, "cxr", tmp_path / "pictures")
    assert result.pictures == len(uids)
    for uid in uids:
        assert (tmp_path / "pictures" / f"{uid}.png").read_bytes().startswith(b"\x89PNG")


def test_the_sheet_shows_the_scores(site):
    config, uids = site
    shown = cockpit.most_abnormal(config, "cxr", MODEL.ref, START)
    assert {row["sop_instance_uid"] for row in shown} == set(uids)
    assert cockpit.contact_sheet(config, "cxr", MODEL.ref, shown).startswith(b"\xff\xd8")
