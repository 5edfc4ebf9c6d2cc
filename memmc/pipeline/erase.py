"""Erase: a patient or a study leaves the lake, old versions and files included."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from memmc.config import Config
from memmc.dicom.deidentify import key_id, keyed_patient, keyed_uid
from memmc.errors import DataError, IdentityKeyError, IntegrityError, ModelError, StorageError, UsageError
from memmc.lake.erasure import Subject, count_rows, erase_rows, fence, find_subject, is_of_patients, purge
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.lake.vacuum import lease, running, stretched
from memmc.lake.views import list_views, refuse_view
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.models import ancestors_of, open_model, tracking_of
from memmc.pipeline.pins import Pins, absent
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result
from memmc.pipeline.select import ever_normal
from memmc.pipeline.settle import turn_name
from memmc.pipeline.vault import forget
from memmc.registry.models import ModelVersion, all_versions

Kind = Literal["patient", "study"]
RECORDS = "_erasures"
_COLUMN: dict[Kind, Literal["patient_key", "study_uid"]] = {"patient": "patient_key", "study": "study_uid"}
_PSEUDONYM = {"patient": re.compile(r"[0-9a-f]{64}"), "study": re.compile(r"2\.25\.[0-9]{1,39}")}
_MODEL = re.compile(r"memmc-(?P<cohort>.+)-v(?P<version>[0-9]+)|local-v[0-9a-f]+")  # as the name of a report ends


@dataclass(frozen=True)
class EraseResult(Result):
    """What left the lake, or would.

    Attributes:
        erased: False for a dry run.
        rows: by table.
        files: deleted, that held such rows and were not, or no longer, part of a table.
        waiting: files that a running writer may yet commit; erase again when it has ended.
        writers: runs that were writing meanwhile.
        reports: deleted pages that may show the images: of the cohorts concerned, of views over them, of models that
            learned from these or are listed in `models`; and pages whose names do not tell.
        models: registered models that learned from, or were calibrated on, the erased instances, and those of which
            that cannot be told because they cannot be read.
        record: the entry of the audit, which names no patient.
        vault: why entries of the identity vault stay; empty where they go, or there is no vault.
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
    vault: str = ""


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

    Entries of the identity vault go with an erasure from all cohorts; where they stay, `progress` is told why.
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
    vault_stays = _why_the_vault_stays(config, cohort)
    if vault_stays:
        progress.message(vault_stays)
    subject = find_subject(lake, _COLUMN[kind], pseudonym, cohort)
    tables = [table for table in SCHEMAS if is_of_patients(table) and lake.exists(table) and table != INSTANCES]
    tables.append(INSTANCES)  # last: as long as its rows stand, the rerun of a killed erasure finds all else by them
    rows = {table: count_rows(lake, table, subject) for table in tables}
    files = waiting = writers = 0
    models = _affected(config, lake, subject)
    cohorts = _cohorts(lake, subject)
    reports = _reports(lake, cohorts, {model["model"] for model in models})
    run = f"erase-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    if not dry_run:
        writers = running(lake.storage)
        for name in reports:
            lake.storage.delete(name)
        if not vault_stays:
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
        vault=vault_stays,
    )
    if not dry_run:
        entry = {**result.as_dict(), "kind": kind, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        lake.storage.write(result.record, json.dumps(entry, indent=1).encode())
    return result


def _why_the_vault_stays(config: Config, cohort: str | None) -> str:
    """Return why no entry of an identity vault is removed, or nothing where they are."""
    if config.deid.vault_uri is None:
        return "No deid.vault_uri is given: if this lake has an identity vault, its entries stay; erase again with it"
    if cohort is not None:
        return "Entries of the identity vault name no cohort and stay; only an erasure without --cohort removes them"
    return ""


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


def _reports(lake: Lake, cohorts: list[str], models: Collection[str]) -> list[str]:
    """Return the pages that may show the subject's images, its cohorts and the models that met it being known."""
    if not cohorts:
        return []
    views = [view.name for view in list_views(lake) if not set(cohorts).isdisjoint(view.bases)]
    pages = [name for name in lake.storage.list("reports") if name.endswith(".html")]
    return [page for page in pages if _may_show(page, {*cohorts, *views}, models)]


def _may_show(page: str, cohorts: Collection[str], models: Collection[str]) -> bool:
    """Return whether a page may show images of these cohorts, or the training normals of these models.

    A report is named by cohort and model, and a registered model by the cohort it was trained on. Names of cohorts may
    hold what stands between them: a name that can be read in two ways is read in both. What cannot be read may show
    anything, and so may a report of a model folder, which does not say where it was trained; pages of monitoring show
    no images.
    """
    name = page.removeprefix("reports/").removesuffix(".html")
    cuts = [place for place, letter in enumerate(name) if letter == "-"]
    found = [(name[:cut], model) for cut in cuts if (model := _MODEL.fullmatch(name, cut + 1))]
    if not found:
        return not name.startswith("monitor-")
    return any(
        cohort in cohorts
        or model["cohort"] is None
        or model["cohort"] in cohorts
        or f"memmc-{model['cohort']}/{model['version']}" in models
        for cohort, model in found
    )


def _cohorts(lake: Lake, subject: Subject) -> list[str]:
    where: dict[str, Any] = {subject.column: subject.value, **({"cohort": subject.cohort} if subject.cohort else {})}
    return sorted(set(lake.read(INSTANCES, ["cohort"], filter=where)["cohort"].to_pylist()))


def _affected(config: Config, lake: Lake, subject: Subject) -> list[dict[str, str]]:
    """Return the registered models that learned from the subject's images, or were calibrated on them.

    A version that cannot be read is listed too, and what it learned from is called unknown.
    """
    found: list[dict[str, str]] = []
    home = home_directory()
    rows = (
        lake.read(CALIBRATIONS, ["model_digest", "cohort", "dataset_version"]).to_pylist()
        if lake.exists(CALIBRATIONS)
        else []
    )
    for version in all_versions(tracking_of(config, home)):
        learned = _learned(config, home, version)
        if learned is None:
            found.append({"model": version.ref, "use": "unknown: it cannot be read"})
        # A calibration may be younger than the labels that its model was trained with, and names none.
        calibrated = [
            (row["cohort"], row["dataset_version"], Pins()) for row in rows if row["model_digest"] == version.digest
        ]
        for use, split, sets in (("training", "train", learned or []), ("calibration", "calibrate", calibrated)):
            if any(_met(lake, subject, name, number, split, pins) for name, number, pins in sets):
                found.append({"model": version.ref, "use": use})
    return found


def _learned(config: Config, home: Path, version: ModelVersion) -> list[tuple[str, int, Pins]] | None:
    """Return cohort, version and pins of what a model and those it began from learned; None where it cannot be read.

    Its tags say so; only a version without them is fetched and opened.
    """
    cohort, number = version.tags.get("cohort"), version.tags.get("dataset_version", "")
    try:
        before = [(name, of, Pins()) for name, of in ancestors_of(version.tags).items()]
        pins = Pins.of_tags(version.tags)
        if cohort and number.isdecimal():
            return [(cohort, int(number), pins), *before]
        model = open_model(config, home, version.ref)
        return [(model.cohort, model.dataset_version, pins), *before]
    except (ModelError, IntegrityError, StorageError):
        return None
    except (AttributeError, KeyError, TypeError, ValueError):  # tags or a description that do not say
        return None


def _met(lake: Lake, subject: Subject, cohort: str, version: int, split: str, pins: Pins) -> bool:
    """Say whether images of the subject were normals of a split: by the labels that are pinned, else by any."""
    columns = ["cohort", "patient_key", "study_uid", "sop_instance_uid"]
    where = {"cohort": cohort, "outcome": "stored", "split": split, "label": "normal"}
    try:
        if pins.labels is None:
            rows = ever_normal(lake, cohort, version, [split], columns)
        elif absent(pins.labels):
            rows = lake.read(INSTANCES, columns, version, where)
        else:
            rows = lake.instances_with_labels(columns, version, where, pins.labels)
    except IntegrityError:
        raise
    except DataError:  # a model of another lake, whose versions are not ours
        return False
    return bool(pc.call_function("any", [subject.mask(rows)]).as_py())
