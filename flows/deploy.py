"""Make a Prefect server equal to the deployment file: what is missing is made, what differs changed, what left removed.

Only what carries the tag `memmc` is changed or removed; work pools are never removed, since runs may wait in them.
Everything is checked before the first change, and a second call changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.automations import Resolved, check_automation, resolve_automation
from flows.deployment_file import OWNED, read_automations, read_deployments
from flows.desired import Pool, Wanted, desired_deployments, desired_pools
from flows.facts import active_schedules, differences, facts_found, facts_of_automation, facts_wanted
from memmc.errors import ConfigError, StorageError, UsageError
from memmc.pipeline.prefect_server import look_at_server
from memmc.pipeline.results import Result

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import Automation

AUTOMATIONS = "automations.yaml"
_PAGE = 200


@dataclass(frozen=True)
class Change:
    """One thing that was, or would be, made, changed or removed.

    Attributes:
        action: create, update or delete.
        what: work pool, deployment or automation.
        name: of it.
        fields: what was and what shall be, by the path of each value that differs.
    """

    action: str
    what: str
    name: str
    fields: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])


@dataclass(frozen=True)
class DeployResult(Result):
    """The difference between file and server.

    Attributes:
        applied: False after a dry run.
        waiting: automation to the notification blocks that have not been made on the server.
    """

    applied: bool
    changes: list[Change]
    unchanged: int
    waiting: dict[str, list[str]]


def deploy(file: Path, *, pool: str | None = None, dry_run: bool = False, work_dir: Path | None = None) -> DeployResult:
    """Compare the file, and `automations.yaml` beside it, with the server that PREFECT_API_URL names; make them equal.

    Args:
        file: as infra/prefect.yaml.
        pool: put all deployments into this pool.
        work_dir: of a process pool for which the file names none; the current folder when absent.

    Raises:
        ConfigError: something in the files is not known, or out of range; nothing was changed.
        UsageError: no server is named, it has more workers than its database bears, or a parameter would show what it
            must not.
        StorageError: the server cannot be reached, or refused a change.
    """
    if not os.environ.get("PREFECT_API_URL"):
        raise UsageError("PREFECT_API_URL names no server; schedules need one that stays (`make stack` starts one)")
    content, automations = read_deployments(file), read_automations(file.parent / AUTOMATIONS).automations
    pools = desired_pools(content, work_dir or Path.cwd())
    deployments = desired_deployments(content, pools, pool)
    for automation in automations:
        check_automation(automation)
        _check_deployments(automation, deployments)
    if fix := look_at_server(os.environ["PREFECT_API_URL"], os.environ).fix():
        raise UsageError(fix)
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    try:
        with get_client(sync_client=True) as client:
            return _Server(client, dry_run).become(pools, deployments, automations)
    except (HTTPError, PrefectException, RuntimeError) as error:
        raise StorageError(
            f"the Prefect server failed ({type(error).__name__}); check PREFECT_API_URL and PREFECT_API_AUTH_STRING; "
            "what was done already is not done again by the next call"
        ) from error


def _check_deployments(automation: Mapping[str, Any], deployments: Mapping[str, Wanted]) -> None:
    for action in automation["actions"]:
        if action.get("deployment", next(iter(deployments))) not in deployments:
            raise ConfigError(f"automation '{automation['name']}' runs {action['deployment']}, which is no deployment")


class _Server:
    """One comparison with one server."""

    def __init__(self, client: SyncPrefectClient, dry_run: bool) -> None:
        self._client, self._dry_run = client, dry_run
        self._changes: list[Change] = []
        self._unchanged = 0

    def become(
        self, pools: Mapping[str, Pool], wanted: Mapping[str, Wanted], automations: list[dict[str, Any]]
    ) -> DeployResult:
        used = sorted({each.spec.work_pool.name for each in wanted.values()})
        found = {name: self._find_pool(name, pools.get(name)) for name in used}
        for name in used:
            if name in pools:
                self._pool(pools[name], found[name])
        there = self._owned_deployments()
        for name, each in wanted.items():
            self._deployment(each, there.get(name))
        waiting = self._automations(automations, {name: found.id for name, found in there.items()})
        for name in sorted(there.keys() - wanted.keys()):
            self._change(Change("delete", "deployment", name), partial(self._client.delete_deployment, there[name].id))
        return DeployResult(not self._dry_run, self._changes, self._unchanged, waiting)

    def _change(self, change: Change, do: Callable[[], object]) -> None:
        self._changes.append(change)
        if not self._dry_run:
            do()

    def _compare(self, what: str, name: str, now: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> Change | None:
        """Return what to do about one thing, None when it is as it should be."""
        if now is None:
            return Change("create", what, name)
        fields = differences({key: now.get(key) for key in wanted}, wanted)
        if not fields:
            self._unchanged += 1
            return None
        return Change("update", what, name, fields)

    def _find_pool(self, name: str, wanted: Pool | None) -> WorkPool | None:
        """Return a pool of the server; refuse what cannot become the file's."""
        from prefect.exceptions import ObjectNotFound

        try:
            found = self._client.read_work_pool(name)
        except ObjectNotFound:
            if wanted is None:
                raise ConfigError(f"work pool {name} is neither in the file nor on the server") from None
            return None
        if wanted is not None and found.type != wanted.type:
            raise ConfigError(f"work pool {name} is of type {found.type} on the server, {wanted.type} in the file")
        return found

    def _pool(self, wanted: Pool, found: WorkPool | None) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

        name = wanted.name
        facts: dict[str, Any] = {"description": wanted.description, "concurrency_limit": wanted.concurrency_limit}
        facts["base_job_template"] = wanted.base_job_template
        now = None if found is None else {key: getattr(found, key) for key in facts}
        change = self._compare("work pool", name, now, facts)
        if change is None:
            return
        if found is None:
            made = WorkPoolCreate(name=name, type=wanted.type, **facts)
            self._change(change, lambda: self._client.create_work_pool(made))
        else:
            changed = WorkPoolUpdate(**facts)
            self._change(change, lambda: self._client.update_work_pool(name, changed))

    def _owned_deployments(self) -> dict[str, DeploymentResponse]:
        from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

        owned = DeploymentFilter(tags=DeploymentFilterTags(all_=[OWNED]))
        found: list[DeploymentResponse] = []
        while page := self._client.read_deployments(deployment_filter=owned, limit=_PAGE, offset=len(found)):
            found += page
        flows = {each.flow_id: self._client.read_flow(each.flow_id).name for each in found}
        return {f"{flows[each.flow_id]}/{each.name}": each for each in found}

    def _deployment(self, wanted: Wanted, found: DeploymentResponse | None) -> None:
        change = self._compare(
            "deployment", wanted.name, None if found is None else facts_found(found), facts_wanted(wanted, found)
        )
        if change is not None:
            self._change(change, lambda: self._write(wanted, found))

    def _write(self, wanted: Wanted, found: DeploymentResponse | None) -> None:
        from prefect.client.schemas.objects import ConcurrencyOptions

        spec = wanted.spec
        limit = spec.concurrency_limit
        options = None if limit is None else ConcurrencyOptions.model_validate(limit.model_dump(exclude={"limit"}))
        self._client.create_deployment(
            flow_id=self._client.create_flow_from_name(wanted.flow),
            name=spec.name,
            version=wanted.version,
            schedules=wanted.schedules(active_schedules(found)),
            concurrency_limit=None if limit is None else limit.limit,
            concurrency_options=options,
            parameters=spec.parameters,
            description=spec.description,
            work_pool_name=spec.work_pool.name,
            tags=spec.tags,
            entrypoint=spec.entrypoint,
            parameter_openapi_schema=wanted.parameter_schema,
            paused=spec.paused,
            pull_steps=[],
            enforce_parameter_schema=True,
            job_variables=spec.work_pool.job_variables,
        )

    def _automations(self, written: list[dict[str, Any]], deployments: Mapping[str, UUID]) -> dict[str, list[str]]:
        there = self._owned_automations()
        waiting: dict[str, list[str]] = {}
        for each in written:
            resolved = resolve_automation(each, self._block_id, lambda name: self._deployment_id(name, deployments))
            if resolved.waits_for:
                waiting[each["name"]] = resolved.waits_for
            self._automation(each["name"], resolved, there.get(each["name"]))
        for name in sorted(there.keys() - {each["name"] for each in written}):
            self._change(Change("delete", "automation", name), partial(self._client.delete_automation, there[name].id))
        return waiting

    def _automation(self, name: str, resolved: Resolved, found: Automation | None) -> None:
        wanted = resolved.wanted
        if wanted is None:
            return
        facts = facts_of_automation(wanted.model_dump(mode="json"))
        change = self._compare(
            "automation", name, None if found is None else facts_of_automation(found.model_dump(mode="json")), facts
        )
        if change is None:
            return
        if found is None:
            self._change(change, lambda: self._client.create_automation(wanted))
        else:
            identity = found.id
            self._change(change, lambda: self._client.update_automation(identity, wanted))

    def _owned_automations(self) -> dict[str, Automation]:
        found: list[Automation] = []
        while page := self._client.read_automations(limit=_PAGE, offset=len(found)):
            found += page
        return {each.name: each for each in found if OWNED in each.tags}

    def _block_id(self, name: str) -> UUID | None:
        from prefect.exceptions import ObjectNotFound

        kind, _, block = name.partition("/")
        try:
            return self._client.read_block_document_by_name(block, kind, include_secrets=False).id
        except ObjectNotFound:
            return None

    def _deployment_id(self, name: str, there: Mapping[str, UUID]) -> UUID:
        """Return a deployment's id; of one that a dry run did not make, none."""
        if name in there:
            return there[name]
        return UUID(int=0) if self._dry_run else self._client.read_deployment_by_name(name).id
