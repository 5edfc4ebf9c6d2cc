"""The retraining policy: a pure function, so all its promises are properties."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmc.config import RetrainConfig
from memmc.pipeline.decisions import Decision
from memmc.pipeline.retrain_policy import Facts, choose
from memmc.pipeline.standing import pending

RULES = RetrainConfig()
CALM = Facts(
    champion="memmc-cxr/1", known_patients=1000, new_patients=10, age_days=30, since_training_days=30, drifted=False
)
days = st.one_of(st.none(), st.floats(0, 1000))
facts = st.builds(
    Facts,
    champion=st.sampled_from([None, "memmc-cxr/1"]),
    pending=st.sampled_from([None, "memmc-cxr/2"]),
    known_patients=st.integers(0, 5000),
    new_patients=st.integers(0, 5000),
    age_days=days,
    since_training_days=days,
    drifted=st.sampled_from([None, True, False]),
    findings=st.lists(st.sampled_from(["pixels", "scores"]), max_size=2).map(tuple),
    suspects=st.integers(0, 50),
    promoted=st.sampled_from([None, "memmc-cxr/3"]),
    waiting=st.sampled_from([None, "memmc-cxr/4"]),
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"new_patients": 200}, "200 new normal patients"),
        ({"known_patients": 40, "new_patients": 8}, "8 new normal patients"),
        ({"age_days": 180.0}, "180 days old"),
        ({"drifted": True, "findings": ("pixels mean",)}, "pixels mean"),
        ({"champion": None}, "no champion"),
    ],
)
def test_each_reason_alone_is_enough_and_the_cooldown_holds_each_back(change, reason):
    assert not choose(CALM, RULES).train
    asked = replace(CALM, **change)
    assert choose(asked, RULES).train
    assert reason in choose(asked, RULES).reason
    held = choose(replace(asked, since_training_days=6.9), RULES)
    assert not held.train
    assert reason in held.reason
    assert "cooldown" in held.reason


def test_drift_counts_only_where_the_settings_say_so():
    drifted = replace(CALM, drifted=True)
    assert not choose(drifted, RULES.model_copy(update={"on_drift": False})).train


@given(facts)
def test_it_never_trains_and_judges_at_once_and_always_says_why(found):
    choice = choose(found, RULES)
    assert not (choice.train and choice.judge)
    assert choice.judge == (found.pending is not None or found.promoted is not None)
    assert not choice.ask or (found.waiting is not None and not choice.train and not choice.judge)
    assert choice.reason
    assert choose(found, RULES) == choice


@given(facts, st.integers(0, 2000))
def test_more_new_patients_never_speak_against_training(found, more):
    if choose(found, RULES).train:
        assert choose(replace(found, new_patients=found.new_patients + more), RULES).train


@given(facts)
def test_the_cooldown_holds_whatever_the_reason(found):
    assert not choose(replace(found, since_training_days=RULES.cooldown_days - 0.01), RULES).train


@given(facts)
def test_kept_facts_are_decided_alike(found):
    """A decision can be asked again from its row, with other rules too; other versions' fields do not matter."""
    again = Facts.from_json({**found.as_json(), "screened": None, "later_field": 1})
    assert again == found


def test_who_waits_for_a_person_is_asked_about_until_there_is_reason_to_train_another():
    waits = replace(CALM, waiting="memmc-cxr/2")
    assert choose(waits, RULES).ask
    held = choose(replace(waits, age_days=400.0, since_training_days=1.0), RULES)
    assert (held.ask, held.train) == (True, False)
    assert "memmc-cxr/2" in held.reason
    assert choose(replace(waits, age_days=400.0), RULES).train
    assert choose(replace(waits, pending="memmc-cxr/3"), RULES).judge


def decision(action, outcome, model):
    return Decision("cxr", action, outcome, "", "memmc-cxr", model)


def test_a_challenger_waits_until_a_verdict_was_kept():
    trained = decision("retrain", "trained", "memmc-cxr/2")
    assert pending([]) is None
    assert pending([decision("retrain", "wait", None), trained]) == "memmc-cxr/2"
    assert pending([decision("promote", "refused", "memmc-cxr/2"), trained]) is None
    assert pending([decision("rollback", "rolled back", "memmc-cxr/1"), trained]) is None
    assert pending([trained, decision("promote", "promoted", "memmc-cxr/2")]) is None  # the verdict's clock is behind
    assert pending([trained, decision("promote", "refused", "memmc-cxr/1")]) == "memmc-cxr/2"
