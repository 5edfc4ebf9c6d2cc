"""Look at the audit trail: verify it, and write it out for those who keep it elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from memmc.config import Config
from memmc.errors import DataError, IntegrityError, StorageError, UsageError
from memmc.lake.audit import Head, encode
from memmc.lake.audit_check import ChainVerdict, Witness, parse_record, read_records, verify_chain
from memmc.lake.storage import Storage
from memmc.pipeline.audit import recorded
from memmc.pipeline.audit_fhir import audit_event
from memmc.pipeline.results import Result

Format = Literal["jsonl", "fhir"]


@dataclass(frozen=True)
class AuditVerdict(Result):
    """Whether the trail stands as it was written.

    Attributes:
        intact: nothing was found.
        records: how many there are.
        head: number and digest of the last one; keep it elsewhere, and give it as `--head` next time.
        witnesses: earlier ends of the chain that were compared: of commits, of the recorded head, of `--head`.
        first_bad: number of the first record that is not as it was written; 0 when the trail as a whole is concerned.
        findings: number and problem of each.
    """

    intact: bool
    records: int
    head: str
    witnesses: int
    first_bad: int | None
    findings: list[dict[str, Any]]


@dataclass(frozen=True)
class AuditExport(Result):
    """The records that were written out, and the end of the chain that they make; `path` is empty for stdout."""

    path: str
    format: Format
    records: int
    head: str
    lines: list[str]


def verify_trail(config: Config, heads: Sequence[str] = ()) -> AuditVerdict:
    """Read the whole trail and compare it with all who knew an end of it.

    Args:
        config: `lake.uri` names the lake, or an identity vault, which has a trail of its own.
        heads: ends of the chain kept elsewhere, as `number:digest`.

    Raises:
        UsageError: a head of another form.
        DataError: there is no trail and nothing that knew of one.
        StorageError: the place cannot be read.
    """
    kept = [Witness("the head given", _parsed(head)) for head in heads]
    found = verify_chain(Storage.open(config.lake.uri), kept)
    if not (found.head.sequence or found.findings or found.witnesses):
        raise DataError("nothing was ever recorded here; check --lake")
    return AuditVerdict(
        intact=not found.findings,
        records=found.head.sequence,
        head=str(found.head),
        witnesses=found.witnesses,
        first_bad=found.findings[0].sequence if found.findings else None,
        findings=[asdict(finding) for finding in found.findings],
    )


@recorded("audit-export", lambda done: {"records": done.records, "format": done.format})
def export_trail(config: Config, out: Path | None, form: Format = "jsonl") -> AuditExport:
    """Write the trail out, one record a line, after it has been verified.

    Args:
        config: names the lake.
        out: the file; when absent, the lines are in the result alone.
        form: `jsonl` for the records as they stand, each with its digest; `fhir` for FHIR R4 AuditEvents (NDJSON).

    Raises:
        IntegrityError: the trail is not as it was written.
        DataError: there is none.
        StorageError: the lake cannot be read, or the file not be written.
    """
    storage = Storage.open(config.lake.uri)
    verdict = verify_chain(storage)
    if not verdict.head.sequence and not verdict.findings:
        raise DataError("nothing was ever recorded here; check --lake")
    lines = _lines(storage, verdict, form)
    if out is not None:
        try:
            out.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
        except OSError as error:
            raise StorageError(f"the export cannot be written ({error.strerror}); check --out") from None
    return AuditExport(str(out or ""), form, len(lines), str(verdict.head), lines)


def _lines(storage: Storage, verdict: ChainVerdict, form: Format) -> list[str]:
    if verdict.findings:
        raise IntegrityError(
            f"record {verdict.findings[0].sequence} of the audit trail is not as it was written; "
            "see 'memmc audit verify', and keep the folder _audit as it is"
        )
    lines: list[str] = []
    for _, data in read_records(storage, 1, verdict.head.sequence):
        record = parse_record(data or b"")
        if record is None:
            raise IntegrityError("the audit trail changed while it was read; see 'memmc audit verify'")
        written = encode(record) if form == "jsonl" else json.dumps(audit_event(record)).encode()
        lines.append(written.decode().rstrip("\n"))
    return lines


def _parsed(head: str) -> Head:
    found = Head.parse(head)
    if found is None:
        raise UsageError("--head has the form NUMBER:DIGEST, as 'memmc audit verify' prints it")
    return found
