"""What the retrain, approve and score flows do where nobody in the process can answer, and where it is too early."""

from __future__ import annotations

from typing import Any

import pytest

from flows import approve, retrain, score
from memmc.errors import GateRefused

MODEL = "memmc-cxr/2"


def verdict(outcome: str) -> dict[str, Any]:
    fixed = {"model": MODEL, "cohort": "cxr", "champion": None, "gates": [], "reason": f"it is {outcome}"}
    return fixed | {"outcome": outcome}


@pytest.fixture
def said(monkeypatch) -> list[Any]:
    """What the flows do, in order; their steps are others' tests."""
    found: list[Any] = []
    plan = {"outcome": "waiting", "reason": "", "facts": {}, "challenger": MODEL}
    steps = {
        "look_for_normals": lambda *_: {},
        "decide": lambda *_: plan,
        "train": lambda *_: found.append("train"),
        "judge": lambda _cohort, model, approve, _config: (
            found.append(("judge", model, approve)) or verdict("promoted" if approve else "waiting")
        ),
        "decline": lambda _cohort, model, name, _config: found.append(("decline", model, name)) or verdict("refused"),
        "create_markdown_artifact": lambda *_args, **_named: None,
        "emit_event": lambda event, resource, payload: found.append((event, payload["model"])),
        "pause_flow_run": lambda **_: pytest.fail("a deployed run must not pause"),
    }
    for name, step in steps.items():
        monkeypatch.setattr(retrain, name, step)
    monkeypatch.setattr(approve, "find_waiting", lambda *_: verdict("waiting"))
    return found


def test_a_deployed_run_tells_who_waits_and_ends(said):
    done = retrain.retrain_flow.fn("cxr")
    assert done["verdict"]["outcome"] == "waiting"
    assert said == [("judge", MODEL, None), ("memmc.approval.waiting", MODEL)]


def test_a_person_answers_in_a_run_of_their_own(said):
    assert approve.approve_flow.fn("cxr", "Dr. Müller")["outcome"] == "promoted"
    assert approve.approve_flow.fn("cxr", "Dr. Müller", approve=False)["outcome"] == "refused"
    assert said == [("judge", MODEL, "Dr. Müller"), ("decline", MODEL, "Dr. Müller")]


def test_a_yes_to_what_no_longer_passes_is_refused(said, monkeypatch):
    monkeypatch.setattr(retrain, "judge", lambda *_: verdict("refused"))
    with pytest.raises(GateRefused, match="it is refused"):
        approve.approve_flow.fn("cxr", "alice")


def test_a_site_without_a_label_is_told_so_and_nothing_fails(said, monkeypatch):
    early = {"outcome": "wait", "reason": "no normals yet", "challenger": None}
    monkeypatch.setattr(retrain, "look_for_normals", lambda *_: early)
    assert retrain.retrain_flow.fn("cxr") == {"plan": early, "trained": None, "verdict": None}
    assert not said


def test_a_site_without_a_model_is_told_so_and_nothing_fails(monkeypatch):
    shown: list[str] = []
    early = {"cohort": "cxr", "reason": "no model yet"}
    monkeypatch.setattr(score, "look_for_model", lambda *_: early)
    monkeypatch.setattr(score, "score_instances", lambda *_: pytest.fail("there is nothing to score with"))
    monkeypatch.setattr(score, "create_markdown_artifact", lambda text, **_: shown.append(text))
    assert score.score_flow.fn("cxr", report=True) == early
    assert "no model yet" in shown[0]
