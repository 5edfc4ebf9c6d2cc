"""The four Delta tables of a lake, and the only code that commits to them.

Workers write shards (`write_rows`), one commit (`Lake.commit`) makes them part
of a table, all or none. A table's version numbers its commits; a reader that
names a version sees the same rows for ever. Other tools (DuckDB, Spark, Polars,
pandas) open the tables as they are.
"""

from __future__ import annotations

import functools
import json
import random
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memmc import s3
from memmc.errors import DataError, IdentityKeyError, StorageError
from memmc.lake import audit, log
from memmc.lake.commit import Commit
from memmc.lake.evolution import evolve
from memmc.lake.files import (
    DataFile,
    Filter,
    Value,
    again_when_absent,
    read_file,
    select_rows,
    values,
    write_rows,
)
from memmc.lake.schemas import INSTANCES, LABELS, PARTITION_BY, SCHEMAS, schema_of
from memmc.lake.shards import BULK_COLUMNS, ShardFile, lineage_of
from memmc.lake.storage import Storage
from memmc.lake.views import expand
from memmc.s3 import AbsentError

if TYPE_CHECKING:
    from deltalake import DeltaTable

COMMIT_ATTEMPTS = 12
READ_THREADS = 8
IDENTITY_FILE = "_identity.json"


class Lake:
    """All tables under one URI; holds nothing but the URI and may be pickled."""

    def __init__(self, uri: str | Path) -> None:
        self.storage = Storage.open(uri)

    @property
    def uri(self) -> str:
        """Absolute path or ``s3://`` URI of the lake's root."""
        return self.storage.uri

    def exists(self, table: str) -> bool:
        """Return whether the table has been made."""
        schema_of(table)
        return self.storage.exists(log.entry_name(table, 0)) or log.begun(self.storage, table)

    def version(self, table: str) -> int:
        """Return the newest version of a table.

        Raises:
            DataError: the lake has no such table yet.
        """
        return self._open(table).version()

    def commit(
        self,
        table: str,
        files: Iterable[ShardFile],
        run_id: str,
        metadata: Mapping[str, Any] | None = None,
        step: int = 1,
        turns: Mapping[str, int] | None = None,
        remove: Iterable[DataFile] = (),
        holds: Mapping[str, int] | None = None,
    ) -> int:
        """Make shards part of a table, and others no longer, all or none, once per run and step.

        A run and step that the table holds already adds nothing, so a step
        that died after its commit may be run again.

        Args:
            table: name; the table is made when the lake has none.
            files: what `write_rows` returned, from any number of workers.
            run_id: the run; with `step` it names the commit.
            metadata: JSON values kept in the commit.
            step: 1, 2, ... for a run of several commits; a run's steps commit in order.
            turns: name -> number, as `turn` returned it: the commit fails when another of such a name came first.
            remove: committed shards that the new ones replace.
            holds: as `turns`, for turns of others: the commit fails when one was taken, and takes none.

        Returns:
            The version that holds the commit.

        Raises:
            LostTurnError: another commit of a turn's name came first, or a shard to be removed has been replaced.
            DataError: the table's schema cannot become the one that this code writes (`evolve`).
            StorageError: the place cannot be written, a shard is gone, or other writers won every attempt.
        """
        from deltalake.exceptions import CommitFailedError, DeltaError

        self.probe()
        head = str(audit.read_head(self.storage) or audit.Head())
        taken, held = dict(turns or {}), dict(holds or {})
        commit = Commit(table, list(files), list(remove), run_id, step, metadata or {}, taken, held, head)
        begun = time.monotonic()
        for attempt in range(COMMIT_ATTEMPTS):
            try:
                return self._publish(commit, first=attempt == 0)
            except CommitFailedError:
                time.sleep(random.uniform(0, 0.05) * 2 ** min(attempt, 5))
            except (DeltaError, OSError) as error:
                # What was lost may be the answer alone: then the next look finds the run's commit.
                if not s3.may_pass(error) or time.monotonic() - begun > s3.RETRY_BUDGET_S:
                    raise s3.table_error(error) from None
                time.sleep(random.uniform(0.1, 0.5))
        raise StorageError(f"table '{table}': other writers won {COMMIT_ATTEMPTS} attempts in a row; run again")

    def _publish(self, commit: Commit, first: bool) -> int:
        """Return the version of a commit, made now unless it was made before."""
        table = commit.table
        delta = self._open_or_make(table)
        version = commit.held(self.storage, delta)
        if version is not None:
            return version
        commit.check_turns(delta)
        commit.check_removed(delta)
        if first:
            commit.check_present(self.storage)
        commit.write(delta)
        # Others may have committed meanwhile, so ours is somewhere after the version that we started from.
        later = range(delta.version() + 1, self._open(table).version() + 1)
        version = log.find_commit(self.storage, table, later, {"commit": commit.commit_id})
        if version is None:
            raise StorageError(f"table '{table}': the commit cannot be found after it was made; run again")
        self.storage.persist(log.entry_name(table, version))
        return version

    def turn(self, table: str, name: str) -> int:
        """Return how many commits took a turn under this name; for `commit`, read before what the commit rests on."""
        return (self._open(table).transaction_version(name) or 0) if self.exists(table) else 0

    def probe(self) -> None:
        """Refuse, once per process, an S3 store on which two commits could overwrite each other.

        Raises:
            StorageError: the store ignores If-None-Match, or cannot be written.
        """
        if self.storage.is_s3:
            _probe_once(self.storage)

    def append(
        self, table: str, rows: pa.Table, run_id: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> int:
        """Write and commit rows of a small table; see `write_rows` and `commit`."""
        return self.commit(table, write_rows(self.storage, table, rows), run_id or uuid.uuid4().hex, metadata)

    def files(self, table: str, version: int | None = None, partitions: Filter | None = None) -> list[DataFile]:
        """Return the shards of a version, in a fixed order, without opening any.

        Where an erasure has since replaced a shard, its replacement stands for it: an old version is what it was, less
        what was erased.

        Args:
            table: name.
            version: the newest when absent.
            partitions: values of partition columns; other columns prune only where a shard's statistics
                say that all its rows share one other value.

        Raises:
            DataError: no such table or version.
        """
        return self._files(table, version, self.where(table, partitions or {}))

    def where(self, table: str, filter: Filter) -> dict[str, Any]:
        """Return a filter in which the name of a view has become what it stands for; see `memmc.lake.views`."""
        return expand(self, table, filter)

    def _files(self, table: str, version: int | None, partitions: Filter) -> list[DataFile]:
        delta = self._open(table, version)
        actions = _actions(table, delta)
        if version is not None:
            newest = {lineage_of(action["path"]): action for action in _actions(table, self._open(table))}
            actions = [newest.get(lineage_of(action["path"]), action) for action in actions]
        by = PARTITION_BY.get(table, ())
        where = {name: values(value) for name, value in partitions.items()}
        found: list[DataFile] = []
        for action in actions:
            partition = {name: action[f"partition.{name}"] for name in by}
            if action["num_records"] != 0 and all(
                _may_hold(action, partition, name, allowed) for name, allowed in where.items()
            ):
                found.append(
                    DataFile(f"{table}/{action['path']}", action["size_bytes"], action["num_records"], partition)
                )
        return sorted(found, key=lambda file: file.path)

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        version: int | None = None,
        filter: Filter | None = None,
    ) -> pa.Table:
        """Return rows of a table, page checksums verified.

        Args:
            table: name.
            columns: names; all but those of image size (`BULK_COLUMNS`) when absent.
            version: the newest when absent.
            filter: which rows; partition columns and a shard's single cohort or model spare whole shards.

        Raises:
            DataError: no such table, version or column.
            IntegrityError: a shard's bytes are not those that were written.
        """
        schema = schema_of(table)
        wanted = [name for name in schema.names if name not in BULK_COLUMNS] if columns is None else list(columns)
        where = self.where(table, filter or {})
        unknown = sorted({*wanted, *where} - set(schema.names))
        if unknown:
            raise DataError(f"table '{table}' has no columns {unknown}; its columns are {schema.names}")
        load = [*wanted, *(name for name in where if name not in wanted)]
        empty = pa.schema([schema.field(name) for name in load]).empty_table()

        def parts() -> list[pa.Table]:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                files = self._files(table, version, where)
                return list(
                    pool.map(lambda file: select_rows(read_file(self.storage, table, file, load), where), files)
                )

        try:
            found = again_when_absent(parts)
        except AbsentError:
            if version is None or version == self.version(table):
                raise
            raise DataError(
                f"table '{table}', version {version}: a vacuum has deleted shards that commits since have "
                "replaced; name a newer version"
            ) from None
        return pa.concat_tables([empty, *found]).select(wanted)

    def history(self, table: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the commits, newest first, as `memmc.lake.log.commits` describes them."""
        return log.commits(self.storage, table, self.version(table), limit)

    def instances_with_labels(
        self,
        columns: Sequence[str] | None = None,
        version: int | None = None,
        filter: Filter | None = None,
        labels_version: int | None = None,
    ) -> pa.Table:
        """Return `instances` rows whose label is the newest opinion in `labels`, else the ingested one.

        Arguments are those of `read`; a filter on ``label`` applies to the effective label.
        """
        schema = SCHEMAS[INSTANCES]
        wanted = [name for name in schema.names if name not in BULK_COLUMNS] if columns is None else list(columns)
        where = expand(self, INSTANCES, filter or {}, labels=True)
        label_filter = {"label": where.pop("label")} if "label" in where else {}
        load = [*wanted, *(name for name in ("cohort", "sop_instance_uid", "label") if name not in wanted)]
        rows = self.read(INSTANCES, load, version, where)
        newest = self._newest_labels(labels_version)
        if newest:
            names = ("cohort", "sop_instance_uid", "label")
            cohorts, uids, labels = (rows[name].to_pylist() for name in names)
            labels = [newest.get(key[:2], key[2]) for key in zip(cohorts, uids, labels, strict=True)]
            index = rows.column_names.index("label")
            rows = rows.set_column(index, schema.field("label"), pa.array(labels, pa.string()))
        return select_rows(rows, label_filter).select(wanted)

    def check_key_id(self, key_id: str, *, tie: bool = True) -> None:
        """Tie the lake to an identity key at first use, and refuse any other key afterwards.

        Args:
            key_id: a public name of the key (a digest), never the key.
            tie: False leaves a lake without a key as it is.

        Raises:
            IdentityKeyError: the lake was made with another key.
        """
        if tie and self.storage.create(IDENTITY_FILE, json.dumps({"key_id": key_id}).encode()):
            return
        found = self.key_id()
        if found != key_id and (tie or found is not None):
            raise IdentityKeyError(
                f"this lake was made with identity key {found}, the key given is {key_id}; "
                "give the lake's key (deid.key_file), or use another lake"
            )

    def key_id(self) -> str | None:
        """Return the public name of the lake's identity key, or None before its first use."""
        if not self.storage.exists(IDENTITY_FILE):
            return None
        try:
            return str(json.loads(self.storage.read(IDENTITY_FILE))["key_id"])
        except (ValueError, KeyError, TypeError):
            raise IdentityKeyError(f"{IDENTITY_FILE} of the lake is unreadable; restore it from a copy") from None

    def _newest_labels(self, version: int | None) -> dict[tuple[str, str], str]:
        if not self.exists(LABELS):
            return {}
        rows = self.read(LABELS, version=version)
        order = [(name, "ascending") for name in ("labelled_at", "source", "label")]
        return {(row["cohort"], row["sop_instance_uid"]): row["label"] for row in rows.sort_by(order).to_pylist()}

    def vacuum_table(self, table: str, hours: int, *, dry_run: bool, uncommitted: bool = True) -> list[str]:
        """Delete shards that no version of the last hours holds and that are older; `memmc.lake.vacuum` knows when.

        Args:
            uncommitted: those too that never were part of the table.

        Returns:
            Their names, relative to the table.
        """
        from deltalake.exceptions import DeltaError

        try:
            return self._open(table).vacuum(hours, dry_run=dry_run, enforce_retention_duration=False, full=uncommitted)
        except (DeltaError, OSError) as error:
            raise s3.table_error(error) from None

    def _open(self, table: str, version: int | None = None) -> DeltaTable:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        schema_of(table)
        options, begun = self.storage.delta_options(), time.monotonic()
        while True:
            try:
                return DeltaTable(self.storage.join(table), version=version, storage_options=options)
            except (DeltaError, OSError) as error:
                if s3.may_pass(error):
                    if time.monotonic() - begun > s3.RETRY_BUDGET_S:
                        raise s3.table_error(error) from None
                    time.sleep(random.uniform(0.1, 0.5))
                elif version is not None and self.exists(table):
                    raise DataError(
                        f"table '{table}' has no version {version}; its newest is {self.version(table)}, "
                        "and the log may no longer hold its oldest"
                    ) from None
                elif isinstance(error, TableNotFoundError):
                    raise DataError(f"the lake has no table '{table}' yet; ingest, calibrate or score first") from None
                else:
                    raise s3.table_error(error) from None

    def _open_or_make(self, table: str) -> DeltaTable:
        """Open a table for writing: made when absent, with every column that this code writes."""
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        if self.exists(table):
            delta = self._open(table)
            return self._open(table) if evolve(table, delta) else delta
        try:
            DeltaTable.create(
                self.storage.join(table),
                schema=SCHEMAS[table],
                partition_by=list(PARTITION_BY.get(table, ())),
                storage_options=self.storage.delta_options(),
            )
        except (DeltaError, OSError) as error:
            if not self.exists(table):  # else another writer made it first
                raise s3.table_error(error) from None
        return self._open(table)


@functools.cache
def _probe_once(storage: Storage) -> None:
    storage.probe_conditional_put()


def _actions(table: str, delta: DeltaTable) -> list[dict[str, Any]]:
    if "deletionVectors" in (delta.protocol().reader_features or ()):
        raise DataError(f"table '{table}' uses deletion vectors, which another tool switched on; rewrite it without")
    return pa.table(delta.get_add_actions(flatten=True)).to_pylist()


def _may_hold(action: Mapping[str, Any], partition: Mapping[str, str], name: str, allowed: list[Value]) -> bool:
    if name in partition:
        return partition[name] in allowed
    low, high = action.get(f"min.{name}"), action.get(f"max.{name}")
    return low is None or low != high or low in allowed
