"""The ingest flow: one step, its account as a table."""

# Annotations are evaluated here: Prefect could not resolve them as text when it loads the flow by its path.
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows.calls import Overrides, call_flow, given_place, run_step
from flows.cockpit import name_run
from flows.naming import Cohort, artifact_key, run_name
from flows.ray_job import on_cluster, stop_cluster_jobs
from flows.tasks import ON_STORAGE
from memmc.config import Config
from memmc.errors import UsageError
from memmc.pipeline.progress import Progress
from memmc.pipeline.results import IngestResult

_OUTCOMES = ("stored", "duplicate", "excluded", "quarantined")


def run(
    config: Config,
    source: str,
    cohort: str,
    label: str | None = None,
    labels_file: str | None = None,
    *,
    home: Path,
    progress: Progress,
) -> IngestResult:
    """Run the flow in this process; as `memmc.pipeline.ingest.ingest`, with Prefect watching."""
    parameters = {"source": source, "cohort": cohort, "label": label, "labels_file": labels_file}
    account = call_flow(
        lambda: ingest_flow,
        parameters,
        config=config,
        home=home,
        progress=progress,
        places=("source", "labels_file"),
    )
    return IngestResult(**account)


@flow(
    name="ingest",
    flow_run_name=run_name("ingest"),
    persist_result=False,
    result_serializer="json",
    on_cancellation=[stop_cluster_jobs],
)
def ingest_flow(
    cohort: Cohort,
    source: str | None = None,
    config: Overrides | None = None,
    label: str | None = None,
    labels_file: str | None = None,
) -> dict[str, Any]:
    """Bring DICOM objects into the lake: each becomes one row, with pixels or with a reason.

    Args:
        cohort: name the rows are filed under.
        source: folder, ZIP file, s3:// prefix, orthanc+https:// or dicomweb+https:// server. Prefect shows it, so a
            deployment leaves it out: `source.uri` of the worker's configuration is listed then.
        config: settings that differ from the defaults, by section; never key material.
        label: normal, abnormal or unknown, for every object.
        labels_file: CSV of labels by path or SOPInstanceUID.
    """
    account = ingest_objects(source, cohort, config, label, labels_file)
    publish_account(cohort, account)
    name_run("ingest", cohort, account["version"], config)
    return account


@task(name="ingest-objects", **ON_STORAGE)
def ingest_objects(
    source: str | None, cohort: str, config: Overrides | None, label: str | None, labels_file: str | None
) -> dict[str, Any]:
    """List, convert and commit; safe to try again, since nothing is committed before the end."""

    def step(resolved: Config, progress: Progress) -> IngestResult:
        from memmc.pipeline.ingest import ingest

        labels = None if labels_file is None else given_place("labels_file", labels_file)
        place = given_place("source", source) if source else resolved.source.uri
        if source is None and label is None:
            labels = labels or resolved.source.labels_file
        if place is None:
            raise UsageError("nothing says what to ingest; set source.uri in the worker's configuration")
        return ingest(resolved, place, cohort, label=label, labels_file=labels, progress=progress)

    job = on_cluster(step, "ingest", IngestResult, source, cohort=cohort, label=label, labels=labels_file)
    return run_step(f"ingest-{cohort}", config, job)


def publish_account(cohort: str, account: dict[str, Any]) -> None:
    """Show how many objects ended where, and why."""
    rows = [{"": "seen", "objects": account["seen"]}]
    rows += [{"": outcome, "objects": account[outcome]} for outcome in _OUTCOMES]
    rows += [{"": f"reason {reason}", "objects": count} for reason, count in sorted(account["reasons"].items())]
    said = f"{cohort}: seen = stored + duplicate + excluded + quarantined. Dataset version {account['version']}"
    create_table_artifact(rows, key=artifact_key("ingest", cohort), description=said)
