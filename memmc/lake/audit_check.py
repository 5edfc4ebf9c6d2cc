"""Does the audit trail stand as it was written? The first record that does not, and how that is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from memmc.lake import log
from memmc.lake.audit import FOLDER, HEAD, NOTHING, Head, digest_of, encode, read_head, record_name, sequence_of
from memmc.lake.schemas import SCHEMAS
from memmc.lake.storage import Storage
from memmc.s3 import AbsentError

READ_THREADS = 16


@dataclass(frozen=True)
class Witness:
    """Something that knew an earlier end of the chain: `name` says what, `head` is that end."""

    name: str
    head: Head


@dataclass(frozen=True)
class Finding:
    """What is wrong: the record's number (0 for the chain as a whole), and what was found there."""

    sequence: int
    problem: str


@dataclass(frozen=True)
class ChainVerdict:
    """What a whole check found.

    Attributes:
        head: end of the chain as its records give it.
        witnesses: how many earlier ends were compared.
        findings: empty for a chain as it was written; by number.
    """

    head: Head
    witnesses: int
    findings: list[Finding]


def verify_chain(storage: Storage, kept: Iterable[Witness] = ()) -> ChainVerdict:
    """Read every record, and compare the chain with all who knew an end of it.

    Altering, deleting, inserting and reordering records shows in the chain itself. That its end was cut off, or all
    of it written anew, shows by the recorded head, by the commits of the tables, and by heads kept elsewhere.

    Args:
        storage: the lake's.
        kept: heads kept elsewhere.

    Raises:
        StorageError: the place cannot be read; nothing is said of the trail.
    """
    witnesses = [*kept, *_commits(storage)]
    recorded = read_head(storage)
    if recorded is not None:
        witnesses.append(Witness("the recorded head", recorded))
    names = [name for name in storage.list(FOLDER) if name != HEAD]
    foreign = sum(sequence_of(name) is None for name in names)
    last = max((sequence_of(name) or 0 for name in names), default=0)
    findings = [Finding(0, f"{foreign} objects in the trail's folder are no records")] if foreign else []
    if recorded is None and last:
        findings.append(Finding(0, "the recorded head is gone or damaged"))
    digests: dict[int, str | None] = {0: NOTHING}
    before: str | None = NOTHING
    for sequence, data in read_records(storage, 1, last):
        problem, digests[sequence] = _problem(data, sequence, before)
        before = digests[sequence]
        findings += [Finding(sequence, problem)] if problem else []
    for witness in witnesses:
        findings += _against(witness, digests, last)
    head = Head(last, digests[last] or NOTHING)
    return ChainVerdict(head, len(witnesses), sorted(findings, key=lambda finding: finding.sequence))


def read_records(storage: Storage, first: int, last: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield numbers and bytes of records, None where one is missing."""

    def read(sequence: int) -> bytes | None:
        try:
            return storage.read(record_name(sequence))
        except AbsentError:
            return None

    numbers = range(first, last + 1)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        yield from zip(numbers, pool.map(read, numbers), strict=True)


def parse_record(data: bytes) -> dict[str, Any] | None:
    """Return a record whose digest fits its content and whose bytes are the one way to write it, else None."""
    try:
        record: Any = json.loads(data)
    except ValueError:
        return None
    fits = isinstance(record, Mapping) and record.get("digest") == digest_of(record) and encode(record) == data
    return dict(record) if fits else None


def _problem(data: bytes | None, sequence: int, before: str | None) -> tuple[str, str | None]:
    """Return what is wrong with a record, empty for nothing, and its digest where it has one."""
    if data is None:
        return "missing", None
    record = parse_record(data)
    if record is None:
        return "altered: its content does not fit its digest", None
    digest = str(record["digest"])
    if record.get("sequence") != sequence:
        return f"in another's place: it says that it is record {record.get('sequence')}", digest
    if before is not None and record.get("previous") != before:
        return f"replaced, or record {sequence - 1} was: it does not follow that one", digest
    return "", digest


def _against(witness: Witness, digests: Mapping[int, str | None], last: int) -> list[Finding]:
    known = witness.head
    if known.sequence > last:
        problem = f"missing, with all after it: {witness.name} knew of record {known.sequence}"
        return [Finding(last + 1, problem)]
    found = digests[known.sequence]
    if found is not None and found != known.digest:
        return [Finding(known.sequence, f"replaced: {witness.name} knew another")]
    return []


def _commits(storage: Storage) -> Iterator[Witness]:
    for table in SCHEMAS:
        for version, text in log.audit_heads(storage, table):
            head = Head.parse(text)
            if head is not None:
                yield Witness(f"commit {version} of table '{table}'", head)
