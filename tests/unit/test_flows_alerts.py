"""Events of alarms: each has one, and nothing but names, counts and advice is in it."""

from flows.alerts import CALM, PREFIX, WAITING, events_of, waiting_of
from memmc.monitoring.watch import TO_DO, Alarm


def look(*alarms):
    found = [vars(alarm) for alarm in alarms]
    return {"cohort": "cxr", "model": "memmc-cxr/2", "run": "r", "calm": not alarms, "alarms": found, "skipped": ["x"]}


def test_each_alarm_is_an_event_of_its_own():
    events = events_of(look(Alarm.of("no_data", "80 h"), Alarm.of("drift", "pixels: mean")))
    assert [name for name, _ in events] == [f"{PREFIX}no_data", f"{PREFIX}drift"]
    assert events[0][1] == {
        "cohort": "cxr",
        "model": "memmc-cxr/2",
        "run": "r",
        "found": "80 h",
        "to_do": TO_DO["no_data"],
    }


def test_a_calm_look_says_so_once():
    assert events_of(look()) == [(CALM, {"cohort": "cxr", "model": "memmc-cxr/2", "run": "r"})]


def test_who_waits_for_a_person_is_named_with_what_to_do():
    event, payload = waiting_of({"cohort": "cxr", "model": "memmc-cxr/2", "champion": None, "gates": [{"why": "x"}]})
    assert event == WAITING
    assert payload.keys() == {"cohort", "model", "champion", "to_do"}
    assert "memmc promote memmc-cxr/2 --cohort cxr --approve NAME" in payload["to_do"]
