"""A flow's step as a Ray job, where `ray.address` is a cluster's Jobs API: the same `memmc` command, run over there.

The job is named after the flow run, so that a run which is begun again after a
crash joins it. Its command, which the cluster's dashboard shows, holds what
Prefect shows too: the step's settings, but no place of a source, no credentials
and no path of a key; those are of the cluster's own environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from flows.calls import (
    PLACES,
    config_of,
    kept_places,
    overrides_of,
    refuse_credentials,
    setting_arguments,
    without,
)
from memmc.config import Config, RayConfig
from memmc.errors import UsageError
from memmc.pipeline.cluster_job import run_job, stop_jobs, takes_jobs
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

R = TypeVar("R", bound=Result)

# What the cluster knows for itself, or what ends with the submitting step.
_STAYS_HERE = {
    **PLACES,
    "ray": frozenset(RayConfig.model_fields),
    "operate": frozenset({"deadline_minutes"}),
}


def on_cluster(
    step: Callable[[Config, Progress], R | None], verb: str, kind: type[R], *words: str | None, **options: Any
) -> Callable[[Config, Progress], R | None]:
    """Return `step`, or in its place the `memmc` command that does the same on a cluster.

    Args:
        step: does the work in this process.
        verb: of the command.
        kind: of its result.
        words: positional arguments; None is left out.
        options: by name; None is left out.
    """

    def chosen(config: Config, progress: Progress) -> R | None:
        if not takes_jobs(config.ray):
            return step(config, progress)
        _refuse_kept_places()
        arguments = [verb, *(word for word in words if word is not None), *_flags(options), "--json"]
        return run_job(config.ray, job_name(verb), [*arguments, *settings_of(config)], kind, progress)

    return chosen


def submits_jobs(config: Config) -> bool:
    """Say whether the steps of a flow run as jobs of a cluster."""
    return takes_jobs(config.ray)


def job_name(verb: str) -> str:
    """Return the name of this flow run's job; the same after a crash."""
    from prefect.runtime import flow_run

    return f"{_prefix(flow_run.id)}{verb}"


def settings_of(config: Config) -> list[str]:
    """Return the `--set` arguments of a job.

    Raises:
        UsageError: a setting that cannot reach the cluster, or that would show credentials there.
    """
    if config.deid.key_secret is not None:
        raise UsageError(
            "deid.key_secret cannot reach a Ray job, whose settings the cluster shows; mount the key there and name it "
            "in the cluster's own MEMMC_DEID__KEY_FILE (infra/docs/faults.md)"
        )
    if "://" not in config.lake.uri and not config.lake.uri.startswith("/"):
        raise UsageError("lake.uri is a relative path, which means another place on a cluster; name an s3:// URI")
    settings = without(overrides_of(config), _STAYS_HERE)
    settings["ray"] = {"address": "auto"}
    refuse_credentials(settings)
    return [part for text in setting_arguments(settings) for part in ("--set", text)]


def stop_cluster_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Stop a cancelled run's jobs: the hook of a flow, for when its own process is no longer there to do it."""
    config = config_of((flow_run.parameters or {}).get("config"))
    if takes_jobs(config.ray):
        stop_jobs(config.ray, _prefix(str(flow_run.id)))


def _refuse_kept_places() -> None:
    if kept := kept_places():
        raise UsageError(
            f"{' and '.join(kept)} would be shown by the Ray cluster; set source.uri in the cluster's own environment "
            "(MEMMC_SOURCE__URI) and run the deployment, or run without --flow on the cluster"
        )


def _prefix(run: str) -> str:
    return f"memmc-{run}-"


def _flags(options: Mapping[str, Any]) -> list[str]:
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]
