"""The score flow: score what is not scored yet; measure and report on request."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.calls import Overrides, call_flow, has_caller, run_step
from flows.cockpit import first_begun, name_run, show_most_abnormal, show_tracked
from flows.naming import Cohort, artifact_key, run_name
from flows.ray_job import on_cluster, stop_cluster_jobs, submits_jobs
from flows.summary import as_markdown
from flows.tasks import ON_STORAGE
from memmc.config import Config
from memmc.errors import MissingClassError
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import EvaluationResult, ReportResult, Result, ScoreResult, TooEarly


def run(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    home: Path,
    progress: Progress,
    evaluate: bool = False,
    report: bool = False,
    since: str | None = None,
    limit: int | None = None,
) -> ScoreResult:
    """Run the flow in this process; as `memmc.pipeline.score.score`, with Prefect watching."""
    parameters = {"cohort": cohort, "model": model, "evaluate": evaluate, "report": report}
    parameters |= {"since": since, "limit": limit}
    scored = call_flow(lambda: score_flow, parameters, config=config, home=home, progress=progress)
    return ScoreResult(**scored)


@flow(
    name="score",
    flow_run_name=run_name("score"),
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_cluster_jobs],
)
def score_flow(
    cohort: Cohort,
    model: str | None = None,
    config: Overrides | None = None,
    evaluate: bool = False,
    report: bool = False,
    since: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score every stored instance of a cohort that this model and calibration have not scored yet.

    Args:
        cohort: whose instances.
        model: name, name/version or name@alias; the champion when absent.
        config: settings that differ from the defaults, by section; never key material.
        evaluate: measure the model on the cohort, if it is labelled.
        report: write the HTML report.
        since: a date, or a version of `instances`: only what was ingested from then on.
        limit: at most so many instances.
    """
    began = first_begun()
    if model is None and not has_caller() and (early := look_for_model(cohort, config)):
        create_markdown_artifact(as_markdown("Nothing scored", early), key=artifact_key("score", cohort))
        return early
    scored = score_instances(cohort, model, config, since, limit)
    create_markdown_artifact(as_markdown("Scored instances", scored), key=artifact_key("score", cohort))
    show_most_abnormal(cohort, scored["model"], began, config)
    show_tracked(cohort, scored["model"], config)
    if scored["left"] and (evaluate or report):
        evaluate = report = False
        get_run_logger().warning("%d instances wait for operate.window: nothing is measured yet", scored["left"])
    if evaluate and (measured := evaluate_model(cohort, scored["model"], config)):
        create_markdown_artifact(as_markdown("Evaluation", measured), key=artifact_key("evaluate", cohort))
    if report:
        written = write_report(cohort, scored["model"], config)
        create_link_artifact(as_link(written["report"]), link_text="Report", key=artifact_key("report", cohort))
    name_run("score", cohort, None, config)
    return scored


@task(name="look-for-model", **ON_STORAGE)
def look_for_model(cohort: str, config: Overrides | None) -> dict[str, Any]:
    """Return why nothing can be scored where there is no model yet, as on a new site; an empty result elsewhere."""

    def step(resolved: Config, progress: Progress) -> Result | None:
        from memmc.pipeline.identity import home_directory
        from memmc.pipeline.models import no_model_yet

        # Without a server for all, the cluster's models are the cluster's own.
        elsewhere = submits_jobs(resolved) and resolved.tracking.uri is None
        reason = None if elsewhere else no_model_yet(resolved, home_directory())
        if reason is None:
            return None
        progress.message(reason)
        return TooEarly(cohort, reason)

    return run_step(f"score-{cohort}", config, step)


@task(name="score-instances", **ON_STORAGE)
def score_instances(
    cohort: str, model: str | None, config: Overrides | None, since: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Score and commit; a second try scores only what is still missing."""

    def step(resolved: Config, progress: Progress) -> ScoreResult:
        from memmc.pipeline.score import score

        return score(resolved, cohort, model, since=since, limit=limit, progress=progress)

    job = on_cluster(step, "score", ScoreResult, cohort=cohort, model=model, since=since, limit=limit)
    return run_step(f"score-{cohort}", config, job)


@task(name="evaluate-model", **ON_STORAGE)
def evaluate_model(cohort: str, model: str, config: Overrides | None) -> dict[str, Any]:
    """Measure; an empty result when the cohort is not labelled."""

    def step(resolved: Config, progress: Progress) -> EvaluationResult:
        from memmc.pipeline.evaluate import evaluate

        return evaluate(resolved, cohort, model, progress=progress)

    job = on_cluster(step, "evaluate", EvaluationResult, cohort=cohort, model=model)

    def step_or_nothing(resolved: Config, progress: Progress) -> Result | None:
        try:
            return job(resolved, progress)
        except MissingClassError as error:
            progress.message(f"not evaluated: {error}")
            return None

    return run_step(f"evaluate-{cohort}", config, step_or_nothing)


@task(name="write-report", **ON_STORAGE)
def write_report(cohort: str, model: str, config: Overrides | None) -> dict[str, Any]:
    """Write the report into the lake."""

    def step(resolved: Config, progress: Progress) -> ReportResult:
        from memmc.pipeline.report import report

        return report(resolved, cohort, model, progress=progress)

    return run_step(f"report-{cohort}", config, on_cluster(step, "report", ReportResult, cohort=cohort, model=model))


def as_link(place: str) -> str:
    """Return a path as a file: URI, a URI as it is."""
    return place if "://" in place else Path(place).absolute().as_uri()
