"""What is left undone about a model, on a real registry in SQLite and a real lake: and that the next call ends it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from watched_lake import START, batch

from memmc.config import Config, load_config
from memmc.errors import DivergedError, StorageError
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline import promote as promotion
from memmc.pipeline import train as training
from memmc.pipeline.decisions import Decision, read, record
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import no_model_yet, tracking_of
from memmc.pipeline.promote import promote
from memmc.pipeline.retrain import no_normals_yet, plan_retrain, train_challenger
from memmc.pipeline.standing import Standing, standing
from memmc.registry.models import CHAMPION, ModelVersion, register
from memmc.registry.promotion import champion_of, crown, history
from memmc.registry.tracking import Tracking

GATE = {"name": "auroc", "measured": 0.9, "limit": 0.5, "verdict": "pass", "why": "0.9"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working directory for the module: making its registry takes seconds; each test has a cohort of its own."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module", autouse=True)
def at_first(home) -> str | None:
    """What is said of the registry before it holds a model."""
    return no_model_yet(load_config(), home / ".memmc")


@pytest.fixture
def config(home, monkeypatch) -> Config:
    monkeypatch.chdir(home)
    monkeypatch.setattr(promotion, "canaries", lambda *_args, **_named: None)
    return load_config(overrides=[f"lake.uri={home / 'lake'}"])


@pytest.fixture
def tracking(config) -> Tracking:
    return tracking_of(config, home_directory())


def registered(tracking: Tracking, tmp_path: Path, cohort: str, number: int) -> ModelVersion:
    folder = tmp_path / f"model-{number}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes([number]) * 100 + cohort.encode())
    (folder / "model.json").write_text(json.dumps({"format": 1}))
    return register(tracking, tracking.start_run(f"memmc/{cohort}", "train"), folder, f"memmc-{cohort}")


def calibrated(config: Config, version: ModelVersion) -> None:
    row: dict[str, Any] = {"calibration_id": "c", "model": version.ref, "model_digest": version.digest, "cohort": "x"}
    row |= {"dataset_version": 1, "preprocess_id": "p", "scorer": "s", "false_positive_rate": 0.1, "threshold": 1.0}
    row |= {"num_normals": 1, "normal_scores": [1.0], "map_scale": 1.0, "scorer_state": b"", "created_at": START}
    Lake(config.lake.uri).append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]))


def kept(config: Config, cohort: str, outcome: str, model: str | None, **fields: Any) -> Decision:
    action = {"trained": "retrain", "failed": "retrain", "rolled back": "rollback"}.get(outcome, "promote")
    found = Decision(cohort, action, outcome, "why", f"memmc-{cohort}", model, facts={"gates": [GATE]}, **fields)  # type: ignore[arg-type]
    return record(config, Lake(config.lake.uri), found)


def undone(config: Config, tracking: Tracking, cohort: str) -> Standing:
    lake, name = Lake(config.lake.uri), f"memmc-{cohort}"
    return standing(lake, tracking, name, cohort, read(lake, name=name), datetime.now(UTC))


@pytest.mark.parametrize("first", [True, False])
def test_a_promotion_cut_short_is_ended_by_the_next_call(config, tracking, tmp_path, first):
    cohort = f"cut-{first}".lower()
    before = None if first else registered(tracking, tmp_path, cohort, 1)
    if before:
        crown(tracking, before)
    version = registered(tracking, tmp_path, cohort, 2)
    decision = kept(config, cohort, "promoted", version.ref, champion=before.ref if before else None, approver="alice")
    assert undone(config, tracking, cohort).promoted == version.ref
    done = promote(config, cohort)  # measures nothing: neither model could be opened
    assert (done.outcome, done.decision_id, done.approver) == ("promoted", decision.decision_id, "alice")
    champion = champion_of(tracking, version.name)
    assert champion is not None and champion.ref == version.ref
    assert undone(config, tracking, cohort).promoted is None
    assert len(read(Lake(config.lake.uri), cohort=cohort)) == 1


def test_only_the_newest_verdict_is_gone_on_with_and_a_hand_on_the_alias_is_right(config, tracking, tmp_path):
    cohort, day = "by-hand", timedelta(days=1)
    one, two, three = (registered(tracking, tmp_path, cohort, number) for number in (1, 2, 3))
    crown(tracking, one)
    kept(config, cohort, "promoted", two.ref, champion=one.ref, decided_at=datetime.now(UTC) - day)
    assert undone(config, tracking, cohort).promoted is None  # of a registry that was there before this one
    kept(config, cohort, "promoted", two.ref, champion=one.ref)
    assert undone(config, tracking, cohort).promoted == two.ref
    tracking.client.set_registered_model_alias(two.name, CHAMPION, three.version)
    assert undone(config, tracking, cohort).promoted is None
    tracking.client.set_registered_model_alias(two.name, CHAMPION, one.version)
    crown(tracking, two)
    assert history(tracking, two.name) == ["1", "2"]
    tracking.client.set_registered_model_alias(two.name, CHAMPION, one.version)
    assert undone(config, tracking, cohort).promoted is None
    kept(config, cohort, "promoted", three.ref, champion=one.ref)
    kept(config, cohort, "rolled back", one.ref, champion=two.ref)
    assert undone(config, tracking, cohort).promoted is None


def test_a_model_that_was_trained_by_hand_is_judged_once_it_is_calibrated(config, tracking, tmp_path):
    cohort = "on-demand"
    version = registered(tracking, tmp_path, cohort, 1)
    # A training that was cut short before its calibration is gone on with, and holds nothing back.
    assert undone(config, tracking, cohort) == Standing()
    calibrated(config, version)
    found = undone(config, tracking, cohort)
    assert found.pending == version.ref
    assert found.trained_at is not None and datetime.now(UTC) - found.trained_at < timedelta(minutes=5)
    kept(config, cohort, "refused", version.ref)
    found = undone(config, tracking, cohort)
    assert (found.pending, found.trained_at is None) == (None, False)


def test_a_challenger_that_waits_is_asked_about_again_after_a_restart(config, tracking, tmp_path):
    cohort = "asked"
    Lake(config.lake.uri).append(INSTANCES, batch(7, 10, START, cohort=cohort))
    version = registered(tracking, tmp_path, cohort, 1)
    calibrated(config, version)
    kept(config, cohort, "trained", version.ref)
    assert plan_retrain(config, cohort, dry_run=True).outcome == "judge"
    kept(config, cohort, "waiting", version.ref)
    plan = plan_retrain(config, cohort, dry_run=True)
    assert (plan.outcome, plan.challenger, plan.decision_id) == ("waiting", version.ref, None)
    kept(config, cohort, "refused", version.ref, approver="alice")
    assert plan_retrain(config, cohort, dry_run=True).outcome == "wait"


def test_a_verdict_on_the_images_of_another_cohort_is_not_waited_for_here(config, tracking, tmp_path):
    version = registered(tracking, tmp_path, "own", 1)
    found = Decision("frozen", "promote", "waiting", "why", version.name, version.ref, facts={"gates": [GATE]})
    record(config, Lake(config.lake.uri), found)
    assert undone(config, tracking, "own").waiting is None
    kept(config, "own", "waiting", version.ref)
    assert undone(config, tracking, "own").waiting == version.ref


def test_a_training_that_failed_for_good_counts_for_the_cooldown_and_one_cut_short_does_not(config, monkeypatch):
    cohort = "diverges"
    Lake(config.lake.uri).append(INSTANCES, batch(8, 10, START, cohort=cohort))
    plan = plan_retrain(config, cohort, dry_run=True)
    assert plan.outcome == "train"

    def fails(error):
        def train(*_args, **_named):
            raise error

        return train

    monkeypatch.setattr(training, "train", fails(StorageError("the store is away")))
    with pytest.raises(StorageError):
        train_challenger(config, cohort, plan)
    assert plan_retrain(config, cohort, dry_run=True).outcome == "train"
    monkeypatch.setattr(training, "train", fails(DivergedError("the loss is not finite")))
    with pytest.raises(DivergedError):
        train_challenger(config, cohort, plan)
    held = plan_retrain(config, cohort, dry_run=True)
    assert held.outcome == "wait" and "cooldown_days" in held.reason
    (row,) = read(Lake(config.lake.uri), cohort=cohort)
    assert (row.outcome, row.reason) == ("failed", "the loss is not finite")


def test_a_new_site_says_what_it_lacks(tmp_path, config, tracking, at_first):
    Lake(config.lake.uri).append(INSTANCES, batch(9, 5, START, cohort="mixed", label="unknown"))
    assert "no normals yet" in str(no_normals_yet(config, "mixed"))
    Lake(config.lake.uri).append(INSTANCES, batch(10, 5, START, cohort="mixed"))
    assert no_normals_yet(config, "mixed") is None
    registered(tracking, tmp_path, "any", 1)
    assert no_model_yet(config, home_directory()) is None
    new = load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])
    assert "no normals yet" in str(no_normals_yet(new, "cxr"))
    assert "no model yet" in str(at_first)
