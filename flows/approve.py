"""The approve flow: a person's answer for a challenger that waits, where no run is there to take it."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from typing import Any

from prefect import flow, task

from flows.calls import Overrides, run_step
from flows.naming import Cohort, Person, run_name
from flows.ray_job import stop_cluster_jobs
from flows.retrain import promoted_or_refused, settle
from flows.tasks import ON_STORAGE
from memmc.config import Config
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result


@flow(
    name="approve",
    flow_run_name=run_name("approve"),
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_cluster_jobs],
)
def approve_flow(cohort: Cohort, name: Person, approve: bool = True, config: Overrides | None = None) -> dict[str, Any]:
    """Answer for the challenger that waits for a person: make it the champion, or keep that they said no.

    Args:
        cohort: whose model.
        name: of the person who answers.
        approve: whether they agree.
        config: settings that differ from the defaults, by section; never key material.
    """
    asked = find_waiting(cohort, config)
    verdict = settle(cohort, asked["model"], name, approve, config)
    return promoted_or_refused(verdict, verdict) if approve else verdict


@task(name="find-waiting", **ON_STORAGE)
def find_waiting(cohort: str, config: Overrides | None) -> dict[str, Any]:
    """Return the verdict that waits for a person."""

    def step(resolved: Config, _progress: Progress) -> Result:
        from memmc.pipeline.promote import find_waiting

        return find_waiting(resolved, cohort)

    return run_step(f"promote-{cohort}", config, step)
