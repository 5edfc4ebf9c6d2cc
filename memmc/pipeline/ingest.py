"""Ingest: list, convert in parallel, settle duplicates, balance the account, commit once."""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from memmc.config import Config
from memmc.dicom.convert import ConvertPolicy
from memmc.dicom.deidentify import key_id, object_key
from memmc.dicom.reasons import OVERLOADED
from memmc.errors import DataError, StorageError, UsageError
from memmc.lake.erasure import erased_contents
from memmc.lake.tables import Lake
from memmc.lake.vacuum import lease
from memmc.lake.views import refuse_view
from memmc.pipeline.audit import recorded
from memmc.pipeline.convert_all import convert_all
from memmc.pipeline.convert_chunk import IngestJob, WrittenShard, failed_version
from memmc.pipeline.cursor import cursor_entry, last_cursor
from memmc.pipeline.identity import home_directory, identity_key, key_for_preview
from memmc.pipeline.labels import read_labels
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import IngestResult, PlanResult
from memmc.pipeline.settle import (
    ALREADY_INGESTED,
    failed_objects,
    given_up,
    object_rows,
    publish,
    seen_objects,
)
from memmc.pipeline.vault import vault_of
from memmc.sources.objects import FILE_CHECKSUM, FILE_UNREADABLE, STORE_FAILURES, Cursor, SourceObject
from memmc.sources.open import FileSource, open_source

logger = logging.getLogger(__name__)

_COHORT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TRIED_FOR = timedelta(days=7)  # what ran out of time or memory: nobody waits for it twice an ingest for ever
_LEAST_FAILURES, _MOST_FAILING = 3, 0.25  # a source that fails on more than this itself has failed
_LEAST_JUDGED, _REMARKABLE = 200, 0.05  # of fewer new objects a share says little; of more, this one is worth a word


@recorded(
    "ingest",
    lambda done: {
        "run": done.run,
        "seen": done.seen,
        "stored": done.stored,
        "duplicate": done.duplicate,
        "excluded": done.excluded,
        "quarantined": done.quarantined,
        "version": done.version,
    },
)
def ingest(
    config: Config,
    source: str,
    cohort: str,
    *,
    label: str | None = None,
    labels_file: str | None = None,
    progress: Progress | None = None,
) -> IngestResult:
    """Bring every object of `source` into the `instances` table, exactly one row each.

    Objects an earlier run has accounted for are skipped; a run with nothing new
    commits nothing. A killed run leaves no trace in the table: the next one does
    its work again.

    Args:
        source: folder, ZIP file, s3:// prefix, Orthanc or DICOMweb server; see `memmc.sources.open.open_source`.
        cohort: name the rows are filed under.
        label: label of every object, or None for unknown.
        labels_file: CSV of labels by path or SOPInstanceUID.

    Raises:
        UsageError: bad cohort name, source or label table.
        StorageError: the source fails.
        DataError: too many of the new objects are quarantined; all are committed (`ingest.max_quarantined`).
        IdentityKeyError: the lake was made with another identity key.
        AccountingError: the account does not balance; nothing was committed.
    """
    began = time.monotonic()
    progress = progress or Silent()
    check_cohort(cohort)
    planned = plan(config, source, cohort, label, labels_file, progress)
    job, seen = planned.job, planned.known + len(planned.new)
    version, rows, dropped = _bring(config, planned, progress)
    dropped += [ALREADY_INGESTED] * planned.known
    reasons = Counter([row["reason"] for row in rows if row["reason"]] + dropped)
    outcomes = Counter(row["outcome"] for row in rows)
    outcomes.update("duplicate" if reason == ALREADY_INGESTED else "quarantined" for reason in dropped)
    logger.info("ingest %s: %d objects, %s", job.run, seen, dict(outcomes))
    check_quarantined(rows, config.ingest.max_quarantined, progress)
    return IngestResult(
        seen=seen,
        stored=outcomes["stored"],
        duplicate=outcomes["duplicate"],
        excluded=outcomes["excluded"],
        quarantined=outcomes["quarantined"],
        reasons=dict(sorted(reasons.items())),
        version=version,
        cohort=cohort,
        run=job.run,
        pending=planned.pending,
        seconds=round(time.monotonic() - began, 2),
    )


def _bring(config: Config, planned: Plan, progress: Progress) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Convert and commit what is new; return the table's version and what `publish` says of the objects."""
    lake, job, new = Lake(config.lake.uri), planned.job, planned.new
    if not new:
        return lake.version("instances") if lake.exists("instances") else -1, [], []
    progress.stage("ingest", len(new))
    metadata = {"cohort": job.cohort, "preprocess_id": job.preprocess_id, "config_id": config.config_id}
    with lease(lake, job.run):
        shards = convert_all(config, job, new, home_directory(), progress)
        check_source(job, shards, len(new))
        metadata |= reached(planned, shards)
        version, shards, dropped = publish(lake, job, shards, len(new), metadata)
    return version, object_rows(job, shards), dropped


def preview(
    config: Config,
    source: str,
    cohort: str,
    *,
    label: str | None = None,
    labels_file: str | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Say what `ingest` would do; read the listing only and write nothing, not even a key."""
    check_cohort(cohort)
    planned = plan(config, source, cohort, label, labels_file, progress or Silent(), dry_run=True)
    known, new = planned.known, len(planned.new)
    labelled = sum(planned.job.labels.of(item.path, None) != "unknown" for item in planned.new)
    counts = {"objects listed": known + new, "already ingested": known, "new": new, "labelled": labelled}
    return PlanResult({**counts, "pending": planned.pending} if planned.pending else counts)


def check_cohort(cohort: str) -> None:
    """Refuse a name that could not stand in a log, a path or a model's name.

    Raises:
        UsageError: naming the form expected.
    """
    if not _COHORT.fullmatch(cohort):
        raise UsageError("cohort names are 1-64 of a-z, 0-9, '.', '_', '-' and begin with a letter or digit")


@dataclass(frozen=True)
class Plan:
    """What an ingest has to do.

    Attributes:
        job: what all tasks share.
        known: number of listed objects that are accounted for.
        new: the others, in listing order.
        pending: number of new objects whose study is not complete; a later run takes them.
        cursor: where the next listing may begin; None where the source has no cursor.
    """

    job: IngestJob
    known: int
    new: list[SourceObject]
    pending: int = 0
    cursor: Cursor | None = None


def plan(
    config: Config,
    source: str,
    cohort: str,
    label: str | None,
    labels_file: str | None,
    progress: Progress,
    *,
    dry_run: bool = False,
) -> Plan:
    """List the source and subtract what the table has seen.

    Args:
        dry_run: write nothing: make no key, do not tie the lake to one, do not try out the store.
    """
    find_key = key_for_preview if dry_run else identity_key
    key = find_key(config, home_directory(), progress)
    vault, vault_key = vault_of(config) or (None, None)
    place = open_source(source, config.source, os.environ)
    lake = Lake(config.lake.uri)
    refuse_view(lake, cohort)
    lake.check_key_id(key_id(key), tie=not dry_run)
    labels = read_labels(label, labels_file, key)
    progress.stage("list")
    if not dry_run:
        lake.probe()
    started = datetime.now(UTC)
    seen, lost = seen_objects(lake, cohort), given_up(lake, cohort, started - _TRIED_FOR)

    def is_new(item: SourceObject) -> bool:
        def has(keys: Collection[str], version: str) -> bool:
            return bool(keys) and object_key(key, place.uri, item.path, item.size, version) in keys

        return not (has(seen, item.modified) or any(has(lost, failed_version(item, reason)) for reason in OVERLOADED))

    cursor = last_cursor(lake, key, place.uri, cohort) if place.has_cursor else None
    listing = place.listing(cursor, is_new, progress.advance)
    if listing.whole:
        labels.check_against(item.path for item in listing.objects)
    new = [item for item in listing.objects if is_new(item)]
    job = IngestJob(
        run=f"ingest-{cohort}-{started:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        cohort=cohort,
        source=place,
        storage=lake.storage,
        policy=ConvertPolicy.from_config(config, key, vault_key),
        split=config.split,
        labels=labels,
        preprocess_id=config.preprocess_id,
        started=started,
        vault=vault,
        erased=erased_contents(lake, cohort) if vault is not None else frozenset(),
        failed_before=failed_objects(lake, cohort),
    )
    waiting = f", {listing.pending} of incomplete studies left for later" if listing.pending else ""
    progress.message(f"{len(listing.objects)} objects listed, {len(new)} new{waiting}")
    return Plan(job, len(listing.objects) - len(new), new, listing.pending, listing.cursor)


def reached(planned: Plan, shards: list[WrittenShard]) -> dict[str, Any]:
    """Return what the commit says of where the next listing may begin, and of what it has to list again."""
    if planned.cursor is None:
        return {}
    job = planned.job
    accounted = {row["object_key"] for shard in shards for row in shard.account}
    failed = [
        item.path
        for item in planned.new
        if object_key(job.policy.key, job.source.uri, item.path, item.size, item.modified) not in accounted
    ]
    return cursor_entry(job.policy.key, job.source.uri, job.cohort, planned.cursor, failed)


def check_source(job: IngestJob, shards: list[WrittenShard], listed: int) -> None:
    """Refuse to account for objects of a source that failed as a whole, such as an archive whose disk is not mounted.

    What failed alike before is left out on both sides: objects that stay lost do not stop what comes after them.

    Raises:
        StorageError: with the counts; nothing was committed.
    """
    # A file that is closed to us, or an S3 object that is archived, says nothing of the place that holds it.
    of_objects = frozenset[str]() if isinstance(job.source, FileSource) else {FILE_UNREADABLE, FILE_CHECKSUM}
    telling = STORE_FAILURES | of_objects
    rows = [row for shard in shards for row in shard.account]
    fresh = [row for row in rows if row["object_key"] not in job.failed_before]
    reasons = [row["reason"] for row in fresh if row["reason"] in telling]
    failed, tried = len(reasons), listed - (len(rows) - len(fresh))
    if failed >= _LEAST_FAILURES and failed > _MOST_FAILING * tried:
        raise StorageError(
            f"{failed} of {tried} objects cannot be read from the source ({', '.join(sorted(set(reasons)))}), more "
            "than single objects would explain: check its disks, its log and your access to it, then run ingest again; "
            "nothing was committed"
        )


def check_quarantined(rows: list[dict[str, Any]], most: float, progress: Progress) -> None:
    """Say so when more objects are quarantined than single broken ones would explain.

    Args:
        rows: of the new objects, as they were committed.
        most: share of them above which the ingest ends with an error; `ingest.max_quarantined`.
        progress: is told of a share that is worth a word.

    Raises:
        DataError: with the counts and the reasons.
    """
    reasons = Counter(row["reason"] for row in rows if row["outcome"] == "quarantined")
    held = reasons.total()
    if len(rows) < _LEAST_JUDGED or held <= _REMARKABLE * len(rows):
        return
    named = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(5))
    found = f"{held} of {len(rows)} new objects are quarantined ({named})"
    if held > most * len(rows):
        raise DataError(
            f"{found}, more than ingest.max_quarantined = {most:g}: look into the source, or raise the setting if it "
            "holds such objects; every row is committed, so another ingest goes on from here"
        )
    logger.warning("ingest: %s", found)
    progress.message(f"{found}; is something wrong with the source?")
