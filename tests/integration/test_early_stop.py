"""Early stop from calibration to the rows, on the lake of the whole way."""

from __future__ import annotations

import shutil

import pytest

from memmc.config import load_config
from memmc.errors import UsageError
from memmc.lake.tables import Lake
from memmc.pipeline.calibrate import calibrate
from memmc.pipeline.package import package
from memmc.pipeline.score import score
from memmc.pipeline.select import newest_calibration, unmet
from memmc.pipeline.why import why

pytestmark = pytest.mark.slow


def test_scores_stop_by_the_rule_of_their_calibration(inside, settings, tmp_path):
    from memmc.pipeline.identity import home_directory
    from memmc.pipeline.models import open_model

    shutil.copytree("lake", tmp_path / "lake", ignore=shutil.ignore_patterns("training", "reports"))
    config = load_config(overrides=[*settings, f"lake.uri={tmp_path / 'lake'}", "score.num_actors=1"])
    ref, lake = inside.trained.model, Lake(config.lake.uri)
    score(config, "cxr", ref)
    before = _rows(lake, newest_calibration(lake, open_model(config, home_directory(), ref))["calibration_id"])
    assert {row["passes_used"] for row in before.values()} == {4}
    stopping = load_config(
        overrides=[*settings, f"lake.uri={tmp_path / 'lake'}", "score.num_actors=1", "score.early_stop=0.2"]
    )
    made = calibrate(stopping, None, ref)
    score(config, "cxr", ref)  # the calibration says when to stop, not the setting of the day
    after = _rows(lake, made.calibration_id)
    assert after.keys() == before.keys()
    assert {2} <= {row["passes_used"] for row in after.values()} <= {2, 4}  # all at 2 where every verdict is certain
    model = open_model(config, home_directory(), ref)
    known = {row["sop_instance_uid"] for row in unmet(lake, model, "cxr") if row["label"] == "normal"}
    assert known
    changed = [uid for uid in known if after[uid]["is_abnormal"] != before[uid]["is_abnormal"]]
    assert len(changed) <= 0.2 * len(known) + 1
    stopped = next(uid for uid, row in after.items() if row["passes_used"] == 2)
    assert why(config, "cxr", stopped, ref).anomaly_score == after[stopped]["anomaly_score"]
    with pytest.raises(UsageError, match="ends passes early"):
        package(config, ref, tmp_path / "out", ["torch"])


def _rows(lake: Lake, calibration_id: str) -> dict[str, dict]:
    columns = ["sop_instance_uid", "anomaly_score", "is_abnormal", "passes_used", "not_scored"]
    rows = lake.read("scores", columns, filter={"cohort": "cxr", "calibration_id": calibration_id}).to_pylist()
    return {row["sop_instance_uid"]: row for row in rows if row["not_scored"] is None}
