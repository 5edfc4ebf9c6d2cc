"""What one ingest task does: fetch some objects, convert each in the sandbox, write their shards.

Runs on Ray workers, or in a thread of the ingest itself. A bad object never
raises here: Ray would repeat the task without end, or drop a block of good
rows. It becomes a row with a reason.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.config import SplitConfig
from memmc.dicom.convert import Converted, ConvertPolicy, rejected
from memmc.dicom.deidentify import content_key, frame_uid, object_key, seal_path
from memmc.dicom.read import refused_by_head
from memmc.dicom.reasons import OVERLOADED
from memmc.dicom.sandbox import Sandbox
from memmc.errors import StorageError
from memmc.lake.schemas import INSTANCES, SCHEMAS
from memmc.lake.shards import ShardFile, write_shard
from memmc.lake.splits import split_of
from memmc.lake.storage import Storage
from memmc.pipeline.labels import StatedLabels
from memmc.pipeline.vault import write_entries
from memmc.sources.objects import (
    LARGE_BYTES,
    STORE_AUTH,
    STORE_TIMEOUT,
    STORE_TLS,
    Data,
    FetchFailed,
    Source,
    SourceObject,
)

# What the driver needs of every row to settle duplicates and to balance the account.
ACCOUNT = ("object_key", "outcome", "split", "reason", "sop_instance_uid", "content_key", "frame_number")

# So many objects of a task in a row, and the source itself has failed. A refusal costs no time and may be meant for the
# objects of one study; each silence lasts a minute or more.
_MOST_IN_A_ROW = {STORE_AUTH: 10, STORE_TIMEOUT: 3, STORE_TLS: 3}

MOST_HELD_BYTES = 256 << 20  # of pixels that a task keeps until it writes them: frames of long objects add up
_ONE_LARGE = threading.Lock()  # of a process's tasks, so many hold an object of more than LARGE_BYTES at a time


@dataclass(frozen=True)
class IngestJob:
    """What all tasks of one ingest share. Holds the identity key and the source's credentials: never log it.

    Attributes:
        vault: where sealed originals go; None without an identity vault.
        erased: content keys of erased objects, whose originals are not sealed again.
        failed_before: object keys of rows that say of an object that it could not be fetched or converted for now; when
            it fails alike again, that says nothing new of the source.
    """

    run: str
    cohort: str
    source: Source
    storage: Storage
    policy: ConvertPolicy
    split: SplitConfig
    labels: StatedLabels
    preprocess_id: str
    started: datetime
    vault: Storage | None = None
    erased: frozenset[str] = field(default_factory=frozenset[str], repr=False)
    failed_before: frozenset[str] = field(default_factory=frozenset[str], repr=False)


@dataclass(frozen=True)
class WrittenShard:
    """A shard and the account of its rows in file order."""

    file: ShardFile
    account: list[dict[str, Any]]


_sandboxes: dict[int, Sandbox] = {}


def sandbox_for(policy: ConvertPolicy) -> Sandbox:
    """Return this process's sandbox for `policy`; it lives as long as the process."""
    known = hash(policy)
    if known not in _sandboxes:
        for old in _sandboxes.values():
            old.close()
        _sandboxes.clear()
        _sandboxes[known] = Sandbox(policy)
        atexit.register(_sandboxes[known].close)
    return _sandboxes[known]


def convert_objects(
    job: IngestJob, objects: Iterable[SourceObject], sandbox: Sandbox | None = None
) -> list[WrittenShard]:
    """Convert `objects` and write one shard per partition that occurs among them; more, where their frames are many.

    Args:
        sandbox: of the job's policy; this process's own when absent.
    """
    written: list[WrittenShard] = []
    partitions: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    held = 0
    with closing(rows_of(job, objects, sandbox)) as rows:
        for row in rows:
            partitions[row["outcome"], row["split"]].append(row)
            held += len(row["pixels"] or b"")
            if held >= MOST_HELD_BYTES:
                written += _written(job, partitions)
                partitions.clear()
                held = 0
    return written + _written(job, partitions)


def _written(job: IngestJob, partitions: Mapping[tuple[str, str], list[dict[str, Any]]]) -> list[WrittenShard]:
    """Write the originals of rows, then the rows, one shard per partition."""
    if job.vault is not None and job.policy.vault_key is not None:
        kept = [row for rows in partitions.values() for row in rows if row["content_key"] not in job.erased]
        write_entries(job.vault, job.policy.vault_key, kept)
    return [write_partition(job.storage, outcome, split, rows) for (outcome, split), rows in sorted(partitions.items())]


def rows_of(
    job: IngestJob, objects: Iterable[SourceObject], sandbox: Sandbox | None = None
) -> Generator[dict[str, Any]]:
    """Yield the rows of the `instances` table in order: one per object, or one per frame (`select.frames` each).

    Raises:
        StorageError: the source itself refuses or hangs, by the number of objects in a row.
    """
    sandbox = sandbox or sandbox_for(job.policy)
    in_a_row = 0
    with closing(_fetched(job, objects)) as all_fetched:
        for fetched in all_fetched:
            converted = rejected(fetched.reason) if fetched.data is None else sandbox.convert(fetched.data)
            row, reason = _row(job, fetched, converted), fetched.reason
            del fetched  # the next object is not to lie beside this one
            if row["object_key"] not in job.failed_before:
                in_a_row = in_a_row + 1 if reason in _MOST_IN_A_ROW else 0
                if in_a_row and in_a_row >= _MOST_IN_A_ROW[reason]:
                    raise StorageError(
                        f"the source does not give its objects, {in_a_row} in a row ({reason}); check its address "
                        "and credentials, then run ingest again: nothing was committed"
                    )
            yield from [row] if converted.frames == 1 else _frame_rows(job, row, converted)


@dataclass(frozen=True)
class _Fetched:
    """An object's bytes and the key of their content, or the reason why there are none.

    Attributes:
        version: of the object, for its key.
    """

    item: SourceObject
    version: str
    data: Data | None = field(default=None, repr=False)
    content: str = ""
    reason: str = ""


def _fetched(job: IngestJob, objects: Iterable[SourceObject]) -> Generator[_Fetched]:
    """Yield the objects in order; while the caller converts one, the next is fetched and hashed, if it is not large."""
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[_Fetched] | None = None
        for item in objects:
            large = item.size > LARGE_BYTES
            following = None if large else pool.submit(_fetch, job, item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
            if large:
                with _ONE_LARGE:
                    yield _fetch(job, item)
        if ahead is not None:
            yield ahead.result()


def _fetch(job: IngestJob, item: SourceObject) -> _Fetched:
    try:
        data = job.source.fetch(item, job.policy.ingest.max_file_bytes, refused_by_head)
    except FetchFailed as failure:
        passing = failure.retriable and not item.problem
        version = failed_version(item, failure.reason) if passing else item.modified
        return _Fetched(item, version, reason=failure.reason)
    return _Fetched(item, item.modified, data, content_key(job.policy.key, data))


def failed_version(item: SourceObject, reason: str) -> str:
    """Return the version in the key of a row of a failure that may pass.

    It gets a key of its own: the row does not stand for what a later run may be given, and a later run that fails
    alike finds it (`memmc.pipeline.settle.publish`).
    """
    return f"{item.modified} {reason}"


def _row(job: IngestJob, fetched: _Fetched, converted: Converted) -> dict[str, Any]:
    item, stored = fetched.item, converted.outcome == "stored"
    version = failed_version(item, str(converted.reason)) if converted.reason in OVERLOADED else fetched.version
    attributes: Mapping[str, Any] = converted.attributes
    patient_key = attributes.get("patient_key")
    return {
        **attributes,
        "cohort": job.cohort,
        "object_key": object_key(job.policy.key, job.source.uri, item.path, item.size, version),
        "source_ref": seal_path(job.policy.key, item.path),
        "outcome": converted.outcome,
        "split": split_of(str(patient_key), job.split) if stored else "none",
        "reason": converted.reason,
        "content_key": fetched.content,
        "size_bytes": item.size if fetched.data is None else len(fetched.data),
        "label": job.labels.of(item.path, attributes.get("sop_instance_uid")),
        "preprocess_id": job.preprocess_id if stored else None,
        "pixels": converted.pixels if stored else None,
        "object_uid": attributes.get("sop_instance_uid"),  # this and the next for the vault; no columns of the table
        "sealed": converted.sealed,
        **pixel_statistics(converted),
        "ingest_run": job.run,
        "ingested_at": job.started,
    }


def _frame_rows(job: IngestJob, row: dict[str, Any], converted: Converted) -> Iterator[dict[str, Any]]:
    """Yield a row per frame.

    The first keeps the object's key, by which a later run knows that the object was seen; each has a UID of its own,
    so that duplicates, labels and scores work frame by frame.
    """
    pixels = memoryview(converted.pixels or b"")
    size = len(pixels) // converted.frames
    for number in range(1, converted.frames + 1):
        one = replace(converted, pixels=bytes(pixels[(number - 1) * size : number * size]), frames=1)
        key = row["object_key"]
        yield {
            **row,
            "object_key": key if number == 1 else hashlib.sha256(f"{key} {number}".encode()).hexdigest(),
            "sop_instance_uid": frame_uid(row["sop_instance_uid"], number),
            "frame_number": number,
            "pixels": one.pixels,
            **pixel_statistics(one),
        }


def pixel_statistics(converted: Converted) -> dict[str, float | None]:
    """Return mean and standard deviation of stored pixels, in [0, 1]."""
    bits = converted.attributes.get("bits")
    if converted.pixels is None or bits is None:
        return {"pixel_mean": None, "pixel_std": None}
    pixels = np.frombuffer(converted.pixels, np.uint8 if bits == 8 else "<u2")
    scale = 2 ** int(bits) - 1
    return {"pixel_mean": float(pixels.mean()) / scale, "pixel_std": float(pixels.std()) / scale}


def write_partition(storage: Storage, outcome: str, split: str, rows: list[dict[str, Any]]) -> WrittenShard:
    """Write one shard of rows that share a partition."""
    schema = SCHEMAS[INSTANCES]
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    file = write_shard(storage, INSTANCES, table, partition={"outcome": outcome, "split": split})
    return WrittenShard(file=file, account=[{name: row.get(name) for name in ACCOUNT} for row in rows])


def objects_to_json(objects: list[SourceObject]) -> str:
    """Encode a chunk of the listing for the way to a worker."""
    return json.dumps([asdict(item) for item in objects])


def objects_from_json(text: str) -> list[SourceObject]:
    """Decode what `objects_to_json` made."""
    return [SourceObject(**item) for item in json.loads(text)]


def shards_to_json(shards: list[WrittenShard]) -> str:
    """Encode the account of a chunk for the way back to the driver."""
    return json.dumps([asdict(shard) for shard in shards])


def shards_from_json(text: str) -> list[WrittenShard]:
    """Decode what `shards_to_json` made."""
    return [WrittenShard(file=ShardFile(**item["file"]), account=item["account"]) for item in json.loads(text)]
