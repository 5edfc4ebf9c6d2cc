"""The status flow: one page a day over all that is deployed, for whoever looks in the morning."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow, get_client, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, DeploymentFilterTags
from prefect.client.schemas.sorting import FlowRunSort

from flows.calls import Overrides
from flows.cockpit import shown
from flows.naming import TAG
from memmc.config import Config

_PAGE = 200
_BAD = {"FAILED", "CRASHED"}


def _run_name() -> str:
    return f"status-{datetime.now(UTC):%Y%m%d-%H%M}"


@flow(name="status", flow_run_name=_run_name, persist_result=False, result_serializer="json")
def status_flow(config: Overrides | None = None, hours: float = 24.0) -> dict[str, Any]:
    """Say what ran, what failed, what comes next and what the lake holds.

    Args:
        config: settings that differ from the defaults, by section; never key material.
        hours: how far back runs are counted.
    """
    deployments = read_deployments(hours)
    lake = shown("the lake's state", config, _lake)
    create_markdown_artifact(as_page(deployments, lake, hours), key="status", description="All deployments")
    return {"deployments": deployments, "lake": lake}


@task(name="read-deployments", cache_policy=NO_CACHE, persist_result=False, retries=2, retry_delay_seconds=[2, 10])
def read_deployments(hours: float) -> list[dict[str, Any]]:
    """Return for each deployment its last run, its runs of the last hours by state, and the next one."""
    since = datetime.now(UTC) - timedelta(hours=hours)
    with get_client(sync_client=True) as client:
        found = client.read_deployments(
            deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])), limit=_PAGE
        )
        names = {each.flow_id: client.read_flow(each.flow_id).name for each in found}
        rows = [_row(client, each, f"{names[each.flow_id]}/{each.name}", since) for each in found]
    return sorted(rows, key=lambda row: row["deployment"])


def _row(client: Any, deployment: Any, name: str, since: datetime) -> dict[str, Any]:
    only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    newest = FlowRunSort.EXPECTED_START_TIME_DESC
    runs = client.read_flow_runs(deployment_filter=only, sort=newest, limit=_PAGE)
    begun = [run for run in runs if run.start_time is not None]
    coming = [run.expected_start_time for run in runs if run.state is not None and run.state.is_scheduled()]
    last = begun[0] if begun else None
    recent = Counter(str(run.state_type.value) for run in begun if run.start_time >= since and run.state_type)
    return {
        "deployment": name,
        "paused": deployment.paused,
        "last": None if last is None else last.name,
        "state": None if last is None or last.state_type is None else last.state_type.value,
        "ended": None if last is None or last.end_time is None else _minute(last.end_time),
        "recent": dict(recent),
        "next": _minute(min(coming)) if coming else None,
    }


def _lake(config: Config) -> dict[str, Any]:
    from memmc.pipeline.cockpit import lake_status

    return lake_status(config)


def as_page(deployments: list[dict[str, Any]], lake: dict[str, Any] | None, hours: float) -> str:
    """Return the page as Markdown: what is wrong first."""
    bad = [row for row in deployments if row["state"] in _BAD]
    verdict = "All well." if not bad else "**Look at** " + ", ".join(f"`{row['deployment']}`" for row in bad) + "."
    lines = [f"# {verdict}", "", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, runs of the last {hours:g} h.", ""]
    lines += ["| deployment | last run | state | ended, UTC | runs | next, UTC |", "|---|---|---|---|---|---|"]
    for row in deployments:
        runs = ", ".join(f"{count} {state.lower()}" for state, count in sorted(row["recent"].items())) or "none"
        state = (row["state"] or "never ran").lower()
        cells = [row["last"] or "-", f"**{state}**" if row["state"] in _BAD else state, row["ended"] or "-", runs]
        following = "paused" if row["paused"] else row["next"] or "by hand"
        lines.append(f"| {row['deployment']} | " + " | ".join([*cells, following]) + " |")
    return "\n".join([*lines, "", *_lake_lines(lake)])


def _lake_lines(lake: dict[str, Any] | None) -> list[str]:
    if lake is None:
        return ["The lake could not be read; see this run's log."]
    lines = ["| cohort | stored | duplicate | excluded | quarantined |", "|---|---|---|---|---|"]
    outcomes = ("stored", "duplicate", "excluded", "quarantined")
    lines += [
        f"| {cohort} | " + " | ".join(str(counts.get(outcome, 0)) for outcome in outcomes) + " |"
        for cohort, counts in lake["cohorts"].items()
    ]
    champions = ", ".join(lake["champions"]) or "none"
    scores = f"{lake['scores']} scores, {lake['abnormal']} abnormal; {lake['models']} models, champion: {champions}."
    return [*lines, "", f"Dataset version {lake['dataset_version']}; {scores}"]


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"
