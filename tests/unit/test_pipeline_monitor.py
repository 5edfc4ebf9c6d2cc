"""One look at a cohort: calm where nothing happened; each thing that can go wrong is found, and found alone."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from watched_lake import batch, later, make, score

from memmc.errors import PreprocessMismatch
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, MONITORING, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline.canaries import canaries, recent_normals
from memmc.pipeline.drift import _known_scores, drift
from memmc.pipeline.findings import recorded
from memmc.pipeline.golden import golden
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import open_model
from memmc.pipeline.monitor import monitor
from memmc.pipeline.observed import window_rows
from memmc.pipeline.select import calibrations


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("watched")
    make(root)
    return root


@pytest.fixture
def site(made, tmp_path, monkeypatch):
    """A copy of the lake in a working directory of its own."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    from watched_lake import SETTINGS

    from memmc.config import load_config

    return load_config(overrides=["lake.uri=lake", *SETTINGS]), str(tmp_path / "w" / "model")


def week(config, model, seed=2, count=40, scored=True, **change):
    """A week's instances, scored; returns the version of `instances` before them."""
    lake = Lake(config.lake.uri)
    before = lake.version(INSTANCES)
    lake.append(INSTANCES, batch(seed, count, later(7), **change))
    if scored:
        score(config, open_model(config, home_directory(), model), later(7))
    return str(before)


def names(result):
    return {alarm["name"] for alarm in result.alarms}


def test_a_quiet_week_is_calm_and_leaves_a_picture(site):
    config, model = site
    since = week(config, model)
    result = monitor(config, "cxr", model, since=since, now=later(8))
    assert (result.calm, result.alarms, result.skipped) == (True, [], [])
    assert result.drift["tested"]
    assert result.drift["num_tests"] > 15
    assert (result.drift["num_window"], result.drift["num_scored"], result.drift["num_baseline"]) == (40, 40, 120)
    assert result.golden["num_scans"] == 20
    assert result.golden["largest"] < 1e-4
    png = Lake(config.lake.uri).storage.read("reports/monitor-cxr.png")
    assert png.startswith(b"\x89PNG")
    assert b"data:image/png" in Lake(config.lake.uri).storage.read("reports/monitor-cxr.html")
    kinds = {row["kind"] for row in recorded(Lake(config.lake.uri), "cxr")}
    assert kinds == {"drift", "canary", "golden", "watch"}


@pytest.mark.parametrize(
    ("change", "group"),
    [({"gain": 0.85}, "pixels"), ({"blur": 0.8}, "pixels"), ({"makers": ("A", "new")}, "headers")],
)
def test_a_changed_stream_has_drifted(site, change, group):
    config, model = site
    result = drift(config, "cxr", model, since=week(config, model, **change), now=later(8))
    assert result.drifted
    assert any(finding.startswith(group) for finding in result.findings)
    rows = recorded(Lake(config.lake.uri), "cxr", "drift")
    assert [
        row["name"] for row in rows if row["run"] == result.run and row["alarm"] == "drift" and row["name"] == "window"
    ]


def test_drift_says_when_there_is_too_little_and_what_was_not_scored(site):
    config, model = site
    few = drift(config, "cxr", model, since=week(config, model, count=19), now=later(8))
    assert not few.tested
    assert not few.drifted
    unscored = drift(config, "cxr", model, since=week(config, model, seed=3, scored=False), now=later(8))
    assert unscored.tested
    assert unscored.num_scored == 0
    assert not [shift for shift in unscored.shifts if shift["group"] in ("scores", "p_values")]


def test_the_window_is_the_last_days_where_nothing_else_is_said(site):
    config, model = site
    week(config, model)
    assert drift(config, "cxr", model, now=later(8)).num_window == 40
    assert drift(config, "cxr", model, now=later(20)).num_window == 0
    assert (
        drift(config, "cxr", model, since="2026-01-01", now=later(20)).num_window == 40
    )  # never what was learned from


def test_pixels_prepared_otherwise_are_refused(site):
    config, model = site
    rows = batch(9, 30, later(7))
    index = rows.column_names.index("preprocess_id")
    Lake(config.lake.uri).append(INSTANCES, rows.set_column(index, "preprocess_id", pa.array(["q"] * 30)))
    with pytest.raises(PreprocessMismatch):
        drift(config, "cxr", model, now=later(8))


def test_canaries_touch_nothing_and_are_found_where_they_are_bright(site):
    config, model = site
    week(config, model)
    lake = Lake(config.lake.uri)
    before = lake.version(INSTANCES), lake.version(SCORES)
    result = canaries(config, "cxr", model, now=later(8))
    assert (lake.version(INSTANCES), lake.version(SCORES)) == before
    assert result.tested
    assert [point["contrast"] for point in result.curve] == [0.25, 0.5, 1.0]
    faint = np.mean([point["sensitivity"] for point in result.curve if point["contrast"] == 0.25])
    bright = np.mean([point["sensitivity"] for point in result.curve if point["contrast"] == 1.0])
    assert bright > faint
    assert bright > result.false_positive_rate + 0.3
    again = canaries(config, "cxr", model, now=later(9))
    assert again.baseline == result.sensitivity == again.sensitivity
    assert not again.fell


def test_canaries_that_are_no_longer_found_are_an_alarm(site):
    config, model = site
    week(config, model)
    first = canaries(config, "cxr", model, now=later(8))
    blind = config.model_copy(
        update={"monitor": config.monitor.model_copy(update={"canary_contrasts": (0.001, 0.002, 0.003)})}
    )
    result = canaries(blind, "cxr", model, now=later(9))
    assert result.fell
    assert result.sensitivity < first.sensitivity


def test_golden_scores_that_moved_are_an_alarm(site):
    config, model = site
    assert not golden(config, "cxr", model).moved
    other = config.model_copy(update={"monitor": config.monitor.model_copy(update={"golden_tolerance": 1e-12})})
    rows = recorded(Lake(config.lake.uri), "cxr", "golden")
    assert rows[0]["alarm"] is None
    # Lake rows that say something else than the model does stand for a library that computes otherwise.
    lake = Lake(config.lake.uri)
    scores = lake.read(SCORES, lake.read(SCORES).column_names)
    index = scores.column_names.index("anomaly_score")
    moved = pa.array([value * 1.01 for value in scores["anomaly_score"].to_pylist()])
    later_rows = scores.set_column(index, "anomaly_score", moved)
    at = scores.column_names.index("scored_at")
    lake.append(
        SCORES, later_rows.set_column(at, "scored_at", pa.array([later(1)] * len(scores), scores["scored_at"].type))
    )
    found = golden(other, "cxr", model)
    assert found.moved
    assert found.largest == pytest.approx(0.01, rel=0.2)
    assert names(monitor(config, "cxr", model, since="2026-01-12", now=later(1))) == {"golden_set"}


def test_a_damaged_shard_is_an_alarm_and_the_other_checks_still_run(site):
    config, model = site
    lake = Lake(config.lake.uri)
    (held_out,) = lake.files(INSTANCES, None, {"outcome": "stored", "split": "test"})
    since = week(config, model)
    change_pixels(lake.storage.local_path(held_out.path))
    result = monitor(config, "cxr", model, since=since, now=later(8))
    assert (result.calm, names(result), result.skipped) == (False, {"damaged_data"}, [])
    (alarm,) = result.alarms
    assert alarm["found"].count(held_out.path) == 2
    assert "golden set: shard" in alarm["found"] and "drift: shard" in alarm["found"]
    assert (result.golden, result.drift) == (None, None)
    assert result.canaries["tested"]  # of the week's own scans
    assert [row["alarm"] for row in recorded(lake, "cxr", "watch")] == ["damaged_data"]
    assert b"damaged_data" in lake.storage.read("reports/monitor-cxr.html")


def change_pixels(shard):
    """Change one bit of a shard's pixels, and of no other column."""
    group = pq.read_metadata(shard).row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    (pixels,) = (column for column in columns if column.path_in_schema == "pixels")
    changed = bytearray(shard.read_bytes())
    changed[pixels.data_page_offset + pixels.total_compressed_size // 2] ^= 1
    shard.write_bytes(changed)


def test_pixels_prepared_otherwise_are_an_alarm(site):
    config, model = site
    rows = batch(9, 30, later(7))
    index = rows.column_names.index("preprocess_id")
    Lake(config.lake.uri).append(INSTANCES, rows.set_column(index, "preprocess_id", pa.array(["q"] * 30)))
    result = monitor(config, "cxr", model, now=later(7.5))
    assert (result.calm, names(result), result.skipped) == (False, {"preprocess_mismatch"}, [])
    (alarm,) = result.alarms
    assert "canaries: model" in alarm["found"] and "drift: model" in alarm["found"]
    assert result.golden["num_scans"] == 20


def test_a_check_that_lacks_what_it_needs_is_no_alarm(site):
    config, model = site
    shutil.rmtree("lake/calibrations")
    result = monitor(config, "cxr", model, now=later(1))
    assert (result.calm, result.alarms) == (True, [])
    assert [text.partition(":")[0] for text in result.skipped] == ["golden set", "canaries", "drift"]


def test_a_source_that_stopped_is_an_alarm(site):
    config, model = site
    week(config, model)
    assert names(monitor(config, "cxr", model, now=later(7 + 2.9))) == set()
    assert names(monitor(config, "cxr", model, now=later(7 + 3.1))) == {"no_data"}


def test_instances_that_nobody_scores_are_an_alarm(site):
    config, model = site
    week(config, model, scored=False)
    assert names(monitor(config, "cxr", model, now=later(7.5))) == set()
    assert names(monitor(config, "cxr", model, now=later(8.5))) == {"scoring_backlog"}


def test_a_jump_of_quarantined_objects_is_an_alarm(site):
    config, model = site
    since = week(config, model, quarantined=20)
    assert names(monitor(config, "cxr", model, since=since, now=later(8))) == {"quarantine_rate"}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_of_zero_or_not_a_number_stop_every_other_check(site, value):
    config, model = site
    week(config, model)
    file = f"{model}/model.safetensors"
    save_file({name: np.full_like(tensor, value) for name, tensor in load_file(file).items()}, file)
    result = monitor(config, "cxr", model, now=later(8))
    assert "broken_weights" in names(result)
    assert result.drift is None
    assert result.skipped


def test_scores_that_are_all_one_are_an_alarm(site):
    config, model = site
    since = week(config, model)
    lake = Lake(config.lake.uri)
    scores = lake.read(SCORES, lake.read(SCORES).column_names)
    index, at = (scores.column_names.index(name) for name in ("anomaly_score", "scored_at"))
    same = scores.set_column(index, "anomaly_score", pa.array([1.0] * len(scores)))
    lake.append(SCORES, same.set_column(at, "scored_at", pa.array([later(8)] * len(scores), scores["scored_at"].type)))
    assert "constant_scores" in names(monitor(config, "cxr", model, since=since, now=later(8)))


def test_without_a_champion_that_is_the_alarm(site):
    config, _ = site
    result = monitor(config, "cxr", now=later(1))
    assert names(result) == {"no_champion"}
    assert result.skipped
    assert Lake(config.lake.uri).exists(MONITORING)


def test_what_a_calibration_on_another_cohort_has_met_is_in_no_window_and_carries_no_canary(site):
    config, folder = site
    lake, model = Lake(config.lake.uri), open_model(config, home_directory(), folder)
    version = lake.append(INSTANCES, batch(7, 50, later(6), cohort="prod"))
    (row,) = calibrations(lake, model)
    again = {**row, "calibration_id": "d", "cohort": "prod", "dataset_version": version, "created_at": later(6)}
    again |= {"model": model.ref, "model_digest": model.digest}
    lake.append(CALIBRATIONS, pa.Table.from_pylist([again], schema=SCHEMAS[CALIBRATIONS]))
    where = {"cohort": "prod", "split": "calibrate"}
    met = set(lake.read(INSTANCES, ["sop_instance_uid"], filter=where)["sop_instance_uid"].to_pylist())
    window = window_rows(lake, "prod", model, None, config.monitor, later(8))["sop_instance_uid"].to_pylist()
    assert len(met) == 20
    assert len(window) == 30
    assert met.isdisjoint(window)
    assert met.isdisjoint(recent_normals(lake, "prod", model, 50))


def test_a_baseline_of_normals_alone_is_compared_with_no_scores(site):
    """Only another cohort has been scored, so that the baseline knows the calibration's own normals and no other."""
    config, folder = site
    lake, model = Lake(config.lake.uri), open_model(config, home_directory(), folder)
    since = week(config, folder)
    scored = drift(config, "cxr", folder, since=since, now=later(8))
    assert scored.left_out == []
    assert [shift for shift in scored.shifts if shift["name"] == "anomaly score"]
    where = {"cohort": "cxr", "split": "test"}
    held = lake.read(INSTANCES, ["sop_instance_uid"], model.dataset_version, where)["sop_instance_uid"].to_pylist()
    kept = lake.read(SCORES, SCHEMAS[SCORES].names)
    kept = kept.filter(pa.array([uid not in held for uid in kept["sop_instance_uid"].to_pylist()]))
    shutil.rmtree("lake/scores")
    lake.append(SCORES, kept)
    bare = drift(config, "cxr", folder, since=since, now=later(8))
    assert bare.num_scored == 40
    assert not [shift for shift in bare.shifts if shift["group"] == "scores"]
    assert "60 of 60 held-out images" in bare.left_out[0]
    assert "run `memmc score --cohort cxr`" in bare.left_out[0]


def test_a_patient_with_many_calibration_images_counts_once_and_only_as_often_as_drawn(site):
    config, folder = site
    lake, model = Lake(config.lake.uri), open_model(config, home_directory(), folder)
    (row,) = calibrations(lake, model)
    assert row["strata"][0]["num_patients"] == 60
    fewer = [{**stratum, "num_patients": stratum["num_patients"] // 2} for stratum in row["strata"]]
    columns = ["sop_instance_uid", "split", "label", "manufacturer"]
    others = lake.instances_with_labels(columns, None, {"split": "test"}).to_pylist()
    normals = lake.instances_with_labels(columns, None, {"split": "calibrate", "label": "normal"}).to_pylist()
    sizes = [stratum["num_patients"] for stratum in fewer[1:] or fewer]
    for drawn in (sum(sizes), sum(sizes) // 2):
        rows = [*others, *normals[:drawn]]
        (scores, flagged), why = _known_scores(lake, model, {**row, "strata": fewer}, rows, 0)
        assert why is None
        expected = 60 + sum(round(drawn / sum(sizes) * size) for size in sizes)
        assert flagged[1] == sum(len(values) for values in scores.values()) == expected
