"""Erase: a patient or a study leaves the lake, old versions and files included."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow.compute as pc

from memmc.config import Config
from memmc.dicom.deidentify import key_id, keyed_patient, keyed_uid
from memmc.errors import DataError, IdentityKeyError, ModelError, UsageError
from memmc.lake.erasure import Subject, count_rows, erase_rows, fence, find_subject, is_of_patients, purge
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.lake.vacuum import lease, running, stretched
from memmc.lake.views import refuse_view
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result
from memmc.pipeline.settle import turn_name
from memmc.pipeline.vault import forget
from memmc.registry.models import all_versions

Kind = Literal["patient", "study"]
RECORDS = "_erasures"
_COLUMN: dict[Kind, Literal["patient_key", "study_uid"]] = {"patient": "patient_key", "study": "study_uid"}
_PSEUDONYM = {"patient": re.compile(r"[0-9a-f]{64}"), "study": re.compile(r"2\.25\.[0-9]{1,39}")}


@dataclass(frozen=True)
class EraseResult(Result):
    """What left the lake, or would.

    Attributes:
        erased: False for a dry run.
        rows: by table.
        files: deleted, that held such rows and were not, or no longer, part of a table.
        waiting: files that a running writer may yet commit; erase again when it has ended.
        writers: runs that were writing meanwhile.
        reports: deleted pages of the cohorts concerned; they may show the images.
        models: registered models that learned from, or were calibrated on, the erased instances.
        record: the entry of the audit, which names no patient.
    """

    erased: bool
    rows: dict[str, int]
    files: int
    waiting: int
    writers: int
    cohorts: list[str]
    reports: list[str]
    models: list[dict[str, str]]
    record: str


def pseudonym_of(config: Config, kind: Kind, original: str, issuer: str = "") -> str:
    """Return the pseudonym of an original Patient ID (0010,0020) or Study Instance UID (0020,000D).

    Args:
        issuer: Issuer of Patient ID (0010,0021), for a patient whose objects name one.

    Raises:
        IdentityKeyError: the caller does not hold the lake's identity key.
        UsageError: an empty original.
    """
    key = held_key(config, home_directory())
    if key is None or Lake(config.lake.uri).key_id() not in (None, key_id(key)):
        raise IdentityKeyError("originals are found with the lake's identity key alone; give it as deid.key_file")
    if not original:
        raise UsageError(f"no {kind} was given on standard input")
    if kind == "study":
        return keyed_uid(key, original)
    return keyed_patient(key, original, issuer)


@recorded(
    "erase",
    lambda done: {
        "record": done.record,
        "cohorts": done.cohorts,
        "rows": done.rows,
        "files": done.files,
        "waiting": done.waiting,
        "reports": len(done.reports),
        "models": [model["model"] for model in done.models],
    },
)
def erase(
    config: Config,
    kind: Kind,
    pseudonym: str,
    cohort: str | None = None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> EraseResult:
    """Take a patient or a study out of every table, then out of every file.

    Runs that score meanwhile commit no row of it afterwards (`ScoreLedger.commit`); what other writers commit meanwhile
    is taken out by a second look. May be run again after it was killed anywhere.

    Raises:
        UsageError: not a pseudonym, or a view.
        DataError: nothing of it is in the lake.
        StorageError: the place or the model registry cannot be reached, or other writers won every round.
    """
    if not _PSEUDONYM[kind].fullmatch(pseudonym):
        raise UsageError(f"that is not a {kind}'s pseudonym; for an original give '-' and write it to standard input")
    progress = progress or Silent()
    lake = Lake(config.lake.uri)
    if cohort is not None:
        refuse_view(lake, cohort)
    subject = find_subject(lake, _COLUMN[kind], pseudonym, cohort)
    tables = [table for table in SCHEMAS if is_of_patients(table) and lake.exists(table) and table != INSTANCES]
    tables.append(INSTANCES)  # last: as long as its rows stand, the rerun of a killed erasure finds all else by them
    rows = {table: count_rows(lake, table, subject) for table in tables}
    files = waiting = writers = 0
    models = _affected(config, lake, subject)
    cohorts = _cohorts(lake, subject)
    reports = [name for name in lake.storage.list("reports") if name.startswith(_report_names(cohorts))]
    run = f"erase-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    if not dry_run:
        writers = running(lake.storage)
        for name in reports:
            lake.storage.delete(name)
        if config.deid.vault_uri is not None and cohort is None:
            rows["vault"] = forget(config, subject.column, subject.value)
        with lease(lake, run):
            gone, files, waiting = _erase_tables(config, lake, subject, tables, run, progress)
            rows |= gone
    if not (any(rows.values()) or files or waiting):
        raise DataError(f"nothing of this {kind} is in the lake{' and cohort' if cohort else ''}; check the pseudonym")
    result = EraseResult(
        erased=not dry_run,
        rows=rows,
        files=files,
        waiting=waiting,
        writers=writers,
        cohorts=cohorts,
        reports=reports,
        models=models,
        record="" if dry_run else f"{RECORDS}/{run}.json",
    )
    if not dry_run:
        entry = {**result.as_dict(), "kind": kind, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        lake.storage.write(result.record, json.dumps(entry, indent=1).encode())
    return result


def _erase_tables(
    config: Config, lake: Lake, subject: Subject, tables: list[str], run: str, progress: Progress
) -> tuple[dict[str, int], int, int]:
    """Go through the tables, instances last, and once more through the others for what running writers brought back.

    Returns:
        Rows by table; files that were deleted; files that wait.
    """
    rows, waiting, files = Counter[str](), dict[str, int](), 0
    again = [table for table in tables if table != INSTANCES]
    steps = [*((table, run) for table in [*again, INSTANCES]), *((table, f"{run}-again") for table in again)]
    progress.stage("erase", len(steps))
    for number, (table, step) in enumerate(steps, start=1):
        gone, removed = erase_rows(lake, table, subject, step, turn_name)
        deleted, waiting[table] = purge(
            lake, table, subject, removed, stretched(lake.storage, config.lake.vacuum_hours)
        )
        rows[table] += gone
        files += deleted
        scoring = SCORES in tables or running(lake.storage) > 1  # the lease of this run is one
        if table == INSTANCES and rows.total() and scoring:
            fence(lake, SCORES, run)
        progress.advance(number)
    return dict(rows), files, sum(waiting.values())


def _report_names(cohorts: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"reports/{cohort}-" for cohort in cohorts)


def _cohorts(lake: Lake, subject: Subject) -> list[str]:
    where: dict[str, Any] = {subject.column: subject.value, **({"cohort": subject.cohort} if subject.cohort else {})}
    return sorted(set(lake.read(INSTANCES, ["cohort"], filter=where)["cohort"].to_pylist()))


def _affected(config: Config, lake: Lake, subject: Subject) -> list[dict[str, str]]:
    """Return the registered models that learned from the subject's images, or were calibrated on them."""
    found: list[dict[str, str]] = []
    home = home_directory()
    rows = (
        lake.read(CALIBRATIONS, ["model_digest", "cohort", "dataset_version"]).to_pylist()
        if lake.exists(CALIBRATIONS)
        else []
    )
    for version in all_versions(tracking_of(config, home)):
        try:
            model = open_model(config, home, version.ref)
        except ModelError:
            found.append({"model": version.ref, "use": "unknown: it cannot be read"})
            continue
        uses = {"training": [(model.cohort, model.dataset_version)]}
        uses["calibration"] = [
            (row["cohort"], row["dataset_version"]) for row in rows if row["model_digest"] == model.digest
        ]
        for use, sets in uses.items():
            split = "train" if use == "training" else "calibrate"
            if any(_met(lake, subject, name, number, split) for name, number in sets):
                found.append({"model": model.ref, "use": use})
    return found


def _met(lake: Lake, subject: Subject, cohort: str, version: int, split: str) -> bool:
    columns = ["cohort", "patient_key", "study_uid", "sop_instance_uid"]
    where = {"cohort": cohort, "outcome": "stored", "split": split, "label": "normal"}
    try:
        rows = lake.instances_with_labels(columns, version, where)
    except DataError:  # a model of another lake, whose versions are not ours
        return False
    return bool(pc.call_function("any", [subject.mask(rows)]).as_py())
