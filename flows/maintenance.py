"""The maintenance flow: check every byte of the lake, then free what nothing refers to."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from datetime import UTC, datetime
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.calls import Overrides, run_step
from flows.summary import as_markdown
from flows.tasks import ON_STORAGE
from memmc.config import Config
from memmc.errors import IntegrityError
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import Result


def _run_name() -> str:
    return f"maintenance-{datetime.now(UTC):%Y%m%d-%H%M}"


@flow(name="maintenance", flow_run_name=_run_name, persist_result=False, result_serializer="json")
def maintenance_flow(config: Overrides | None = None, vacuum: bool = True) -> dict[str, Any]:
    """Check the lake, then free what nothing refers to; a damaged lake is left as it is, and the run fails.

    Args:
        config: settings that differ from the defaults, by section; never key material.
        vacuum: delete files, or only check.
    """
    verdict = verify_tables(config)
    publish_verdict(verdict)
    if not verdict["whole"]:
        raise IntegrityError(
            f"{len(verdict['damages'])} files of the lake are damaged, see the table of this run; nothing was deleted. "
            "Restore them from a copy, then run this again"
        )
    if vacuum:
        freed = free_space(config)
        counted = {name: len(freed[name]) for name in ("shards", "unfinished")} | {"uploads": freed["uploads"]}
        expired = expire_checkpoints(config)
        counted |= {"checkpoints of runs": len(expired["runs"]), "their files": expired["files"]}
        create_markdown_artifact(as_markdown("Freed", counted), key="maintenance-freed")
    return verdict


@task(name="verify-tables", **ON_STORAGE)
def verify_tables(config: Overrides | None) -> dict[str, Any]:
    """Read every byte against its checksums and balance the account."""

    def step(resolved: Config, progress: Progress) -> Result:
        from memmc.pipeline.lake_care import verify_lake

        return verify_lake(resolved, progress)

    return run_step("verify-lake", config, step)


@task(name="free-space", **ON_STORAGE)
def free_space(config: Overrides | None) -> dict[str, Any]:
    """Delete what no version of the last `lake.vacuum_hours` refers to."""

    def step(resolved: Config, progress: Progress) -> Result:
        from memmc.pipeline.lake_care import vacuum_lake

        progress.stage("vacuum")
        return vacuum_lake(resolved, dry_run=False)

    return run_step("vacuum-lake", config, step)


@task(name="expire-checkpoints", **ON_STORAGE)
def expire_checkpoints(config: Overrides | None) -> dict[str, Any]:
    """Delete checkpoints of training runs silent for `lake.keep_checkpoints_days`."""

    def step(resolved: Config, progress: Progress) -> Result:
        from memmc.pipeline.retention import expire_checkpoints

        progress.stage("expire")
        return expire_checkpoints(resolved, dry_run=False)

    return run_step("expire-checkpoints", config, step)


def publish_verdict(verdict: dict[str, Any]) -> None:
    """Show each table's extent, and each damage."""
    rows: list[dict[str, Any]] = [{"table": name, **found} for name, found in verdict["tables"].items()]
    create_table_artifact(rows, key="maintenance-tables", description="Checked byte by byte")
    if verdict["damages"]:
        create_table_artifact(verdict["damages"], key="maintenance-damages", description="Damaged")
