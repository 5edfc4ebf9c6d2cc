"""Who may approve, what a verdict amounts to, and that of two decisions at once one is kept."""

from __future__ import annotations

import json

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from flows.retrain import Approval
from memmc.cli.main import app
from memmc.cli.promoting import end
from memmc.config import Config, PromoteConfig, load_config
from memmc.errors import DataError, GateRefused, UsageError
from memmc.evaluation.gates import Gate
from memmc.lake.commit import LostTurnError
from memmc.lake.tables import Lake
from memmc.pipeline.decisions import Decision, read, record, take_turn
from memmc.pipeline.promote import check_approver, decline, find_waiting, verdict

GOOD = [Gate("auroc", 0.9, 0.5, "pass", "0.9"), Gate("speed", None, None, "not applicable", "no champion")]
BAD = [*GOOD, Gate("memory", 0.0, 0.1, "fail", "no slot in use")]
PERSON = PromoteConfig(approval="person")


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])


def decision(**changes) -> Decision:
    fixed = {"cohort": "cxr", "action": "promote", "outcome": "promoted", "reason": "passes", "name": "memmc-cxr"}
    return Decision(**{**fixed, "model": "memmc-cxr/2", "facts": {"gates": [vars(GOOD[0])]}, **changes})


@pytest.mark.parametrize(
    ("rules", "gates", "approver", "outcome"),
    [
        (PromoteConfig(), GOOD, None, "promoted"),
        (PromoteConfig(), BAD, None, "refused"),
        (PERSON, GOOD, None, "waiting"),
        (PERSON, GOOD, "alice", "promoted"),
        (PERSON, BAD, "alice", "refused"),  # nobody's word opens a gate
        (PromoteConfig(), GOOD[1:], None, "refused"),  # nothing says that it finds anything
    ],
)
def test_what_gates_and_a_person_amount_to(rules, gates, approver, outcome):
    found, reason = verdict(rules, gates, approver)
    assert found == outcome
    assert outcome != "refused" or "no slot" in reason or gates is not BAD


def test_it_takes_two_people_where_it_should():
    check_approver(PERSON, "alice", "bob")
    check_approver(PERSON.model_copy(update={"two_people": False}), "bob", "bob")
    check_approver(PromoteConfig(), "bob", "bob")  # nobody is asked
    check_approver(PERSON, None, "bob")
    for approver, author in (("bob", "bob"), (" Bob", "bob"), ("bob", "BOB"), ("alice", None)):
        with pytest.raises((GateRefused, UsageError)):
            check_approver(PERSON, approver, author)
    with pytest.raises(UsageError, match="--approve NAME"):
        check_approver(PromoteConfig(), "../../etc/passwd", "bob")


@pytest.mark.parametrize("name", ["Dr. Müller", "Øystein Å", "山田太郎", "a.b@hospital.example"])
def test_names_of_any_script_are_taken_and_kept(config, name):
    check_approver(PERSON, name, "bob")
    lake = Lake(config.lake.uri)
    record(config, lake, decision(approver=name))
    assert read(lake)[0].approver == name
    assert Approval(name=name).name == name


@pytest.mark.parametrize("name", ["", " Bob", "../../etc/passwd", "a" * 65, "DOE^JANE", "_x"])
def test_what_the_step_refuses_is_refused_by_the_form(name):
    with pytest.raises(UsageError):
        check_approver(PERSON, name, "bob")
    with pytest.raises(ValidationError):
        Approval(name=name)


def test_the_verdict_that_waits_is_found_for_whoever_answers(config):
    lake = Lake(config.lake.uri)
    with pytest.raises(DataError, match="waits"):
        find_waiting(config, "cxr")
    record(config, lake, decision(outcome="waiting"))
    record(config, lake, decision(action="retrain", outcome="wait", model=None))
    assert find_waiting(config, "cxr").model == "memmc-cxr/2"
    decline(config, "cxr", "memmc-cxr/2", "alice")
    with pytest.raises(DataError, match="waits"):
        find_waiting(config, "cxr")


def test_of_two_decisions_on_one_champion_one_is_kept(config):
    lake = Lake(config.lake.uri)
    turn = take_turn(lake, "memmc-cxr")
    record(config, lake, decision(), turn)
    with pytest.raises(LostTurnError):
        record(config, lake, decision(model="memmc-cxr/3"), turn)
    record(config, lake, decision(name="memmc-hand", cohort="hand"), take_turn(lake, "memmc-hand"))
    record(config, lake, decision(model="memmc-cxr/4"), take_turn(lake, "memmc-cxr"))
    assert [item.model for item in read(lake, cohort="cxr")] == ["memmc-cxr/4", "memmc-cxr/2"]
    again = read(lake, name="memmc-hand")[0]
    assert again.facts == {"gates": [vars(GOOD[0])]}
    assert again.decided_at.tzinfo is not None


def test_decisions_are_listed_with_their_reasons(config):
    lake = Lake(config.lake.uri)
    call = ["decisions", "--cohort", "cxr", "--lake", config.lake.uri]
    assert "no decision yet" in CliRunner().invoke(app, call).output
    record(config, lake, decision(outcome="refused", reason="memory: no slot in use"))
    record(config, lake, decision(approver="alice"))
    shown = CliRunner().invoke(app, call).output.splitlines()
    assert "alice" in shown[0]
    assert "no slot in use" in shown[1]
    found = json.loads(CliRunner().invoke(app, [*call, "--json"]).output)["decisions"]
    assert [item["outcome"] for item in found] == ["promoted", "refused"]


def test_kept_decisions_are_asked_again_with_other_settings(config):
    lake = Lake(config.lake.uri)
    facts = {"champion": "memmc-cxr/1", "known_patients": 1000, "new_patients": 60, "drifted": False, "findings": []}
    record(config, lake, decision(action="retrain", outcome="wait", facts=facts))
    record(config, lake, decision(action="retrain", outcome="trained", facts={"steps": 3}))
    call = ["decisions", "--cohort", "cxr", "--lake", config.lake.uri, "--replay"]
    assert "0 of 1" in CliRunner().invoke(app, call).output
    asked = CliRunner().invoke(app, [*call, "--json", "--set", "retrain.min_new_patients=50"]).output
    again = json.loads(asked)
    assert (again["changed"], again["decisions"][0]["was"], again["decisions"][0]["now"]) == (1, "wait", "train")


def test_a_person_can_say_no_once_to_what_waits(config):
    lake = Lake(config.lake.uri)
    with pytest.raises(DataError, match="waits"):
        decline(config, "cxr", "memmc-cxr/2", "alice")
    record(config, lake, decision(outcome="waiting"))
    said = decline(config, "cxr", "memmc-cxr/2", "alice")
    assert (said.outcome, said.approver) == ("refused", "alice")
    assert read(lake, cohort="cxr")[0].reason == "alice does not agree"
    with pytest.raises(DataError, match="waits"):
        decline(config, "cxr", "memmc-cxr/2", "alice")


def test_what_is_not_promoted_ends_with_three():
    end("promoted", "", as_json=False)
    with pytest.raises(GateRefused, match="worse") as caught:
        end("refused", "worse", as_json=False)
    assert caught.value.exit_code == 3


def test_a_submitted_job_ends_well_and_leaves_the_verdict_to_its_flow(monkeypatch):
    with pytest.raises(typer.Exit):
        end("waiting", "for a person", as_json=True)
    monkeypatch.setenv("MEMMC_PROGRESS", "lines")
    end("waiting", "for a person", as_json=True)


def test_the_dry_run_says_that_it_keeps_scores():
    told = " ".join(CliRunner().invoke(app, ["promote", "--help"]).output.replace("│", " ").split())
    assert "scores that it needs are kept" in told
    assert "do nothing" not in told
