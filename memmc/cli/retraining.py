"""`memmc retrain`, and `memmc review`: the normals that wait for a person before they are learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memmc.cli.options import (
    CohortOption,
    ConfigOption,
    DryRunOption,
    FlowOption,
    JsonOption,
    LakeOption,
    SetOption,
    call,
    prepare_flows,
)
from memmc.cli.promoting import end, gate_lines

if TYPE_CHECKING:
    from memmc.pipeline.retrain import RetrainResult
    from memmc.pipeline.review import ReviewResult

app = typer.Typer(no_args_is_help=True, help="Normals that a model finds odd: list, accept or reject them.")

UidsArgument = Annotated[list[str], typer.Argument(metavar="UID...", help="sop_instance_uid, as the list shows it.")]


def retrain(
    cohort: CohortOption,
    approve: Annotated[
        str | None, typer.Option("--approve", metavar="NAME", help="Who agrees to the promotion, as for promote.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    flow: FlowOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Train anew if new normals, age or drift ask for it, and promote what passes the gates; 3 if it does not."""
    with call(lake, config, settings, as_json=as_json, flow=flow and not dry_run) as run:
        if run.as_flow and not dry_run:
            prepare_flows(run)
            from flows import retrain as flows_retrain

            result = flows_retrain.run(run.config, cohort, approve, home=run.home, progress=run.terminal)
        else:
            from memmc.pipeline.retrain import retrain as step

            result = step(run.config, cohort, approve=approve, dry_run=dry_run, progress=run.terminal)
        run.finish(result, lambda: summary(result))
    if result.verdict:
        message = f"{result.verdict['model']} is not promoted: {result.verdict['reason']}"
        end(result.verdict["outcome"], message, as_json=as_json)


def summary(result: RetrainResult) -> str:
    """What was decided and why, what was trained, what the gates say."""
    lines = [f"{result.plan['outcome']}: {result.plan['reason']}"]
    if found := result.plan["screened"]:
        lines.append(
            f"screened {found['screened']} new normals, {found['suspects']} suspect, {found['waiting']} waiting"
        )
    if trained := result.trained:
        lines.append(f"trained {trained['model']}: {trained['steps']} steps on {trained['num_images']} normal images")
    if verdict := result.verdict:
        lines += [*gate_lines(verdict["gates"]), f"{verdict['model']}: {verdict['outcome']}"]
    return "\n".join(lines)


@app.command(name="list")
def list_(
    cohort: CohortOption,
    every: Annotated[bool, typer.Option("--all", help="Those that were judged too.")] = False,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the normals that wait for a person, the oddest first."""
    from memmc.pipeline.review import reviews

    with call(lake, config, settings, as_json=as_json) as run:
        result = reviews(run.config, cohort, every=every)
        run.finish(result, lambda: listing(result))


@app.command()
def accept(
    uids: UidsArgument,
    cohort: CohortOption,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let them be learned as normal."""
    from memmc.pipeline.review import settle

    with call(lake, config, settings, as_json=as_json) as run:
        result = settle(run.config, cohort, uids, "accepted")
        run.finish(result, lambda: listing(result))


@app.command()
def reject(
    uids: UidsArgument,
    cohort: CohortOption,
    label: Annotated[
        Literal["unknown", "abnormal"], typer.Option("--label", help="What they are instead of normal.")
    ] = "unknown",
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the label normal from them; they are never learned."""
    from memmc.pipeline.review import settle

    with call(lake, config, settings, as_json=as_json) as run:
        result = settle(run.config, cohort, uids, "rejected", label=label)
        run.finish(result, lambda: listing(result))


def listing(result: ReviewResult) -> str:
    """One line an instance, then the counts."""
    lines = [
        f"{item['state']:<9} p {'-' if item['p_value'] is None else format(item['p_value'], '.4f'):<6}  "
        f"{item['sop_instance_uid']}"
        for item in result.instances
    ]
    counts = ", ".join(f"{count} {state}" for state, count in result.counts.items()) or "nothing under review"
    return "\n".join([*lines, counts])
