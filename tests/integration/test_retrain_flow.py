"""The retrain flow on a real local server: it pauses for a person, who says yes or no; the steps are quick ones.

What the steps do is tested in test_retrain.py; here they only return what the flow passes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memmc.config import Config, load_config
from memmc.pipeline.progress import Silent
from memmc.pipeline.promote import PromoteResult
from memmc.pipeline.results import TrainResult
from memmc.pipeline.retrain import RetrainPlan

pytestmark = pytest.mark.slow

MODEL = "memmc-cxr/2"
PLAN = RetrainPlan("cxr", "train", "201 new normal patients", {"champion": "memmc-cxr/1"}, None, "d1")
TRAINED = TrainResult(
    model=MODEL, model_digest="0" * 16, run="train-cxr-1", cohort="cxr", steps=10, loss=0.5, num_images=6,
    dataset_version=3, preprocess_id="0" * 16, train_seconds=1.0, seconds=2.0,
)  # fmt: skip
GATE = {"name": "auroc", "measured": 0.01, "limit": -0.02, "verdict": "pass", "why": "0.900 -> 0.910"}


def verdict(outcome: str, approver: str | None = None) -> PromoteResult:
    return PromoteResult(MODEL, "cxr", "memmc-cxr/1", outcome, f"it is {outcome}", [GATE], "bob", approver, "d2")


@pytest.fixture
def config(home: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    from memmc.pipeline import retrain

    monkeypatch.chdir(home.parent)
    monkeypatch.setattr(retrain, "plan_retrain", lambda *_args, **_named: PLAN)
    monkeypatch.setattr(retrain, "train_challenger", lambda *_args, **_named: TRAINED)
    return load_config(overrides=["promote.approval=person"])


def answered(answer: dict[str, Any]) -> threading.Thread:
    """Be the person: wait for a paused run, then answer it."""

    def wait() -> None:
        from prefect import get_client
        from prefect.client.schemas.filters import FlowRunFilter

        paused = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
        with get_client(sync_client=True) as client:
            for _ in range(600):
                for run in client.read_flow_runs(flow_run_filter=paused):
                    client.resume_flow_run(run.id, run_input=answer)
                    return
                time.sleep(0.2)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def run(config: Config, home: Path, judge: Callable[..., PromoteResult], monkeypatch: pytest.MonkeyPatch) -> Any:
    from flows import retrain as flow
    from memmc.pipeline import retrain

    monkeypatch.setattr(retrain, "judge_challenger", judge)
    return flow.run(config, "cxr", None, home=home, progress=Silent())


def artifacts() -> list[str]:
    from prefect import get_client

    with get_client(sync_client=True) as client:
        return [str(artifact.data) for artifact in client.read_artifacts()]


def test_the_flow_waits_for_a_person_and_promotes_in_their_name(
    home: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def judge(_config: Config, _cohort: str, _model: str, *, approve: str | None, progress: Any) -> PromoteResult:
        asked.append(approve)
        return verdict("promoted" if approve else "waiting", approve)

    person = answered({"name": "alice", "approve": True})
    done = run(config, home, judge, monkeypatch)
    person.join()
    assert asked == [None, "alice"]
    assert (done.verdict["outcome"], done.verdict["approver"], done.trained["model"]) == ("promoted", "alice", MODEL)
    shown = "\n".join(artifacts())
    assert "| auroc | pass | 0.900 -> 0.910 |" in shown
    assert "201 new normal patients" in shown


def test_a_no_is_kept_and_ends_the_flow_as_refused(home: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from memmc.pipeline import promote

    said: list[str] = []

    def decline(_config: Config, _cohort: str, _model: str, name: str) -> PromoteResult:
        said.append(name)
        return verdict("refused", name)

    monkeypatch.setattr(promote, "decline", decline)
    person = answered({"name": "alice", "approve": False})
    done = run(config, home, lambda *_args, **_named: verdict("waiting"), monkeypatch)
    person.join()
    assert said == ["alice"]
    assert (done.verdict["outcome"], done.verdict["approver"]) == ("refused", "alice")


def test_a_refused_challenger_asks_nobody(home: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(config, home, lambda *_args, **_named: verdict("refused"), monkeypatch)
    assert (done.verdict["outcome"], done.trained["model"]) == ("refused", MODEL)
