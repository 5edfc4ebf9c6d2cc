"""`memmc sweep`: which settings learn best, without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli import summaries
from memmc.cli.options import CohortOption, ConfigOption, DryRunOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.sweep import SweepResult, Trial


def sweep(
    cohort: CohortOption,
    params: Annotated[
        list[str],
        typer.Option("--param", metavar="SECTION.KEY=V,V", help="A model.* or train.* setting and its values."),
    ],
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=1, help="Trials drawn from all combinations.")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.05, help="Training time of a trial, min.")] = 5.0,
    by: Annotated[str, typer.Option("--by", help="probe_auroc or val_error, of held-out normals.")] = "probe_auroc",
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train combinations of settings for the same time, rank them on held-out normals, log each to MLflow."""
    from memmc.errors import UsageError
    from memmc.pipeline import sweep as step

    with call(lake, config, settings, as_json=as_json) as run:
        if by not in {"probe_auroc", "val_error"}:
            raise UsageError(f"--by {by}: expected probe_auroc or val_error")
        if dry_run:
            plan = step.preview(run.config, cohort, params, samples, minutes)
            run.finish(plan, lambda: summaries.plan(plan))
            return
        result = step.sweep(
            run.config,
            cohort,
            params,
            samples=samples,
            minutes=minutes,
            by="val_error" if by == "val_error" else "probe_auroc",
            progress=run.terminal,
        )
        run.finish(result, lambda: summary(result))


def summary(result: SweepResult) -> str:
    """One line a trial, best first, and how to train the best."""
    lines = [f"{'probe AUROC':>11}  {'val error':>9}  {'loss':>7}  {'steps':>6}  settings", *map(_line, result.trials)]
    sets = " ".join(f"--set {name}={value}" for name, value in result.trials[0].settings.items())
    return "\n".join([*lines, f"memmc train --cohort {result.cohort} {sets}"])


def _line(trial: Trial) -> str:
    shown = " ".join(f"{name}={value}" for name, value in trial.settings.items())
    if trial.failure or trial.probe_auroc is None or trial.val_error is None or trial.loss is None:
        return f"{'failed':>11}  {trial.failure:>9}  {'':>7}  {trial.steps:>6}  {shown}"
    return f"{trial.probe_auroc:>11.3f}  {trial.val_error:>9.4f}  {trial.loss:>7.4f}  {trial.steps:>6}  {shown}"
