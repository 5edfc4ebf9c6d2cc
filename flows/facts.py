"""What is compared of a deployment or an automation, on the server and in the file, in one form for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flows.desired import Wanted

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse


def differences(now: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> dict[str, list[Any]]:
    """Return what was and what shall be, by the dotted path of each value that differs.

    >>> differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 3})
    {'a.c': [2, 4]}
    """
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys([*wanted, *now]):
        one, other = now.get(key), wanted.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= differences(one, other, f"{path}{key}.")
        elif one != other:
            found[f"{path}{key}"] = [one, other]
    return found


def facts_found(found: DeploymentResponse) -> dict[str, Any]:
    """Return what is compared of a deployment on the server."""
    limit = found.global_concurrency_limit
    options = found.concurrency_options
    return {
        "version": found.version,
        "description": found.description,
        "entrypoint": found.entrypoint,
        "tags": sorted(found.tags),
        "parameters": found.parameters,
        "parameter_schema": found.parameter_openapi_schema,
        "work_pool": found.work_pool_name,
        "job_variables": found.job_variables,
        "pull_steps": found.pull_steps or [],
        "enforced": found.enforce_parameter_schema,
        "paused": found.paused,
        "concurrency": None if limit is None else {"limit": limit.limit} | _set(options),
        "schedules": {
            str(each.slug): each.schedule.model_dump(mode="json", exclude_none=True)
            | {"parameters": each.parameters, "active": each.active}
            for each in found.schedules
        },
    }


def facts_wanted(wanted: Wanted, found: DeploymentResponse | None) -> dict[str, Any]:
    """Return what is compared of a deployment of the file."""
    spec, limit = wanted.spec, wanted.spec.concurrency_limit
    return {
        "version": wanted.version,
        "description": spec.description,
        "entrypoint": spec.entrypoint,
        "tags": sorted(spec.tags),
        "parameters": spec.parameters,
        "parameter_schema": wanted.parameter_schema,
        "work_pool": spec.work_pool.name,
        "job_variables": spec.work_pool.job_variables,
        "pull_steps": [],
        "enforced": True,
        "paused": spec.paused if spec.paused is not None else found is not None and found.paused,
        "concurrency": None if limit is None else limit.model_dump(mode="json", exclude_none=True),
        "schedules": {
            str(each.slug): each.schedule.model_dump(mode="json", exclude_none=True)
            | {"parameters": each.parameters, "active": each.active}
            for each in wanted.schedules(active_schedules(found))
        },
    }


def active_schedules(found: DeploymentResponse | None) -> dict[str, bool]:
    """Return which schedules of a deployment on the server are active."""
    return {} if found is None else {str(each.slug): each.active for each in found.schedules}


def _set(options: Any) -> dict[str, Any]:
    return {} if options is None else options.model_dump(mode="json", exclude_none=True)


def facts_of_automation(automation: dict[str, Any]) -> dict[str, Any]:
    """Return an automation without what the server adds to it."""
    kept = {key: value for key, value in automation.items() if key in {"name", "description", "enabled", "tags"}}
    trigger = {key: value for key, value in automation["trigger"].items() if key != "id"}
    for key in ("after", "expect", "for_each"):
        if isinstance(trigger.get(key), list):
            trigger[key] = sorted(trigger[key])
    return kept | {"trigger": trigger, **{key: automation[key] for key in automation if key.startswith("actions")}}
