"""`memmc drift` and `memmc monitor`: is the stream what the model was made for, and is all at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from memmc.cli.options import (
    CohortOption,
    ConfigOption,
    FlowOption,
    JsonOption,
    LakeOption,
    ModelOption,
    SetOption,
    SinceOption,
    call,
    prepare_flows,
)

if TYPE_CHECKING:
    from memmc.pipeline.drift import DriftResult
    from memmc.pipeline.monitor import MonitorResult


def drift(
    cohort: CohortOption,
    model: ModelOption = None,
    since: SinceOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare new instances with those the model was made for; no label is needed. Exit status 3 where they differ."""
    from memmc.pipeline.drift import drift as step

    with call(lake, config, settings, as_json=as_json) as run:
        result = step(run.config, cohort, model, since=since, progress=run.terminal)
        run.finish(result, lambda: drift_summary(result))
    if result.drifted:
        raise typer.Exit(3)


def drift_summary(result: DriftResult) -> str:
    """Who was compared, then what has drifted, or that nothing has."""
    first = (
        f"{result.num_window} patients since {result.since or 'the last days'} ({result.num_scored} scored) beside "
        f"{result.num_baseline} of {result.model}'s baseline"
    )
    if not result.tested:
        return f"{first}: too few to compare (monitor.min_window)"
    if not result.drifted:
        return f"{first}: no drift in {result.num_tests} tests"
    return "\n".join([f"{first}: drift", *(f"  {finding}" for finding in result.findings)])


def monitor(
    cohort: CohortOption,
    model: ModelOption = None,
    since: SinceOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    flow: FlowOption = False,
) -> None:
    """Look for drift, blindness to planted lesions, moved scores and silence. Exit status 3 where an alarm stands."""
    from memmc.pipeline.monitor import MonitorResult

    with call(lake, config, settings, as_json=as_json, flow=flow) as run:
        if run.as_flow:
            prepare_flows(run)
            from flows import monitor as flows_monitor

            found: dict[str, Any] = flows_monitor.run(
                run.config, cohort, model, home=run.home, progress=run.terminal, since=since
            )
            result = MonitorResult(**found)
        else:
            from memmc.pipeline.monitor import monitor as step

            result = step(run.config, cohort, model, since=since, progress=run.terminal)
        run.finish(result, lambda: monitor_summary(result))
    if not result.calm:
        raise typer.Exit(3)


def monitor_summary(result: MonitorResult) -> str:
    """The alarms with what to do, or that all is calm; then what could not be looked at, and where the page lies."""
    lines = [f"{result.cohort}, {result.model or 'no model'}: {'calm' if result.calm else 'ALARM'}"]
    for alarm in result.alarms:
        lines += [f"  {alarm['name']}: {alarm['found']}", f"      {alarm['to_do']}"]
    lines += [f"  not looked at: {text}" for text in result.skipped]
    return "\n".join([*lines, result.page])
