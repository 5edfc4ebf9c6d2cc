"""The audit trail: numbered records, each with the digest of the one before it, that are made once and never written.

``_audit/<number>.json`` holds one record and is made only if it is not there yet, so that writers on any number of
machines stand in one chain; ``_audit/head.json`` is the last record's number and digest: where to append without
reading the chain, and what shows that its end was cut off. Every commit to a table carries the head of its time
(`Lake.commit`), and so bears witness against a head that was cut back too (infra/adr/0013).
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memmc.errors import StorageError
from memmc.lake.storage import Storage
from memmc.s3 import AbsentError

FOLDER = "_audit"
HEAD = f"{FOLDER}/head.json"
NOTHING = "0" * 64
"""The digest before the first record."""
HEAD_LOST = "audit-head-lost"
"""Action of the record that a writer adds when the head was gone or damaged while records were there."""

_ATTEMPTS = 1000  # each lost one means that another writer's record stands
_NAME = re.compile(rf"{FOLDER}/(\d{{12}})\.json")


@dataclass(frozen=True)
class Head:
    """The end of a chain: number (0 for an empty one) and digest (SHA-256, hex) of its last record."""

    sequence: int = 0
    digest: str = NOTHING

    def __str__(self) -> str:
        """Return ``number:digest``, the form in which a head is kept elsewhere."""
        return f"{self.sequence}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Head | None:
        """Return the head that `str` wrote, or None."""
        found = re.fullmatch(r"(\d{1,12}):([0-9a-f]{64})", text)
        return cls(int(found[1]), found[2]) if found else None


def append(storage: Storage, content: Mapping[str, Any]) -> Head:
    """Add one record to the end of the chain; costs the same however long the chain is.

    A writer that is killed leaves the record whole, or none.

    Args:
        storage: the lake's.
        content: JSON values.

    Returns:
        The new end of the chain.

    Raises:
        StorageError: the place cannot be read or written.
    """
    head = read_head(storage)
    if head is None:
        head = _begin(storage, content)
    body = {**content, "id": str(uuid.uuid4())}
    for _ in range(_ATTEMPTS):
        name = record_name(head.sequence + 1)
        data, mine = _record(head, body)
        # After a lost answer the store may say that an object is there which is ours.
        if storage.create(name, data) or storage.read(name) == data:
            _advance(storage, mine)
            return mine
        head = Head(head.sequence + 1, _stated_digest(storage.read(name)))
    raise StorageError(f"the audit trail: other writers were first {_ATTEMPTS} times in a row; run again")


def read_head(storage: Storage) -> Head | None:
    """Return the recorded end of the chain, which may lag behind while others write; None when gone or damaged."""
    try:
        return Head.parse(str(json.loads(storage.read(HEAD))["head"]))
    except AbsentError:
        return None
    except (ValueError, KeyError, TypeError):
        return None


def record_name(sequence: int) -> str:
    """Return where a record lies, relative to the lake's root."""
    return f"{FOLDER}/{sequence:012d}.json"


def sequence_of(name: str) -> int | None:
    """Return the number of the record of this name, or None for any other object."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def encode(record: Mapping[str, Any]) -> bytes:
    """Return the one form in which a record is written: keys sorted, ASCII, one line."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def digest_of(record: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of a record less its own `digest`."""
    return hashlib.sha256(encode({name: value for name, value in record.items() if name != "digest"})).hexdigest()


def _record(before: Head, body: Mapping[str, Any]) -> tuple[bytes, Head]:
    record = {**body, "sequence": before.sequence + 1, "previous": before.digest}
    record["digest"] = digest_of(record)
    return encode(record), Head(before.sequence + 1, record["digest"])


def _begin(storage: Storage, content: Mapping[str, Any]) -> Head:
    """Make the head before the first record, so that one without a head has lost it."""
    numbers = [number for number in map(sequence_of, storage.list(FOLDER)) if number is not None]
    head = read_head(storage)  # another writer may have begun meanwhile
    if head is not None:
        return head
    if not numbers:
        storage.create(HEAD, _head_document(Head()))
        return read_head(storage) or Head()
    last = max(numbers)
    head = Head(last, _stated_digest(storage.read(record_name(last))))
    storage.write(HEAD, _head_document(head))
    return append(storage, {**content, "action": HEAD_LOST, "outcome": "failed", "subject": {}})


def _advance(storage: Storage, mine: Head) -> None:
    known = read_head(storage)
    if known is None or known.sequence < mine.sequence:
        storage.write(HEAD, _head_document(mine))


def _head_document(head: Head) -> bytes:
    return json.dumps({"head": str(head)}).encode()


def _stated_digest(data: bytes) -> str:
    """Return what a record says of itself; of one that was spoilt, the digest of its bytes. `verify` finds it."""
    try:
        stated = json.loads(data)["digest"]
    except (ValueError, KeyError, TypeError):
        stated = None
    return stated if isinstance(stated, str) else hashlib.sha256(data).hexdigest()
