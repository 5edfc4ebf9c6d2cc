"""What the deployment file asks of a server: checked against the flows and the pools before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.calls import PLACES, refuse_credentials, setting_arguments
from flows.deployment_file import Deployment, DeploymentFile, Schedule, WorkPool
from memmc import __version__
from memmc.config import load_config
from memmc.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.actions import DeploymentScheduleCreate

# Prefect shows parameters; a place may be called after a patient.
_PARAMETERS = {"source", "labels_file"}
_WORKERS = "server/api/collections_data/views/aggregate-worker-metadata.json"


@dataclass(frozen=True)
class Pool:
    """A work pool as it should be."""

    name: str
    type: str
    description: str
    concurrency_limit: int | None
    base_job_template: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """A deployment as it should be.

    Attributes:
        flow: name of the flow.
        parameter_schema: by which the server checks parameters.
    """

    flow: str
    spec: Deployment
    version: str
    parameter_schema: dict[str, Any]

    @property
    def name(self) -> str:
        """`FLOW/DEPLOYMENT`, as Prefect names it."""
        return f"{self.flow}/{self.spec.name}"

    def schedules(self, active: Mapping[str, bool]) -> list[DeploymentScheduleCreate]:
        """Return the schedules for Prefect's client; where the file is silent, `active` says which are."""
        return [
            _schedule(each, active.get(each.slug, True) if each.active is None else each.active)
            for each in self.spec.schedules
        ]


def desired_pools(file: DeploymentFile, work_dir: Path) -> dict[str, Pool]:
    """Return the file's pools by name.

    Args:
        work_dir: where flows of a process pool run when the file names no `working_dir`; Prefect's own default is a
            temporary folder, with which a relative lake and a throw-away key would be lost.

    Raises:
        ConfigError: a variable that the pool's type does not have, or of another type.
    """
    return {pool.name: _pool(pool, work_dir) for pool in file.work_pools}


def desired_deployments(file: DeploymentFile, pools: Mapping[str, Pool], pool: str | None) -> dict[str, Wanted]:
    """Return the file's deployments by `FLOW/DEPLOYMENT`.

    Args:
        pool: put them all into this pool instead of the one each names.

    Raises:
        ConfigError: no such flow, a parameter it does not have, a cron expression or timezone that is none.
        UsageError: a parameter that shows credentials or a place.
    """
    wanted: dict[str, Wanted] = {}
    for each in file.deployments:
        spec = each.model_copy(update={"work_pool": each.work_pool.model_copy(update={"name": pool})}) if pool else each
        flow = _flow(spec)
        schema = _parameter_schema(flow)
        found = Wanted(str(flow.name), spec, __version__, schema)
        _check_parameters(found)
        found.schedules({})
        if spec.work_pool.name in pools:
            _check_variables(found.name, spec.work_pool.job_variables, pools[spec.work_pool.name].base_job_template)
        if found.name in wanted:
            raise ConfigError(f"deployment {found.name} stands there twice")
        wanted[found.name] = found
    return wanted


def _flow(spec: Deployment) -> Flow[..., Any]:
    from prefect.exceptions import MissingFlowError, ScriptError
    from prefect.flows import load_flow_from_entrypoint

    try:
        return load_flow_from_entrypoint(spec.entrypoint, use_placeholder_flow=False)
    except (MissingFlowError, ScriptError, ImportError, AttributeError):
        raise ConfigError(f"deployment {spec.name}: there is no flow {spec.entrypoint}; see flows/") from None


def _parameter_schema(flow: Flow[..., Any]) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(flow).model_dump_for_openapi()


def _check_parameters(wanted: Wanted) -> None:
    for schedule in [None, *wanted.spec.schedules]:
        where = wanted.name if schedule is None else f"{wanted.name}, schedule {schedule.slug}"
        given = wanted.spec.parameters | ({} if schedule is None else schedule.parameters)
        refuse_credentials(given)
        _refuse_shown(where, _PARAMETERS & given.keys())
        unknown = sorted(given.keys() - wanted.parameter_schema["properties"].keys())
        if unknown:
            known = ", ".join(wanted.parameter_schema["properties"])
            raise ConfigError(f"{where}: the flow has no parameter '{unknown[0]}'; it has {known}")
        problem = _problem(given, wanted.parameter_schema, partly=schedule is None)
        if problem:
            raise ConfigError(f"{where}: {problem}")
        settings = given.get("config") or {}
        _refuse_shown(
            where, [f"{name}.{key}" for name in PLACES for key in PLACES[name] & settings.get(name, {}).keys()]
        )
        load_config(overrides=setting_arguments(settings))


def _refuse_shown(where: str, places: Collection[str]) -> None:
    if places:
        raise UsageError(
            f"{where}: parameter '{min(places)}' would be shown to whoever opens the server, and a place may be "
            "called after a patient; set it in the worker's configuration (MEMMC_CONFIG, MEMMC_SOURCE__URI)"
        )


def _problem(parameters: dict[str, Any], schema: dict[str, Any], *, partly: bool) -> str | None:
    from prefect.utilities.schema_tools.validation import validate

    errors = validate(parameters, schema, ignore_required=partly)
    if not errors:
        return None
    name = ".".join(str(part) for part in errors[0].absolute_path)
    return f"parameter {name}: {errors[0].message}" if name else f"parameters: {errors[0].message}"


def _schedule(each: Schedule, active: bool) -> DeploymentScheduleCreate:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        cron = CronSchedule(cron=each.cron, timezone=each.timezone)
        return DeploymentScheduleCreate(schedule=cron, active=active, parameters=each.parameters, slug=each.slug)
    except ValidationError as error:
        raise ConfigError(f"schedule {each.slug}: {error.errors()[0]['msg']}") from None


def _pool(pool: WorkPool, work_dir: Path) -> Pool:
    template = _base_job_template(pool.type)
    variables = dict(pool.variables)
    if pool.type == "process":
        variables.setdefault("working_dir", str(work_dir))
    _check_variables(f"work pool {pool.name}", variables, template)
    for name, value in variables.items():
        template["variables"]["properties"][name]["default"] = value
    if pool.job_manifest is not None:
        template["job_configuration"]["job_manifest"] = pool.job_manifest
    return Pool(pool.name, pool.type, pool.description, pool.concurrency_limit, template)


def _base_job_template(kind: str) -> dict[str, Any]:
    """Return Prefect's own template of a pool type, as it lies in its package."""
    views = json.loads(files("prefect").joinpath(_WORKERS).read_text())
    for collection in views.values():
        if kind in collection:
            return collection[kind]["default_base_job_configuration"]
    raise ConfigError(f"this Prefect knows no work pool of type {kind}")


def _check_variables(where: str, variables: Mapping[str, Any], template: Mapping[str, Any]) -> None:
    """Check job variables against a pool's schema, as its worker will."""
    import jsonschema

    schema = template["variables"]
    unknown = sorted(variables.keys() - schema["properties"].keys())
    if unknown:
        known = ", ".join(schema["properties"])
        raise ConfigError(f"{where}: there is no job variable '{unknown[0]}'; there are {known}")
    optional = {key: value for key, value in schema.items() if key != "required"}
    problem = next(iter(jsonschema.Draft202012Validator(optional).iter_errors(variables)), None)
    if problem is not None:
        raise ConfigError(f"{where}: job variable {'.'.join(map(str, problem.absolute_path))}: {problem.message}")
    refuse_credentials(variables)
