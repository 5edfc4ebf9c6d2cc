"""What a run shows beside its account. A lack of it never fails a run that has done its work.

A picture lies in its artifact, as a data: URI, since there is no place that both the browser and every worker reach; so
it is bounded (`memmc.pipeline.cockpit.MOST_BYTES`). The artifact is Markdown: under an image artifact the pages print
the whole URI.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.context import FlowRunContext

from flows.calls import Overrides, config_in_force
from flows.naming import artifact_key
from flows.summary import as_table
from memmc.config import Config
from memmc.errors import MemmcError

T = TypeVar("T")


def show_training(cohort: str, model: str, config: Overrides | None) -> None:
    """Show a training's curves, and where MLflow has it."""

    def curves(resolved: Config) -> None:
        from memmc.pipeline.cockpit import training_curves

        png = training_curves(resolved, model)
        if png is not None:
            _image(png, "png", artifact_key("train", cohort, "curves"), f"Training of {model}")

    shown("the training's curves", config, curves)
    show_tracked(cohort, model, config)


def show_tracked(cohort: str, model: str, config: Overrides | None) -> None:
    """Link the run of a model in MLflow's pages."""

    def link(resolved: Config) -> None:
        from memmc.pipeline.cockpit import tracked_at

        place = tracked_at(resolved, model)
        if place is not None:
            create_link_artifact(place, link_text=f"{model} in MLflow", key=artifact_key("mlflow", cohort))

    shown("the run in MLflow", config, link)


def show_most_abnormal(cohort: str, model: str, since: datetime, config: Overrides | None) -> None:
    """Show the batch's most abnormal scans: a table of pseudonyms, and pictures where `cockpit.pixels` says so."""

    def most(resolved: Config) -> None:
        from memmc.pipeline.cockpit import contact_sheet, most_abnormal

        rows = most_abnormal(resolved, cohort, model, since)
        if not rows:
            return
        table = as_table(rows)
        key = artifact_key("score", cohort, "most-abnormal")
        if resolved.cockpit.pixels:
            sheet = contact_sheet(resolved, cohort, model, rows)
            _image(sheet, "jpeg", key, f"The most abnormal by {model}, each beside its heat map", table)
        else:
            create_markdown_artifact(table, key=key, description=f"The most abnormal by {model}")

    shown("the most abnormal scans", config, most)


def first_begun() -> datetime:
    """Return when this flow run first began: before now where it goes on after a crash."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run.start_time if run and run.start_time else datetime.now(UTC)


def show_trend(cohort: str, config: Overrides | None) -> None:
    """Show how what monitoring finds has gone on."""

    def trend(resolved: Config) -> None:
        from memmc.pipeline.monitor import picture_of

        _image(picture_of(resolved, cohort), "png", artifact_key("monitor", cohort, "trend"), f"Monitoring of {cohort}")

    shown("the trend", config, trend)


def name_run(step: str, cohort: str, version: int | None, config: Overrides | None) -> None:
    """Put the dataset's version into the run's name: `score-cxr-v12-20261122-2301`.

    Args:
        version: of `instances`; the newest when absent.
    """

    def rename(resolved: Config) -> None:
        from prefect import get_client
        from prefect.runtime import flow_run

        from memmc.lake.schemas import INSTANCES
        from memmc.lake.tables import Lake

        found = Lake(resolved.lake.uri).version(INSTANCES) if version is None else version
        began = flow_run.name.removeprefix(f"{step}-{cohort}-")
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=f"{step}-{cohort}-v{found}-{began}")

    shown("the dataset's version", config, rename)


def shown(what: str, config: Overrides | None, show: Callable[[Config], T]) -> T | None:
    """Return what `show` returns; what goes wrong is a line in the run's log, without an unforeseen error's text."""
    try:
        return show(config_in_force(config))
    except MemmcError as error:
        get_run_logger().warning("%s cannot be shown: %s", what, error)
    except Exception as error:  # noqa: BLE001 - the boundary to an API that shows error texts
        get_run_logger().warning("%s cannot be shown: unexpected %s", what, type(error).__name__)
    return None


def _image(data: bytes, kind: str, key: str, description: str, below: str = "") -> Any:
    """Publish a picture, and Markdown below it."""
    uri = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return create_markdown_artifact(f"![{description}]({uri})\n\n{below}", key=key, description=description)
