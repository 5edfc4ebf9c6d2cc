"""`memmc select`: why an object is or is not in scope."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, JsonOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.explain import Explanation, RuleAnswer


def select(
    file: Annotated[Path, typer.Option("--explain", metavar="FILE", help="One DICOM object on this machine.")],
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which rules of selection an object passes, what they read, and the verdict. Shows no patient data."""
    from memmc.pipeline.explain import explain_file

    with call(None, config, settings, as_json=as_json) as run:
        result = explain_file(run.config, file)
        run.finish(result, lambda: summary(result))


def summary(result: Explanation) -> str:
    """One line a rule, in the order they are asked; the verdict last."""
    lines = [line for rule in result.rules for line in _lines(rule)]
    verdict = f"{result.outcome}: {result.meaning}" + (f" ({result.reason})" if result.reason else "")
    return "\n".join([*lines, verdict])


def _lines(rule: RuleAnswer) -> list[str]:
    values = ", ".join(f"{keyword} {value}" for keyword, value in rule.values.items())
    first = f"{'pass' if rule.passed else 'FAIL'}  {rule.name:<18} {values}".rstrip()
    if rule.passed:
        return [first]
    setting = f"; {rule.setting}" if rule.setting else ""
    return [first, f"      {rule.reason}: {rule.states}{setting}"]
