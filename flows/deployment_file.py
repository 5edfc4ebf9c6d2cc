"""The deployment file: `prefect.yaml` as Prefect reads it, and read strictly.

Prefect passes over keys it does not know, so a misspelt `concurency_limit` would deploy a flow without one. Here every
key is known, every name is unique, and every deployment has an owner. One section is ours, and Prefect passes over it:
`work_pools`, the pools the deployments run in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memmc.errors import ConfigError

OWNED = "memmc"  # tag of everything that `memmc deploy` makes, and the only things it removes
_OWNER = "owner:"
_Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*$")]


class Strict(BaseModel):
    """A part of the file that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(Strict):
    """When runs begin.

    Attributes:
        cron: five fields.
        timezone: of IANA; a schedule without one would move with the server's clock.
        slug: names the schedule within its deployment.
        active: absent, a pause made in the cockpit stays.
        parameters: go over those of the deployment.
    """

    cron: str
    timezone: str
    slug: _Slug
    active: bool | None = None
    parameters: dict[str, Any] = {}


class Concurrency(Strict):
    """How many runs of a deployment may be under way, and whether another waits or is cancelled."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"]
    grace_period_seconds: int | None = Field(default=None, ge=60, le=86400)


class PoolUse(Strict):
    """The pool a deployment runs in, and what it wants of it."""

    name: _Slug
    job_variables: dict[str, Any] = {}


class Deployment(Strict):
    """One deployment; the words are Prefect's.

    Attributes:
        entrypoint: module path of the flow, which is installed where the worker runs.
        tags: `memmc`, and `owner:NAME`, whom to ask.
        paused: absent, a pause made in the cockpit stays.
    """

    name: _Slug
    entrypoint: str = Field(pattern=r"^flows(\.\w+)+$")
    description: str
    tags: list[str]
    parameters: dict[str, Any] = {}
    schedules: list[Schedule] = []
    concurrency_limit: Concurrency | None = None
    work_pool: PoolUse
    paused: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Deployment:
        if OWNED not in self.tags or not any(tag.startswith(_OWNER) and tag != _OWNER for tag in self.tags):
            raise ValueError(f"tags must hold '{OWNED}' and '{_OWNER}NAME'")
        _refuse_twice("schedule", [schedule.slug for schedule in self.schedules])
        return self


class WorkPool(Strict):
    """A pool as the file wants it.

    Attributes:
        variables: defaults of the pool's job variables.
        job_manifest: of a Kubernetes Job, in the place of Prefect's own; `{{ name }}` takes a job variable.
    """

    name: _Slug
    type: Literal["process", "kubernetes"]
    description: str
    concurrency_limit: int | None = Field(default=None, ge=1)
    variables: dict[str, Any] = {}
    job_manifest: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> WorkPool:
        if self.job_manifest is not None and self.type != "kubernetes":
            raise ValueError("job_manifest belongs to a pool of type kubernetes")
        return self


class DeploymentFile(Strict):
    """The whole file; `definitions` holds YAML anchors alone."""

    name: str
    pull: list[dict[str, Any]] = Field(default=[], max_length=0)
    definitions: dict[str, Any] = {}
    work_pools: list[WorkPool] = []
    deployments: list[Deployment]

    @model_validator(mode="after")
    def _check(self) -> DeploymentFile:
        _refuse_twice("work pool", [pool.name for pool in self.work_pools])
        _refuse_twice("deployment", [f"{each.entrypoint}/{each.name}" for each in self.deployments])
        return self


class AutomationFile(Strict):
    """The automations beside it, each as Prefect's API takes it but for names of blocks; see `flows.automations`."""

    automations: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _check(self) -> AutomationFile:
        _refuse_twice("automation", [str(each.get("name")) for each in self.automations])
        return self


Part = TypeVar("Part", bound=Strict)


def read_deployments(file: Path) -> DeploymentFile:
    """Read and check a deployment file.

    Raises:
        ConfigError: it cannot be read, is not YAML, says a key twice or one that is not known.
    """
    return _checked(DeploymentFile, _read(file), file.name)


def read_automations(file: Path) -> AutomationFile:
    """Read and check a file of automations; an absent one holds none.

    Raises:
        ConfigError: as `read_deployments`.
    """
    return _checked(AutomationFile, _read(file), file.name) if file.exists() else AutomationFile()


def _read(file: Path) -> Any:
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file.name} cannot be read ({type(error).__name__}); check --file") from None
    except YAMLError as error:  # a key said twice is one of these
        raise ConfigError(f"{file.name} is not YAML: {str(error).splitlines()[0]}") from None


def _checked(kind: type[Part], content: Any, name: str) -> Part:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{name}: {found}") from None


def _refuse_twice(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} '{twice[0]}' stands there twice")
