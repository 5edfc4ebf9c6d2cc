"""Views: a rule over cohorts, read wherever a cohort's name is taken."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from drawn_chests import chest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_quality import rows
from typer.testing import CliRunner

from memmc.cli.main import app
from memmc.config import Config, load_config
from memmc.errors import DataError, UsageError
from memmc.lake.files import select_rows, write_rows
from memmc.lake.schemas import INSTANCES, LABELS, QUALITY, SCORES
from memmc.lake.tables import Lake
from memmc.lake.views import define, find_view, list_views, members, parse_rule, refuse_view
from memmc.pipeline.images import read_images
from memmc.pipeline.quality import flags_of, gate
from memmc.pipeline.score_ledger import ScoreLedger
from memmc.pipeline.score_plan import plan_scores
from memmc.pipeline.select import ever_normal, normals

VIEWS = ("PA", "AP", None)


def cohort(name: str, start: int, num: int) -> pa.Table:
    table = rows({f"{name}{n}": chest(start + n) for n in range(num)}, name)
    column = pa.array([VIEWS[n % 3] for n in range(num)], pa.string())
    return table.append_column("view_position", column).append_column(
        "patient_age_years", pa.array([20 + n for n in range(num)], pa.int32())
    )


@pytest.fixture
def config(tmp_path) -> Config:
    return load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])


@pytest.fixture
def lake(config) -> Lake:
    lake = Lake(config.lake.uri)
    lake.append(INSTANCES, cohort("a", 0, 12), "a")
    lake.append(INSTANCES, cohort("b", 100, 12), "b")
    lake.append(INSTANCES, cohort("c", 200, 6), "c")
    return lake


def uids(lake: Lake, name: str, **more: object) -> list[str]:
    where = {"cohort": name, "outcome": "stored", **more}
    return sorted(lake.read(INSTANCES, ["sop_instance_uid"], filter=where)["sop_instance_uid"].to_pylist())


def opinion(uid: str, label: str, name: str, seconds: int = 0) -> pa.Table:
    at = datetime(2026, 2, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    row = {"cohort": name, "sop_instance_uid": uid, "label": label, "source": "t", "labelled_at": at}
    return pa.Table.from_pylist([row])


def test_a_view_is_its_rule_over_its_cohorts(lake):
    view, number = define(lake, "frontal", ("a", "b"), parse_rule(["view_position=PA"]))
    assert uids(lake, "frontal") == sorted(f"{name}{n}" for name in "ab" for n in (0, 3, 6, 9))
    assert number == 8
    assert uids(lake, "frontal", split="train") == uids(lake, "frontal", split=("train", "none"))
    assert {row["cohort"] for row in lake.read(INSTANCES, ["cohort"], filter={"cohort": "frontal"}).to_pylist()} == {
        "a",
        "b",
    }
    assert define(lake, "frontal", ("a", "b"), parse_rule(["view_position=PA"])) == (view, 8)  # the same again
    assert list_views(lake) == [view]
    assert uids(lake, "a") == sorted(f"a{n}" for n in range(12))  # cohorts stay what they are
    lake.append(INSTANCES, rows({"late": chest(99)}, "b", view_position="PA"), "later")
    assert "late" in uids(lake, "frontal")


def test_rules_combine_and_unknown_is_no_value(lake):
    define(lake, "young", ("a",), parse_rule(["view_position=UNKNOWN,AP", "patient_age_years=21,22,23"]))
    assert uids(lake, "young") == ["a1", "a2"]
    assert uids(lake, "young", view_position="AP") == ["a1"]
    assert uids(lake, "young", view_position="PA") == []


def test_a_rule_on_labels_follows_the_newest_opinion(lake):
    lake.append(LABELS, opinion("a1", "abnormal", "a"))
    define(lake, "ill", ("a", "b"), parse_rule(["label=abnormal"]))
    assert uids(lake, "ill") == ["a1"]
    lake.append(LABELS, opinion("b2", "abnormal", "b", 1))
    lake.append(LABELS, opinion("a1", "normal", "a", 2))
    assert uids(lake, "ill") == ["b2"]
    where = {"cohort": "ill", "outcome": "stored"}
    assert lake.instances_with_labels(["label"], None, where)["label"].to_pylist() == ["abnormal"]
    assert lake.instances_with_labels(["label"], None, {**where, "label": "normal"}).num_rows == 0


def test_steps_take_a_view_for_a_cohort(config, lake):
    define(lake, "frontal", ("a", "b"), parse_rule(["view_position=PA,AP"]))
    train = {row["sop_instance_uid"] for row in normals(lake, "frontal", "train")}
    assert train == {f"{name}{n}" for name in "ab" for n in range(12) if n % 3 < 2 and n % 5 < 3}
    images = read_images(lake, "frontal", ["b0", "a1"])
    np.testing.assert_allclose(images[0, ..., 0], chest(100) / 65535, atol=1e-6)
    with pytest.raises(DataError, match="1 of 2 instances have no pixels"):
        read_images(lake, "frontal", ["b0", "a2"])  # a2 says nothing of its view
    strict = load_config(overrides=[f"lake.uri={config.lake.uri}", "quality.min_side_px=3000"])
    gated = gate(strict, "frontal")
    assert (gated.instances, gated.gated, gated.flags) == (16, 24, {"QC_TOO_SMALL": 16})
    assert set(lake.read(QUALITY, ["cohort"])["cohort"].to_pylist()) == {"a", "b"}
    assert set(flags_of(lake, "frontal")) == set(uids(lake, "frontal"))
    assert gate(strict, "a").gated == 0  # its instances have been gated already


def test_what_was_once_normal_stays_known_under_every_name(lake):
    """A reviewer calls a learned image abnormal: it has been seen all the same, also in a view of normals."""
    define(lake, "v", ("a", "b"), parse_rule(["label=normal"]))
    columns, splits = ["sop_instance_uid", "label"], ("train", "calibrate", "test", "none")
    version = lake.version(INSTANCES)
    before = {name: ever_normal(lake, name, version, splits, columns) for name in ("a", "v")}
    assert all(table.num_rows for table in before.values())
    uid = before["a"]["sop_instance_uid"][0].as_py()
    lake.append(LABELS, opinion(uid, "abnormal", "a"))
    assert normals_of(lake, "a") < set(before["a"]["sop_instance_uid"].to_pylist())
    for name, table in before.items():
        assert ever_normal(lake, name, version, splits, columns).equals(table)
    asked = lake.read(INSTANCES, ["sop_instance_uid"], filter={"cohort": "c"})["sop_instance_uid"].to_pylist()
    lake.append(LABELS, opinion(asked[0], "unknown", "c"))
    lake.append(LABELS, opinion(asked[0], "normal", "c", 1))
    lake.append(LABELS, opinion(asked[0], "unknown", "c", 2))
    assert asked[0] in ever_normal(lake, "c", version, splits, columns)["sop_instance_uid"].to_pylist()


def normals_of(lake: Lake, name: str) -> set[str]:
    where = {"cohort": name, "outcome": "stored", "label": "normal"}
    return set(lake.instances_with_labels(["sop_instance_uid"], None, where)["sop_instance_uid"].to_pylist())


def test_what_a_cohort_has_scored_is_not_scored_again_for_its_view(lake):
    score = {
        "cohort": "a",
        "sop_instance_uid": "a0",
        "patient_key": "p",
        "model": "m/1",
        "model_digest": "d",
        "calibration_id": "k",
        "dataset_version": 0,
        "preprocess_id": "p",
        "scorer": "s",
        "anomaly_score": 1.0,
        "is_abnormal": True,
        "scored_at": datetime(2026, 2, 1, tzinfo=UTC),
        "run": "r",
    }
    scored = pa.Table.from_pylist([score, {**score, "sop_instance_uid": "a2"}])
    ScoreLedger(lake, "a", "d", "k").commit(write_rows(lake.storage, SCORES, scored), "score", 1)
    view, _ = define(lake, "frontal", ("a", "b"), parse_rule(["view_position=PA,AP"]))
    only = {uid for uid, base in members(lake, view).items() if base == "a"}
    ledger = ScoreLedger(lake, "a", "d", "k")
    plan = plan_scores(lake, "a", ledger, only=only)
    assert (plan.stored, plan.scored, plan.to_score) == (8, 1, 7)
    assert (ledger.abnormal, ledger.abnormal_among(only)) == (2, 1)
    read = lake.read(SCORES, ["sop_instance_uid"], filter={"cohort": "frontal"})["sop_instance_uid"].to_pylist()
    assert read == ["a0"]


def test_what_is_no_view_is_refused(lake):
    with pytest.raises(UsageError, match="columns are"):
        parse_rule(["patient_key=x"])
    with pytest.raises(UsageError, match="expected one of normal"):
        parse_rule(["label=healthy"])
    with pytest.raises(UsageError, match="whole numbers"):
        parse_rule(["patient_age_years=old"])
    with pytest.raises(UsageError, match="twice"):
        parse_rule(["view_position=PA", "view_position=AP"])
    with pytest.raises(DataError, match="no stored instance"):
        define(lake, "none", ("a",), parse_rule(["view_position=LL"]))
    with pytest.raises(UsageError, match="was ingested"):
        define(lake, "b", ("a",), parse_rule(["view_position=PA"]))
    define(lake, "frontal", ("a",), parse_rule(["view_position=PA"]))
    with pytest.raises(UsageError, match="views do not change"):
        define(lake, "frontal", ("a",), parse_rule(["view_position=AP"]))
    with pytest.raises(UsageError, match="is a view itself"):
        define(lake, "more", ("frontal",), parse_rule(["view_position=PA"]))
    with pytest.raises(UsageError, match="is a view of a"):
        refuse_view(lake, "frontal")
    refuse_view(lake, "a")
    assert find_view(lake, "none") is None


def test_an_instance_in_two_cohorts_of_a_view_is_refused(lake):
    lake.append(INSTANCES, rows({"a0": chest(0)}, "c", view_position="PA"), "again")
    with pytest.raises(DataError, match="1 instances are stored in more than one of a, c"):
        define(lake, "both", ("a", "c"), parse_rule(["view_position=PA"]))
    define(lake, "one", ("c", "b"), parse_rule(["view_position=PA"]))
    lake.append(INSTANCES, rows({"c0": chest(0)}, "b", view_position="PA"), "later")
    with pytest.raises(DataError, match="more than one of c, b"):
        lake.read(SCORES if lake.exists(SCORES) else QUALITY, ["cohort"], filter={"cohort": "one"})


@settings(max_examples=15, deadline=None)
@given(
    ages=st.sets(st.integers(18, 34), min_size=1, max_size=8),
    views=st.sets(st.sampled_from(["PA", "AP", "UNKNOWN"]), min_size=1),
)
def test_a_view_is_what_filtering_row_by_row_gives(tmp_path_factory, ages, views):
    lake = Lake(str(tmp_path_factory.mktemp("v")))
    lake.append(INSTANCES, cohort("a", 0, 12), "a")
    rule = parse_rule([f"patient_age_years={','.join(map(str, ages))}", f"view_position={','.join(views)}"])
    everything = lake.read(INSTANCES)
    expected = [
        row["sop_instance_uid"]
        for row in everything.to_pylist()
        if row["patient_age_years"] in ages and (row["view_position"] or "UNKNOWN") in views
    ]
    if not expected:
        with pytest.raises(DataError):
            define(lake, "v", ("a",), rule)
        return
    define(lake, "v", ("a",), rule)
    assert (
        lake.read(INSTANCES, ["sop_instance_uid"], filter={"cohort": "v"})["sop_instance_uid"].to_pylist() == expected
    )
    assert select_rows(everything, lake.where(INSTANCES, {"cohort": "v"}))["sop_instance_uid"].to_pylist() == expected


def test_the_verbs(config, lake, tmp_path):
    place = ["--lake", config.lake.uri]
    run = CliRunner().invoke
    made = run(
        app, ["cohort", "define", "frontal", "--from", "a,b", "--where", "view_position=PA,AP", "--json", *place]
    )
    assert json.loads(made.stdout)["instances"] == 16
    shown = run(app, ["cohort", "show", "frontal", *place]).stdout
    assert "view of a, b" in shown
    assert "where view_position is AP or PA" in shown
    assert "AP 8, PA 8" in shown
    listed = run(app, ["cohort", "list", *place]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["a", "b", "c", "frontal"]
    assert "view of a, b" in listed[3]
