"""`memmc promote`, `memmc rollback`, `memmc decisions`: who is the champion, and why."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memmc.cli.options import CohortOption, ConfigOption, JsonOption, LakeOption, SetOption, call
from memmc.errors import GateRefused
from memmc.pipeline.progress_lines import LINES, VARIABLE

if TYPE_CHECKING:
    from memmc.pipeline.promote import PromoteResult
    from memmc.pipeline.retrain import ReplayResult


def promote(
    cohort: CohortOption,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="name/version or name@alias; the cohort's challenger.")
    ] = None,
    approve: Annotated[
        str | None, typer.Option("--approve", metavar="NAME", help="Who agrees; promote.approval says if one must.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Measure and say, keep no verdict, move nothing; scores that it needs are kept."
        ),
    ] = False,
) -> None:
    """Put a model through the gates against the champion, and into its place if it passes; 3 if it does not."""
    from memmc.pipeline.promote import promote as step

    with call(lake, config, settings, as_json=as_json) as run:
        result = step(run.config, cohort, model, approve=approve, dry_run=dry_run, progress=run.terminal)
        run.finish(result, lambda: summary(result))
    end(result.outcome, f"{result.model} is not promoted: {result.reason}", as_json=as_json)


def rollback(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Registered model; may be left out where only one has a champion."),
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the champion before the present one back in its place."""
    from memmc.pipeline.promote import rollback as step

    with call(lake, config, settings, as_json=as_json) as run:
        result = step(run.config, name)
        run.finish(result, lambda: f"{result.champion} is the champion again, {result.left} no longer")


def decisions(
    cohort: CohortOption,
    replay: Annotated[
        bool, typer.Option("--replay", help="Ask what the present retrain.* settings would have decided.")
    ] = False,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was decided about a cohort's models, newest first, and why."""
    from memmc.pipeline.decisions import decisions as step
    from memmc.pipeline.retrain import replay as ask_again

    with call(lake, config, settings, as_json=as_json) as run:
        if replay:
            asked = ask_again(run.config, cohort)
            run.finish(asked, lambda: replayed(asked))
            return
        result = step(run.config, cohort)
        run.finish(result, lambda: "\n".join(line(item) for item in result.decisions) or "no decision yet")


def replayed(result: ReplayResult) -> str:
    """One line a decision, then how many would be others."""
    lines = [f"{row['decided_at']}  {row['was']:<5} -> {row['now']:<5}  {row['reason']}" for row in result.decisions]
    return "\n".join([*lines, f"{result.changed} of {len(result.decisions)} retraining decisions would be others"])


def end(outcome: str, message: str, *, as_json: bool) -> None:
    """End with 3 where nothing was promoted; in the JSON mode the result has been printed already.

    A job that a flow has submitted ends well: its verdict is the result, and the flow's to act on.

    Raises:
        GateRefused: in the mode for people.
    """
    if outcome == "promoted" or os.environ.get(VARIABLE) == LINES:
        return
    if as_json:
        print(f"memmc: {message}", file=sys.stderr)
        raise typer.Exit(GateRefused.exit_code)
    raise GateRefused(message)


def summary(result: PromoteResult) -> str:
    """The gates, then the verdict."""
    against = f"against {result.champion}" if result.champion else "without a champion before it"
    verdict = f"{result.outcome}: {result.reason}" if result.outcome == "promoted" else result.outcome
    return "\n".join([f"{result.model} {against}", *gate_lines(result.gates), verdict])


def gate_lines(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a gate."""
    signs = {"pass": "ok  ", "fail": "FAIL", "not applicable": "-   "}
    return [f"  {signs[gate['verdict']]}  {gate['name']:<16} {gate['why']}" for gate in gates]


def line(decision: Mapping[str, Any]) -> str:
    """One decision: when, what, about which model, why."""
    about = " ".join(part for part in (decision["model"], _by(decision)) if part)
    return f"{decision['decided_at']}  {decision['action']:<8} {decision['outcome']:<11} {about}  {decision['reason']}"


def _by(decision: Mapping[str, Any]) -> str:
    return f"(approved by {json.dumps(decision['approver'])})" if decision["approver"] else ""
