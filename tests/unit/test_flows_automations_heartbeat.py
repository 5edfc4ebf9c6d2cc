"""Which runs the heartbeat automations mean, judged by the server's own matching."""

import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from flows.embedded import _ALWAYS
from flows.naming import TAG

FILE = Path(__file__).parents[2] / "infra" / "automations.yaml"


def trigger(name, part=None):
    from prefect.server.events.schemas.automations import EventTrigger

    found = {each["name"]: each["trigger"] for each in yaml.safe_load(FILE.read_text())["automations"]}[name]
    return EventTrigger.model_validate(found if part is None else found["triggers"][part])


def event(kind, run_count="1", tag=TAG):
    from prefect.server.events.schemas.events import ReceivedEvent

    run = f"prefect.flow-run.{uuid.uuid4()}"
    return ReceivedEvent(
        event=f"prefect.flow-run.{kind}",
        resource={"prefect.resource.id": run, "prefect.run-count": run_count},
        related=[
            {"prefect.resource.id": f"prefect.flow.{uuid.uuid4()}", "prefect.resource.role": "flow"},
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"},
        ],
        occurred=datetime.now(UTC),
        received=datetime.now(UTC),
        id=uuid.uuid4(),
    )


@pytest.mark.parametrize(("count", "again"), [("0", False), ("1", True), ("2", True), ("3", False), ("12", False)])
def test_a_crashed_run_begins_again_twice_at_most(count, again):
    crashed = event("Crashed", count)
    found = trigger("memmc-resume-crashed")
    assert (found.covers(crashed) and found.expects(crashed.event)) is again


@pytest.mark.parametrize("count", ["0", "1", "2", "3", "4", "9", "10", "12", "21", "100"])
def test_a_crash_is_either_begun_again_or_announced(count):
    crashed = event("Crashed", count)
    told = trigger("memmc-alert-failed", 1)
    assert told.expects(crashed.event)
    assert told.covers(crashed) is not trigger("memmc-resume-crashed").covers(crashed)


def test_monitoring_that_never_began_is_noticed_too():
    never = trigger("memmc-alert-never-monitored")
    assert (never.after, never.for_each, never.threshold) == (set(), set(), 1)
    assert never.expects("memmc.monitor.calm") and never.expects("memmc.alarm.drift")
    assert never.within == trigger("memmc-alert-silent").within


@pytest.mark.parametrize("kind", ["Failed", "Cancelled", "Completed", "heartbeat"])
def test_nothing_but_a_crash_begins_a_run_again(kind):
    assert not trigger("memmc-resume-crashed").expects(event(kind).event)


@pytest.mark.parametrize("name", ["memmc-crash-zombies", "memmc-resume-crashed"])
def test_runs_of_others_are_left_alone(name):
    assert trigger(name).covers(event("Crashed"))
    assert not trigger(name).covers(event("Crashed", tag="theirs"))


@pytest.mark.parametrize("kind", ["Completed", "Failed", "Cancelled", "Cancelling", "Suspended"])
def test_any_word_of_a_run_shows_that_it_lives(kind):
    assert trigger("memmc-crash-zombies").expects(f"prefect.flow-run.{kind}")
    assert not trigger("memmc-crash-zombies").starts_after(f"prefect.flow-run.{kind}")


@pytest.mark.parametrize("kind", ["heartbeat", "Running", "Retrying"])
def test_a_run_at_work_has_to_be_heard_again(kind):
    assert trigger("memmc-crash-zombies").expects(f"prefect.flow-run.{kind}")
    assert trigger("memmc-crash-zombies").starts_after(f"prefect.flow-run.{kind}")


def test_three_beats_have_to_be_missed():
    beat_s = int(_ALWAYS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert trigger("memmc-crash-zombies").within.total_seconds() == 3 * beat_s


def test_every_work_pool_makes_its_runs_beat_so_often():
    pools = yaml.safe_load((FILE.parent / "prefect.yaml").read_text())["work_pools"]
    assert pools
    for pool in pools:
        assert (
            pool["variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
            == _ALWAYS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
        )
