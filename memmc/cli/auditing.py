"""`memmc audit`: who did what, when, with which version; and whether that record stands as it was written."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.audit_trail import AuditVerdict

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Verify and export the audit trail of a lake.")


class AuditFormat(StrEnum):
    """What `memmc audit export` writes."""

    jsonl = "jsonl"
    fhir = "fhir"


@app.command()
def verify(
    head: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="NUMBER:DIGEST", help="An end of the trail kept elsewhere; may be repeated."),
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every record against its digest, its place and all who knew an end of the trail; exit 1 on tampering."""
    from memmc.pipeline.audit_trail import verify_trail

    with call(lake, config, settings, as_json=as_json) as run:
        result = verify_trail(run.config, head or ())
        run.finish(result, lambda: summary(result))
    if not result.intact:
        raise typer.Exit(1)


@app.command()
def export(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="The file; stdout when absent.")] = None,
    form: Annotated[
        AuditFormat, typer.Option("--format", help="JSON Lines as recorded, or FHIR R4 AuditEvents.")
    ] = AuditFormat.jsonl,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write all records out, one a line, after the trail has been verified."""
    from memmc.pipeline.audit_trail import export_trail

    with call(lake, config, settings, as_json=as_json) as run:
        result = export_trail(run.config, out, form.value)
        if as_json:
            shown = result.as_dict()
            shown["lines"] = [] if out else [json.loads(line) for line in result.lines]
            run.say(json.dumps(shown))
        elif out is None:
            run.say("\n".join(result.lines))
        else:
            run.say(f"{result.records} records: {out}\nhead {result.head}: keep it where who can write the lake cannot")


def summary(result: AuditVerdict) -> str:
    """The verdict, and the end of the trail to keep elsewhere."""
    if result.intact:
        return (
            f"intact: {result.records} records, compared with {result.witnesses} earlier ends of the trail\n"
            f"head {result.head}"
        )
    lines = [f"record {found['sequence']}: {found['problem']}" for found in result.findings[:20]]
    more = len(result.findings) - len(lines)
    return "\n".join(
        [f"TAMPERED  first at record {result.first_bad}", *lines, *([f"and {more} more"] if more > 0 else [])]
    )
