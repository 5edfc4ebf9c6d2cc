"""The monitor flow: one look at a cohort; alarms become events that automations listen for."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event

from flows.alerts import events_of
from flows.calls import Overrides, call_flow, run_step
from flows.cockpit import show_trend
from flows.naming import Cohort, artifact_key, run_name
from flows.tasks import ON_STORAGE
from memmc.config import Config
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result


def run(
    config: Config, cohort: str, model: str | None = None, *, home: Path, progress: Progress, since: str | None = None
) -> dict[str, Any]:
    """Run the flow in this process; as `memmc.pipeline.monitor.monitor`, with Prefect watching."""
    parameters = {"cohort": cohort, "model": model, "since": since}
    return call_flow(lambda: monitor_flow, parameters, config=config, home=home, progress=progress)


@flow(name="monitor", flow_run_name=run_name("monitor"), persist_result=False, result_serializer="json")
def monitor_flow(
    cohort: Cohort, model: str | None = None, config: Overrides | None = None, since: str | None = None
) -> dict[str, Any]:
    """Look for drift, plant canaries, score the golden set anew, and ask whether anything is silent.

    An alarm is an event `memmc.alarm.NAME`; the run itself completes, since it did its work.

    Args:
        cohort: looked at.
        model: looked at in place of the champion.
        config: settings that differ from the defaults, by section; never key material.
        since: a date, or a version of `instances`: begin of the window.
    """
    found = look(cohort, model, config, since)
    publish(cohort, found)
    show_trend(cohort, config)
    alarm(cohort, found)
    return found


@task(name="look", **ON_STORAGE)
def look(cohort: str, model: str | None, config: Overrides | None, since: str | None) -> dict[str, Any]:
    """Look and keep what was found; a second try looks again."""

    def step(resolved: Config, progress: Progress) -> Result:
        from memmc.pipeline.monitor import monitor

        return monitor(resolved, cohort, model, since=since, progress=progress)

    return run_step(f"monitor-{cohort}", config, step)


def publish(cohort: str, found: dict[str, Any]) -> None:
    """Show the alarms in words, the tests of drift and the sensitivity to planted lesions."""
    lines = [f"- **{alarm['name']}**: {alarm['found']}. {alarm['to_do']}" for alarm in found["alarms"]]
    lines += [f"- not looked at: {text}" for text in found["skipped"]]
    create_markdown_artifact(
        "\n".join([f"## {cohort}: {'calm' if found['calm'] else 'alarm'}", "", *(lines or ["No alarm stands."])]),
        key=artifact_key("monitor", cohort),
    )
    shifts = [
        {name: shift[name] for name in ("group", "name", "stratum", "num_window", "effect", "adjusted", "drifted")}
        for shift in (found["drift"] or {}).get("shifts", [])
    ]
    if shifts:
        create_table_artifact(shifts, key=artifact_key("monitor", cohort, "drift"), description="Tests of drift")
    curve = (found["canaries"] or {}).get("curve", [])
    if curve:
        create_table_artifact(
            curve, key=artifact_key("monitor", cohort, "canaries"), description="Planted lesions found"
        )


def alarm(cohort: str, found: dict[str, Any]) -> None:
    """Emit one event for each alarm, or one that says all is calm."""
    for event, payload in events_of(found):
        emit_event(event, resource={"prefect.resource.id": f"memmc.cohort.{cohort}"}, payload=payload)
