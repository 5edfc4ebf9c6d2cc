"""`memmc deploy`: what runs when, from a file to a Prefect server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memmc.cli.options import DryRunOption, JsonOption

if TYPE_CHECKING:
    from flows.deploy import Change, DeployResult

_MARKS = {"create": "+", "update": "~", "delete": "-"}
_LONGEST = 60


def deploy(
    file: Annotated[
        Path, typer.Option("--file", metavar="FILE.yaml", help="Deployments; automations.yaml beside it goes along.")
    ] = Path("infra/prefect.yaml"),
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="POOL", help="Put all deployments into this work pool of the file.")
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the Prefect server of PREFECT_API_URL equal to the file: deployments, schedules, work pools, automations."""
    from flows.deploy import deploy as step

    result = step(file, pool=pool, dry_run=dry_run)
    print(json.dumps(result.as_dict()) if as_json else summary(result))


def summary(result: DeployResult) -> str:
    """One line a thing that differs, one below it a field."""
    lines = [line for change in result.changes for line in _lines(change)]
    lines += [f"  {name} waits for the block {', '.join(blocks)}" for name, blocks in result.waiting.items()]
    verb = "changed" if result.applied else "to change"
    return "\n".join([*lines, f"{len(result.changes)} {verb}, {result.unchanged} as they should be"])


def _lines(change: Change) -> list[str]:
    fields = [f"    {name}: {_short(now)} -> {_short(wanted)}" for name, (now, wanted) in change.fields.items()]
    return [f"{_MARKS[change.action]} {change.what} {change.name}", *fields]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
