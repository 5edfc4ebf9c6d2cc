"""`memmc lake`: verify, history, vacuum, expire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, DryRunOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.lake_care import HistoryResult, VacuumResult, VerifyResult
    from memmc.pipeline.retention import ExpireResult

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the tables of a lake.")

_REMEDY = (
    "Restore the named files from a copy of the lake (a shard's name carries the SHA-256 it must have), "
    "or ingest or score the affected cohort again into a new lake; then verify again."
)
_SHOWN = 20


@app.command()
def verify(
    lake: LakeOption = None, config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """Read every byte of the tables against its checksums and balance the account; exit 1 when damaged."""
    from memmc.pipeline.lake_care import verify_lake

    with call(lake, config, settings, as_json=as_json) as run:
        result = verify_lake(run.config, run.terminal)
        run.finish(result, lambda: verified(result))
    if not result.whole:
        raise typer.Exit(1)


@app.command()
def history(
    table: Annotated[str | None, typer.Option("--table", metavar="TABLE", help="One table; all when absent.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Commits to list, the newest.")] = 20,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List commits, newest first: when, which run, what it added and removed."""
    from memmc.pipeline.lake_care import history_of

    with call(lake, config, settings, as_json=as_json) as run:
        result = history_of(run.config, table, limit)
        run.finish(result, lambda: commits(result))


@app.command()
def vacuum(
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Delete what nothing refers to and that is older than lake.vacuum_hours; running ingests lose nothing."""
    from memmc.pipeline.lake_care import vacuum_lake

    with call(lake, config, settings, as_json=as_json) as run:
        result = vacuum_lake(run.config, dry_run=dry_run)
        run.finish(result, lambda: vacuumed(result))


@app.command()
def expire(
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Delete checkpoints of training runs silent for lake.keep_checkpoints_days; models lie in the registry."""
    from memmc.pipeline.retention import expire_checkpoints

    with call(lake, config, settings, as_json=as_json) as run:
        result = expire_checkpoints(run.config, dry_run=dry_run)
        run.finish(result, lambda: expired(result))


def verified(result: VerifyResult) -> str:
    """Counts by table and cohort; every damage, and what to do."""
    lines = [
        f"{name:<14} version {found['version']}: {found['shards']} shards, {found['rows']} rows, "
        f"{found['bytes'] / 1e6:.1f} MB"
        for name, found in result.tables.items()
    ]
    for cohort, outcomes in result.cohorts.items():
        parts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        lines.append(f"cohort {cohort}: {sum(outcomes.values())} objects = {parts}")
    if result.whole:
        return "\n".join([*lines, "whole: every byte is the one that was written, the account balances"])
    lines += [f"DAMAGED  {item.shard or item.table}: {item.problem}" for item in result.damages]
    return "\n".join([*lines, _REMEDY])


def expired(result: ExpireResult) -> str:
    """Which runs' checkpoints went, or would go."""
    verb = "deleted" if result.deleted else "to delete"
    lines = [f"  {run}" for run in result.runs]
    return "\n".join([*lines, f"{verb}: {result.files} files of {len(lines)} runs silent for {result.days} days"])


def commits(result: HistoryResult) -> str:
    """One line a commit."""
    return "\n".join(
        f"{commit['timestamp']}  {commit['table']:<12} {commit['version']:>6}  "
        f"+{commit['rows_added']} rows in {commit['shards_added']} shards, -{commit['shards_removed']} shards  "
        f"{commit['run'] or commit['operation']}"
        for commit in result.commits
    )


def vacuumed(result: VacuumResult) -> str:
    """What went, or would go, and how far back versions stay whole."""
    names = [*result.shards, *result.unfinished]
    verb = "deleted" if result.deleted else "to delete"
    lines = [f"  {name}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"  and {len(names) - _SHOWN} more")
    lines.append(
        f"{verb}: {len(result.shards)} shards, {len(result.unfinished)} unfinished files, {result.uploads} uploads; "
        f"versions of the last {result.hours} h stay whole, older ones where no commit since has replaced their shards"
    )
    return "\n".join(lines)
