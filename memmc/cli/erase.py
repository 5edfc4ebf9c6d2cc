"""`memmc erase`: a patient or a study leaves the lake."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, DryRunOption, JsonOption, LakeOption, SetOption, call
from memmc.errors import UsageError

if TYPE_CHECKING:
    from memmc.pipeline.erase import EraseResult

_STDIN = "-"


def erase(
    patient: Annotated[
        str | None,
        typer.Option(
            "--patient",
            metavar="KEY",
            help="patient_key of the rows; '-' reads the original Patient ID from standard input, and its issuer, if "
            "it has one, from a second line.",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            "--study", metavar="UID", help="study_uid of the rows; '-' reads the original from standard input."
        ),
    ] = None,
    cohort: Annotated[
        str | None, typer.Option("--cohort", metavar="C", help="The only cohort to erase from; all when absent.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Take a patient or a study out of every table, old versions and files included; list the models that met them."""
    from memmc.pipeline.erase import erase as step
    from memmc.pipeline.erase import pseudonym_of

    if (patient is None) == (study is None):
        raise UsageError("give --patient or --study, one of them")
    kind, value = ("patient", patient) if patient is not None else ("study", study or "")
    with call(lake, config, settings, as_json=as_json) as run:
        if value == _STDIN:
            original, _, rest = sys.stdin.read().partition("\n")
            value = pseudonym_of(run.config, kind, original.strip(), rest.partition("\n")[0].strip())
        result = step(run.config, kind, value or "", cohort, dry_run=dry_run, progress=run.terminal)
        run.finish(result, lambda: summary(result))


def summary(result: EraseResult) -> str:
    """What went by table, the models to look at, and what is left to do."""
    verb = "erased" if result.erased else "to erase"
    counts = ", ".join(f"{count} rows of {table}" for table, count in result.rows.items())
    lines = [f"{verb}: {counts}; {result.files} files, {len(result.reports)} reports"]
    for model in result.models:
        told = "" if model["use"].startswith("unknown") else " met these images; train and calibrate anew"
        lines.append(f"  {model['model']}: {model['use']}{told}")
    if result.waiting or result.writers:
        lines.append(
            f"{result.writers} runs were writing and {result.waiting} of their files hold such rows: "
            "erase again when they have ended"
        )
    if result.erased:
        lines.append(
            f"recorded in {result.record}; copies of the lake, and pages written elsewhere, are yours to erase"
        )
    return "\n".join(lines)
