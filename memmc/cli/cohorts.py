"""`memmc cohort`: name a part of what was ingested; nothing is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.results import CohortResult, CohortsResult

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Name a part of what was ingested, by rule; every verb takes it."
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME")]


@app.command()
def define(
    name: NameArgument,
    bases: Annotated[str, typer.Option("--from", metavar="C[,C2]", help="Ingested cohorts.")],
    where: Annotated[
        list[str],
        typer.Option(
            "--where", metavar="COLUMN=VALUE[,VALUE]", help="All must hold; UNKNOWN is no value. May be repeated."
        ),
    ],
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a view of ingested cohorts; it takes in what is ingested later, and its rule never changes."""
    from memmc.pipeline.cohorts import define_cohort

    with call(lake, config, settings, as_json=as_json) as run:
        result = define_cohort(run.config, name, [base.strip() for base in bases.split(",")], where)
        run.finish(result, lambda: summary(result))


@app.command()
def show(
    name: NameArgument,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a cohort's rule and what it holds, by attribute."""
    from memmc.pipeline.cohorts import show_cohort

    with call(lake, config, settings, as_json=as_json) as run:
        result = show_cohort(run.config, name)
        run.finish(result, lambda: summary(result))


@app.command(name="list")
def list_(
    lake: LakeOption = None, config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """List cohorts and views with their sizes."""
    from memmc.pipeline.cohorts import list_cohorts

    with call(lake, config, settings, as_json=as_json) as run:
        result = list_cohorts(run.config)
        run.finish(result, lambda: summary_of_all(result))


def summary(result: CohortResult) -> str:
    """The rule, then counts by attribute."""
    lines = [f"{result.cohort}: {result.instances} instances of {result.patients} patients"]
    if result.bases:
        lines.append(f"  view of {', '.join(result.bases)}, made {result.created_at}")
        lines += [f"  where {column} is {' or '.join(allowed)}" for column, allowed in result.rule.items()]
    for column, counts in result.counts.items():
        lines.append(f"  {column:<14} {', '.join(f'{value} {count}' for value, count in counts.items())}")
    return "\n".join(lines)


def summary_of_all(result: CohortsResult) -> str:
    """One line a cohort."""
    lines: list[str] = []
    for one in result.cohorts:
        origin = f"view of {', '.join(one['bases'])}" if one["bases"] else "ingested"
        lines.append(f"{one['cohort']:<24} {one['instances']:8d} instances {one['patients']:8d} patients  {origin}")
    return "\n".join(lines) or "no cohorts yet; run `memmc ingest SOURCE --cohort C`"
