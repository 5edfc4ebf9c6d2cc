"""One commit to a table: what it adds and removes, whose it is, and what must not have happened meanwhile."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memmc.errors import DataError, StorageError
from memmc.lake import log
from memmc.lake.files import DataFile
from memmc.lake.schemas import PARTITION_BY, schema_of
from memmc.lake.shards import ShardFile
from memmc.lake.storage import Storage

if TYPE_CHECKING:
    from deltalake import DeltaTable

CHECK_THREADS = 8


class LostTurnError(StorageError):
    """Another writer of the same name committed first; read its commit and try again."""


@dataclass(frozen=True)
class Commit:
    """What `memmc.lake.tables.Lake.commit` tries to make part of a table; its arguments are described there.

    Attributes:
        audit_head: the end of the audit trail before it.
        commit_id: names this very commit, where `run_id` and `step` name all that try to be it.
    """

    table: str
    added: Sequence[ShardFile]
    removed: Sequence[DataFile]
    run_id: str
    step: int
    metadata: Mapping[str, Any]
    turns: Mapping[str, int]
    holds: Mapping[str, int]
    audit_head: str
    commit_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def held(self, storage: Storage, delta: DeltaTable) -> int | None:
        """Return the version in which the table holds this run and step already, None where it does not."""
        if (delta.transaction_version(self.run_id) or 0) < self.step:
            return None
        newest = delta.version()
        marks = {"run": self.run_id, "step": str(self.step)}
        found = log.find_commit(storage, self.table, range(newest, -1, -1), marks)
        return newest if found is None else found

    def check_turns(self, delta: DeltaTable) -> None:
        """Refuse to follow a commit that took a turn.

        Raises:
            LostTurnError: there is one.
        """
        expected = {**self.turns, **self.holds}
        if any((delta.transaction_version(name) or 0) != number for name, number in expected.items()):
            raise LostTurnError(f"table '{self.table}': another run committed first; run again")

    def check_removed(self, delta: DeltaTable) -> None:
        """Refuse to replace what has been replaced: the rows would stand twice.

        Raises:
            LostTurnError: a shard to be removed is no longer part of the table.
        """
        if self.removed:
            there = {f"{self.table}/{path}" for path in pa.table(delta.get_add_actions())["path"].to_pylist()}
            if not there.issuperset(file.path for file in self.removed):
                raise LostTurnError(f"table '{self.table}': another run has replaced the same shards; run again")

    def check_present(self, storage: Storage) -> None:
        """Refuse to publish what is not there: a vacuum may have met a run that slept longer than its lease.

        Raises:
            StorageError: a shard is gone.
        """
        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            absent = sum(not there for there in pool.map(lambda file: storage.exists(file.path), self.added))
        if absent:
            raise StorageError(f"{absent} of {len(self.added)} shards to be committed are gone; run again: nothing was")

    def write(self, delta: DeltaTable) -> None:
        """Commit on top of the version that `delta` has read.

        Raises:
            deltalake.exceptions.CommitFailedError: another commit that this one may not follow came first.
        """
        from deltalake import CommitProperties, PostCommitHookProperties, Transaction

        # A turn that is held is written as it is, so that taking it meanwhile conflicts.
        numbers = {self.run_id: self.step, **{name: turn + 1 for name, turn in self.turns.items()}, **self.holds}
        delta.create_write_transaction(
            [*map(self._add_action, self.added), *map(self._remove_action, self.removed)],
            mode="append",
            schema=schema_of(self.table),
            partition_by=list(PARTITION_BY.get(self.table, ())),
            commit_properties=CommitProperties(
                custom_metadata={
                    "run": self.run_id,
                    "step": str(self.step),
                    "commit": self.commit_id,
                    "metadata": json.dumps(self.metadata),
                    "audit": self.audit_head,
                },
                app_transactions=[Transaction(name, number) for name, number in numbers.items()],
            ),
            # By default entries of the log older than a month go, and with them the versions models name.
            post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
        )

    def _add_action(self, file: ShardFile) -> Any:
        from deltalake.transaction import AddAction

        if not file.path.startswith(f"{self.table}/"):
            raise DataError(f"a shard written for another table cannot be committed to '{self.table}'")
        return AddAction(
            path=file.path.removeprefix(f"{self.table}/"),
            size=file.size,
            partition_values=dict(file.partition),
            modification_time=time.time_ns() // 1_000_000,
            data_change=True,
            stats=file.stats,
        )

    def _remove_action(self, file: DataFile) -> Any:
        from deltalake.transaction import RemoveAction

        return RemoveAction(
            path=file.path.removeprefix(f"{self.table}/"),
            data_change=True,
            deletion_timestamp=time.time_ns() // 1_000_000,
            partition_values=dict(file.partition),
            size=file.size,
        )
