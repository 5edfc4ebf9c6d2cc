"""The identity vault: from a pseudonym back to the original, for whoever holds the private key.

Ingest writes sealed entries and cannot read them. Nothing of it lies in the
lake, and the lake works without it. An entry may be there twice, when a run was
killed and repeated. A UID may have entries of different objects, when another
object claimed it and was refused; the stored one's counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from memmc.config import Config
from memmc.dicom.vault import open_originals, vault_key_id
from memmc.errors import ConfigError, DataError, IdentityKeyError, IntegrityError, StorageError, UsageError
from memmc.lake.audit import Head, record_name
from memmc.lake.lock import locked
from memmc.lake.schemas import INSTANCES
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.pipeline.audit import has_trail, note, note_in
from memmc.pipeline.results import Result
from memmc.s3 import AbsentError

ENTRIES = "entries"
_REWRITING = "_rewriting"  # the lock of those who rewrite entries
_LOOKS = 5  # at entries that are rewritten meanwhile
_PSEUDONYM = re.compile(r"2\.25\.[0-9]{1,39}")
_RECORDED_AT_ONCE = 200
SCHEMA: Final = pa.schema(
    [
        pa.field(
            "sop_instance_uid", pa.string(), nullable=False
        ),  # pseudonym of the row: of a frame, where frames are rows
        pa.field("object_uid", pa.string(), nullable=False),  # pseudonym of the object, bound into the seal
        pa.field("patient_key", pa.string(), nullable=False),
        pa.field("study_uid", pa.string(), nullable=False),  # pseudonym
        pa.field("sealed", pa.binary(), nullable=False),
        pa.field("vault_key_id", pa.string(), nullable=False),
        pa.field("ingest_run", pa.string(), nullable=False),
        pa.field("sealed_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("content_key", pa.string()),  # of the object that it was read from; entries of old have none
    ]
)


@dataclass(frozen=True)
class VaultKeys(Result):
    """A new pair of keys: where they lie, and the public one's name."""

    private_key_file: str
    public_key_file: str
    vault_key_id: str


@dataclass(frozen=True)
class Resolved(Result):
    """Originals by pseudonym; patient data.

    Attributes:
        missing: the pseudonyms without an answer.
        ambiguous: those of them that the vault knows, but of other objects than the stored one, or of several that
            disagree while the lake does not tell which is stored.
    """

    originals: dict[str, dict[str, str]]
    missing: list[str]
    audit: str
    ambiguous: list[str] = field(default_factory=list[str])


def vault_of(config: Config) -> tuple[Storage, bytes] | None:
    """Return where the vault lies and its public key, or None where none is configured.

    Raises:
        ConfigError: one setting without the other, or the vault and the lake lie in each other.
        IdentityKeyError: the public key cannot be read.
    """
    uri, key_file = config.deid.vault_uri, config.deid.vault_public_key_file
    if uri is None and key_file is None:
        return None
    if uri is None or key_file is None:
        raise ConfigError(
            "deid.vault_uri and deid.vault_public_key_file go together; make the keys with 'memmc vault init'"
        )
    vault, lake = Storage.open(uri), Storage.open(config.lake.uri)
    inner, outer = (_real(storage) + "/" for storage in (vault, lake))
    if inner.startswith(outer) or outer.startswith(inner):
        raise ConfigError(
            "deid.vault_uri and lake.uri lie in each other; keep the vault in a place and with rights of its own"
        )
    return vault, read_public_key(Path(key_file))


def _real(storage: Storage) -> str:
    local = storage.local_path()
    return storage.uri if local is None else str(local.resolve())


def write_entries(vault: Storage, public_key: bytes, rows: Sequence[dict[str, Any]]) -> None:
    """Write the sealed entries among the rows of one task as one file, whole.

    Args:
        vault: the vault's storage.
        public_key: the key they were sealed to.
        rows: of `instances`, with `sealed` and `object_uid` where an entry was made.

    Raises:
        StorageError: the place cannot be written; the task fails and nothing is committed to the lake.
    """
    sealed = [row for row in rows if row.get("sealed")]
    if not sealed:
        return
    named = {"vault_key_id": vault_key_id(public_key)}
    entries = [{**row, **named, "sealed_at": row["ingested_at"]} for row in sealed]
    table = pa.Table.from_pylist([{name: entry[name] for name in SCHEMA.names} for entry in entries], schema=SCHEMA)
    _write(vault, table)


def _write(vault: Storage, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    run = table["ingest_run"][0].as_py()
    vault.write(f"{ENTRIES}/{run}-{uuid.uuid4().hex}.parquet", sink.getvalue().to_pybytes())


def _read(vault: Storage, name: str) -> pa.Table:
    """Return the entries of a file; columns that were not written of old are null."""
    try:
        with pq.ParquetFile(pa.BufferReader(vault.read(name)), page_checksum_verification=True) as file:
            absent = [one for one in SCHEMA if one.nullable and one.name not in file.schema_arrow.names]
            table = file.read([one.name for one in SCHEMA if one not in absent])
    except (pa.ArrowException, OSError, KeyError):
        raise IntegrityError("a file of the vault is damaged; restore it from a copy") from None
    for one in absent:
        table = table.append_column(one, pa.nulls(table.num_rows, one.type))
    return table.select(SCHEMA.names)


def make_keys(private_key_file: Path, public_key_file: Path, passphrase: str | None) -> VaultKeys:
    """Make a pair of keys; the private one, readable by its owner alone, belongs on another machine than ingest.

    Raises:
        UsageError: a file of that name is there already, or cannot be made.
    """
    key = X25519PrivateKey.generate()
    lock = pem.BestAvailableEncryption(passphrase.encode()) if passphrase else pem.NoEncryption()
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock)
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((private_key_file, private, 0o600), (public_key_file, public, 0o644)):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise UsageError(
                f"a key file cannot be made ({error.strerror}); keys are never overwritten: give another name"
            ) from None
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
    return VaultKeys(str(private_key_file), str(public_key_file), vault_key_id(key.public_key().public_bytes_raw()))


def read_public_key(file: Path) -> bytes:
    """Return the 32 bytes of a public key.

    Raises:
        IdentityKeyError: not a file of `memmc vault init`.
    """
    try:
        key = pem.load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, X25519PublicKey):
        raise IdentityKeyError(
            "deid.vault_public_key_file is no X25519 public key in PEM; make it with 'memmc vault init'"
        )
    return key.public_bytes_raw()


def read_private_key(file: Path, passphrase: str | None) -> X25519PrivateKey:
    """Return a private key.

    Raises:
        IdentityKeyError: readable by others, wrong passphrase, or no such key.
    """
    try:
        if file.stat().st_mode & 0o077:
            raise IdentityKeyError("the private key can be read by others; run 'chmod 600' on it, and think it over")
        key = pem.load_pem_private_key(file.read_bytes(), passphrase.encode() if passphrase else None)
    except OSError as error:
        raise IdentityKeyError(f"the private key cannot be read ({error.strerror}); check --private-key-file") from None
    except TypeError:
        raise IdentityKeyError(
            "the private key has a passphrase and none was given, or the other way round; set MEMMC_VAULT_PASSPHRASE"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise IdentityKeyError("the private key does not open; check the passphrase and --private-key-file") from None
    if not isinstance(key, X25519PrivateKey):
        raise IdentityKeyError("--private-key-file is no X25519 key; give the one of 'memmc vault init'")
    return key


def resolve(config: Config, uids: Iterable[str], private_key: X25519PrivateKey) -> Resolved:
    """Return the originals of pseudonyms; who asked for what is written down before they are shown.

    Raises:
        UsageError: no vault is configured, or no pseudonym given.
        IdentityKeyError: an entry does not open.
        StorageError: the vault cannot be read, or the audit record not be written.
    """
    if config.deid.vault_uri is None:
        raise UsageError("no vault is configured; set deid.vault_uri")
    vault = Storage.open(config.deid.vault_uri)
    asked = list(dict.fromkeys(uid.strip() for uid in uids if uid.strip()))
    if not asked:
        raise UsageError("no pseudonym given; --uids takes a file with one sop_instance_uid a line, or - for stdin")
    own = vault_key_id(private_key.public_key().public_bytes_raw())
    entries, stored = _entries(vault, asked), _stored(config, asked)
    opened = {uid: _opened(entries[uid], stored[uid], own, private_key) for uid in asked if uid in entries}
    originals = {uid: found for uid, found in opened.items() if found is not None}
    audit = _record(config, vault, own, asked, len(originals))
    missing = [uid for uid in asked if uid not in originals]
    return Resolved(originals, missing, audit, [uid for uid in missing if uid in opened])


def _entries(vault: Storage, uids: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of each UID, in the order of sealing."""
    for _ in range(_LOOKS - 1):
        try:
            return _entries_now(vault, uids)
        except AbsentError:  # `forget` has just replaced a file
            continue
    return _entries_now(vault, uids)


def _entries_now(vault: Storage, uids: list[str]) -> dict[str, list[dict[str, Any]]]:
    wanted = pc.SetLookupOptions(value_set=pa.array(uids))
    found: list[dict[str, Any]] = []
    for name in vault.list(ENTRIES):
        table = _read(vault, name)
        mask = pc.call_function("is_in", [table["sop_instance_uid"]], wanted)
        found += table.filter(mask).to_pylist()
    entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(found, key=lambda row: row["sealed_at"]):
        entries[row["sop_instance_uid"]].append(row)
    return entries


def _stored(config: Config, uids: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return content and patient keys of the stored instances of each UID, where there is a lake that may be read."""
    stored: dict[str, list[dict[str, Any]]] = defaultdict(list)
    lake, names = Lake(config.lake.uri), ["sop_instance_uid", "content_key", "patient_key"]
    try:
        rows = lake.read(INSTANCES, names, filter={"outcome": "stored", "sop_instance_uid": uids}).to_pylist()
    except IntegrityError:
        raise
    except (DataError, StorageError):  # who may read the vault need not be let into the lake's tables
        return stored
    for row in rows:
        stored[row["sop_instance_uid"]].append(row)
    return stored


def _opened(
    entries: list[dict[str, Any]], stored: list[dict[str, Any]], own: str, private_key: X25519PrivateKey
) -> dict[str, str] | None:
    """Return the originals of one UID; None where the entries are of another object, or disagree."""
    contents, patients = ({row[name] for row in stored} for name in ("content_key", "patient_key"))
    fitting = [
        entry
        for entry in entries
        if not stored
        or (entry["content_key"] in contents if entry["content_key"] else entry["patient_key"] in patients)
    ]
    if len({entry["patient_key"] for entry in fitting}) != 1:
        return None
    openable = [entry for entry in fitting if entry["vault_key_id"] == own] or fitting[-1:]
    found = [open_originals(entry["sealed"], entry["object_uid"], private_key) for entry in openable]
    return found[-1] if all(one == found[-1] for one in found) else None


def forget(config: Config, column: str, pseudonym: str) -> int:
    """Remove the entries of a patient or study; return how many. A killed call is run again.

    Args:
        config: names the vault; without one nothing is done.
        column: `patient_key` or `study_uid`.
        pseudonym: its value.

    Raises:
        StorageError: the vault cannot be read or written.
        IntegrityError: a file of it is damaged.
    """
    if config.deid.vault_uri is None:
        return 0
    vault, removed = Storage.open(config.deid.vault_uri), 0

    def others(table: pa.Table) -> Any:
        return pc.call_function("not_equal", [table[column], pa.scalar(pseudonym)])

    with locked(vault, _REWRITING):
        while found := _keep(vault, vault.list(ENTRIES), others):  # an ingest may write meanwhile
            removed += found
    return removed


def withdraw(vault: Storage, run: str, contents: Collection[str]) -> int:
    """Remove the entries that a run has sealed of objects which were then not stored; return how many.

    Args:
        run: of the ingest.
        contents: content keys.

    Raises:
        StorageError: the vault cannot be read or written.
        IntegrityError: a file of it is damaged.
    """
    if not contents:
        return 0
    refused = pc.SetLookupOptions(value_set=pa.array(sorted(contents), pa.string()))

    def others(table: pa.Table) -> Any:
        return pc.call_function("invert", [pc.call_function("is_in", [table["content_key"]], refused)])

    with locked(vault, _REWRITING):
        own = [name for name in vault.list(ENTRIES) if PurePosixPath(name).name.startswith(f"{run}-")]
        return _keep(vault, own, others)


def _keep(vault: Storage, names: Iterable[str], wanted: Callable[[pa.Table], Any]) -> int:
    """Keep the wanted entries of files; return how many went. The caller holds the lock."""
    removed = 0
    for name in names:
        table = _read(vault, name)
        kept = table.filter(wanted(table))
        if kept.num_rows == table.num_rows:
            continue
        if kept.num_rows:
            _write(vault, kept)
        vault.delete(name)
        removed += table.num_rows - kept.num_rows
    return removed


def _record(config: Config, vault: Storage, own: str, asked: list[str], found: int) -> str:
    """Record in the vault's audit trail who asked for which pseudonyms, and in the lake's, where there is one, that.

    What was asked for and has no pseudonym's form may be anything, and is counted alone.
    """
    digest = hashlib.sha256("\n".join(sorted(asked)).encode()).hexdigest()
    counts: dict[str, Any] = {"vault_key_id": own, "asked": len(asked), "found": found, "digest": digest}
    pseudonyms = [uid for uid in asked if _PSEUDONYM.fullmatch(uid)]
    head = Head()
    for start in range(0, len(pseudonyms) or 1, _RECORDED_AT_ONCE):
        some = pseudonyms[start : start + _RECORDED_AT_ONCE]
        head = note_in(vault, "vault-resolve", pseudonyms=some, **counts)
    if has_trail(config):
        note(config, "vault-resolve", **counts)
    return record_name(head.sequence)
