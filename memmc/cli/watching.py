"""`memmc drift`: has the stream changed since the model was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from memmc.cli.options import (
    CohortOption,
    ConfigOption,
    JsonOption,
    LakeOption,
    ModelOption,
    SetOption,
    SinceOption,
    call,
)

if TYPE_CHECKING:
    from memmc.pipeline.drift import DriftResult


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
