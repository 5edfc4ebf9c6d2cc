"""The `memmc` command: one verb per step.

Exit status: 0 done, 1 failed, 2 wrong call or configuration, 3 refused by a gate.
Heavy imports happen inside the verbs, so that the first line appears at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memmc import __version__
from memmc.cli import (
    auditing,
    cohorts,
    comparing,
    deploying,
    gating,
    labelling,
    mapping,
    packaging,
    privacy,
    promoting,
    pushing,
    retraining,
    selection,
    summaries,
    tracking,
    vault,
    watching,
)
from memmc.cli import erase as erasure
from memmc.cli import lake as lake_verbs
from memmc.cli import sweep as sweeping
from memmc.cli.options import (
    BoxesOption,
    CohortOption,
    ConfigOption,
    DryRunOption,
    FlowOption,
    JsonOption,
    LakeOption,
    LimitOption,
    ModelOption,
    SetOption,
    SinceOption,
    call,
    prepare_flows,
)
from memmc.errors import MemmcError, UsageError, known_name

if TYPE_CHECKING:
    from memmc.pipeline.demo import Steps

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shown a hospital's normal scans, finds the scans that are not. Research software, not a medical device.",
)


@app.command()
def doctor(
    source: Annotated[
        str | None, typer.Option("--source", metavar="SOURCE", help="Look at a source too, as ingest would.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check what works on this machine; say the fix for what does not."""
    from memmc.pipeline.doctor import examine

    with call(lake, config, settings, as_json=as_json) as run:
        result = examine(run.config, run.terminal, source)
        run.finish(result, lambda: summaries.doctor(result))
    if not result.healthy:
        raise typer.Exit(1)


@app.command()
def demo(
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the scans, the lake and the report.")] = Path(
        "memmc-demo"
    ),
    minutes: Annotated[float, typer.Option("--minutes", help="Time to train, min.")] = 2.5,
    direct: Annotated[bool, typer.Option("--direct", help="Run the steps without Prefect.")] = False,
) -> None:
    """Go the whole way on generated scans; a few minutes on two cores, ends with the report's path."""
    from memmc.pipeline.demo import demo_overrides, run_demo

    chosen = demo_overrides(minutes, lake or str(out / "lake"))
    with call(None, config, [*chosen, *(settings or [])], as_json=as_json) as run:
        result = run_demo(run.config, out, run.home, run.terminal, steps=None if direct else _flow_steps())
        run.finish(result, lambda: summaries.demo(result))


def _flow_steps() -> Steps:
    from flows import demo as flow

    return flow.steps()


@app.command()
def ingest(
    cohort: CohortOption,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, ZIP file, s3://, orthanc+https:// or dicomweb+https:// URI; source.uri when absent.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="Label of every object: normal, abnormal or unknown.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE.csv", help="Columns path (or SOPInstanceUID) and label.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    flow: FlowOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Bring DICOM objects into the lake: each becomes one row, with pixels or with a reason."""
    labels_file = str(labels) if labels else None
    with call(lake, config, settings, as_json=as_json, flow=flow) as run:
        if source is None:
            source = run.config.source.uri
            labels_file = labels_file or (None if label else run.config.source.labels_file)
        if source is None:
            raise UsageError("nothing says what to ingest; name a SOURCE, or set source.uri")
        if dry_run:
            from memmc.pipeline.ingest import preview

            plan = preview(run.config, source, cohort, label=label, labels_file=labels_file, progress=run.terminal)
            run.finish(plan, lambda: summaries.plan(plan))
            return
        if run.as_flow:
            prepare_flows(run)
            from flows import ingest as flows_ingest

            result = flows_ingest.run(
                run.config, source, cohort, label, labels_file, home=run.home, progress=run.terminal
            )
        else:
            from memmc.pipeline.ingest import ingest as step

            result = step(run.config, source, cohort, label=label, labels_file=labels_file, progress=run.terminal)
        run.finish(result, lambda: summaries.ingest(result))


@app.command()
def train(
    cohort: CohortOption,
    preset: Annotated[str | None, typer.Option("--preset", help="tiny, small or base; train.preset.")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Unfinished run to go on with; new begins another.")
    ] = None,
    warm_start: Annotated[
        str | None, typer.Option("--warm-start", metavar="M", help="Model whose weights to start from.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    flow: FlowOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Learn a cohort's normal scans, calibrate on held-out ones, register the model."""
    named = {"preset": preset, "resume": resume, "warm_start": warm_start}
    chosen = [*(f"train.{name}={value}" for name, value in named.items() if value), *(settings or [])]
    with call(lake, config, chosen, as_json=as_json, flow=flow) as run:
        if dry_run:
            from memmc.pipeline.train import preview

            plan = preview(run.config, cohort)
            run.finish(plan, lambda: summaries.plan(plan))
            return
        if run.as_flow:
            prepare_flows(run)
            from flows import train as flows_train

            result = flows_train.run(run.config, cohort, home=run.home, progress=run.terminal)
        else:
            from memmc.pipeline.train import train as step

            result = step(run.config, cohort, progress=run.terminal)
        run.finish(result, lambda: summaries.train(result))


@app.command()
def calibrate(
    cohort: Annotated[
        str | None, typer.Option("--cohort", metavar="C", help="Normals to calibrate on; the model's own.")
    ] = None,
    model: ModelOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the score and its threshold to held-out normals again, without training."""
    from memmc.pipeline.calibrate import calibrate as step

    with call(lake, config, settings, as_json=as_json) as run:
        result = step(run.config, cohort, model, progress=run.terminal)
        run.finish(result, lambda: summaries.calibrate(result))


@app.command()
def score(
    cohort: CohortOption,
    model: ModelOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    flow: FlowOption = False,
    dry_run: DryRunOption = False,
    since: SinceOption = None,
    limit: LimitOption = None,
) -> None:
    """Score every stored instance of a cohort that this model and calibration have not scored yet."""
    with call(lake, config, settings, as_json=as_json, flow=flow) as run:
        if dry_run:
            from memmc.pipeline.score import preview

            plan = preview(run.config, cohort, model, since=since, limit=limit)
            run.finish(plan, lambda: summaries.plan(plan))
            return
        if run.as_flow:
            prepare_flows(run)
            from flows import score as flows_score

            result = flows_score.run(
                run.config, cohort, model, home=run.home, progress=run.terminal, since=since, limit=limit
            )
        else:
            from memmc.pipeline.score import score as step

            result = step(run.config, cohort, model, since=since, limit=limit, progress=run.terminal)
        run.finish(result, lambda: summaries.score(result))


@app.command()
def scores(
    cohort: CohortOption,
    model: ModelOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Parquet or CSV by its ending; CSV on stdout when absent."),
    ] = None,
    level: Annotated[
        Literal["instance", "study"], typer.Option("--level", help="One row per instance, or per study.")
    ] = "instance",
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a cohort's score rows as Parquet, CSV or JSON."""
    from memmc.pipeline.export import export_scores, rows_as_csv, rows_as_json

    with call(lake, config, settings, as_json=as_json) as run:
        table = export_scores(run.config, cohort, model, out, level)
        if as_json:
            run.say(rows_as_json(table, out))
        elif out is None:
            run.say(rows_as_csv(table), end="")
        else:
            run.say(f"{table.num_rows} rows: {out}")


@app.command()
def evaluate(
    cohort: CohortOption,
    model: ModelOption = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            "--masks", metavar="FILE.csv", help="Columns sop_instance_uid, path: lesion masks as PNG, for pixel AUROC."
        ),
    ] = None,
    boxes: BoxesOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on labelled instances of patients it never met, beside controls without a model."""
    from memmc.pipeline.evaluate import evaluate as step

    with call(lake, config, settings, as_json=as_json) as run:
        result = step(run.config, cohort, model, masks=masks, boxes=boxes, progress=run.terminal)
        run.finish(result, lambda: summaries.evaluate(result))


@app.command()
def report(
    cohort: CohortOption,
    model: ModelOption = None,
    masks: Annotated[Path | None, typer.Option("--masks", metavar="FILE.csv", help="As for evaluate.")] = None,
    boxes: BoxesOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="The file; reports/ in the lake when absent.")
    ] = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: figures, heat maps, what ingest refused, how it was made."""
    from memmc.pipeline.report import report as step

    with call(lake, config, settings, as_json=as_json) as run:
        where = str(out) if out else None
        result = step(run.config, cohort, model, out=where, masks=masks, boxes=boxes, progress=run.terminal)
        run.finish(result, lambda: result.report)


app.command(name="sweep")(sweeping.sweep)
app.command(name="select")(selection.select)
app.command(name="compare")(comparing.compare)
app.command(name="promote")(promoting.promote)
app.command(name="rollback")(promoting.rollback)
app.command(name="decisions")(promoting.decisions)
app.command(name="retrain")(retraining.retrain)
app.add_typer(retraining.app, name="review")
app.command(name="gate")(gating.gate)
app.add_typer(cohorts.app, name="cohort")
app.command(name="label")(labelling.label)
app.command(name="scan-phi")(privacy.scan_phi)
app.add_typer(vault.app, name="vault")
app.add_typer(lake_verbs.app, name="lake")
app.command(name="erase")(erasure.erase)
app.add_typer(auditing.app, name="audit")
app.add_typer(tracking.app, name="tracking")
app.command(name="export")(packaging.export)
app.command(name="deploy")(deploying.deploy)
app.command(name="drift")(watching.drift)
app.command(name="monitor")(watching.monitor)
app.command(name="maps")(mapping.maps)
app.command(name="explain")(mapping.explain)
app.command(name="push")(pushing.push)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold the options of the command itself."""


def main() -> None:
    """Run the command line; errors raised on purpose become one line and their exit status."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # children of ray and mlflow repeat each warning
    try:
        app(standalone_mode=True)
    except MemmcError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": known_name(error), "message": str(error)}))
        print(f"memmc: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
