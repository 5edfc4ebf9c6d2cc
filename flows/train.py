"""The train flow: a registered and calibrated model, summarised."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows.calls import Overrides, call_flow, run_step
from flows.cockpit import name_run, show_training
from flows.naming import Cohort, artifact_key, run_name
from flows.ray_job import on_cluster, stop_cluster_jobs
from flows.summary import as_markdown
from flows.tasks import DEAR
from memmc.config import Config
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import TrainResult


def run(config: Config, cohort: str, *, home: Path, progress: Progress) -> TrainResult:
    """Run the flow in this process; as `memmc.pipeline.train.train`, with Prefect watching."""
    trained = call_flow(lambda: train_flow, {"cohort": cohort}, config=config, home=home, progress=progress)
    return TrainResult(**trained)


@flow(
    name="train",
    flow_run_name=run_name("train"),
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_cluster_jobs],
)
def train_flow(cohort: Cohort, config: Overrides | None = None) -> dict[str, Any]:
    """Learn a cohort's normal scans, calibrate on held-out ones, register the model.

    Args:
        cohort: whose normal instances to learn.
        config: settings that differ from the defaults, by section; never key material.
    """
    trained = train_model(cohort, config)
    create_markdown_artifact(as_markdown("Trained model", trained), key=artifact_key("train", cohort))
    show_training(cohort, trained["model"], config)
    name_run("train", cohort, trained["dataset_version"], config)
    return trained


@task(name="train-model", **DEAR)
def train_model(cohort: str, config: Overrides | None) -> dict[str, Any]:
    """Train, calibrate and register."""

    def step(resolved: Config, progress: Progress) -> TrainResult:
        from memmc.pipeline.train import train

        return train(resolved, cohort, progress=progress)

    return run_step(f"train-{cohort}", config, on_cluster(step, "train", TrainResult, cohort=cohort))
