"""What a run shows, made from a real lake and a real training."""

import io
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image

from memmc.config import load_config
from memmc.pipeline.cockpit import MOST_BYTES, contact_sheet, lake_status, most_abnormal, tracked_at, training_curves
from memmc.pipeline.score import score

pytestmark = pytest.mark.slow


@pytest.fixture
def scored(inside):
    return score(inside.config, "cxr", inside.trained.model)


def test_the_most_abnormal_of_a_batch_come_first_and_with_their_heat(inside, scored, settings):
    began = datetime.now(UTC) - timedelta(hours=1)
    rows = most_abnormal(inside.config, "cxr", scored.model, began)
    assert len(rows) == inside.config.cockpit.scans
    assert [row["p_value"] for row in rows] == sorted(row["p_value"] for row in rows)
    assert rows[0]["anomaly_score"] >= rows[-1]["anomaly_score"]
    assert rows[0]["sop_instance_uid"].startswith("2.25.")
    sheet = contact_sheet(inside.config, "cxr", scored.model, rows)
    picture = Image.open(io.BytesIO(sheet))
    assert len(sheet) <= MOST_BYTES and picture.width > picture.height
    # Inside of the tiles: JPEG lets colours run over an edge.
    scan, heat = (picture.crop((left + 10, 16, left + 122, 128)).convert("RGB") for left in (6, 150))
    grey, coloured = (max(max(pixel) - min(pixel) for pixel in tile.get_flattened_data()) for tile in (scan, heat))
    assert grey < 12 < 60 < coloured  # JPEG's own colour noise, and the heat map's
    assert most_abnormal(inside.config, "cxr", scored.model, datetime.now(UTC) + timedelta(hours=1)) == []
    few = load_config(overrides=[*settings, "cockpit.scans=3"])
    assert [row["sop_instance_uid"] for row in most_abnormal(few, "cxr", scored.model, began)] == [
        row["sop_instance_uid"] for row in rows[:3]
    ]


def test_a_trainings_curves_are_a_small_picture(inside):
    png = training_curves(inside.config, inside.trained.model)
    assert len(png) <= MOST_BYTES
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert (31, 95, 168) in colours and (179, 84, 30) in colours  # both lines are drawn
    assert tracked_at(inside.config, inside.trained.model) is None  # no server, so no page to link


def test_the_lakes_state_is_the_account(inside, scored):
    found = lake_status(inside.config)
    account = inside.ingested
    assert found["cohorts"]["cxr"]["stored"] == account.stored
    assert sum(found["cohorts"]["cxr"].values()) == account.seen
    assert found["scores"] >= scored.instances - scored.not_scored
    assert 0 < found["abnormal"] < found["scores"]
    assert found["models"] >= 1


def test_an_empty_lake_counts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = lake_status(load_config())
    assert (found["cohorts"], found["scores"], found["dataset_version"], found["models"]) == ({}, 0, None, 0)
