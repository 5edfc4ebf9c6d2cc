"""Which instances a model and calibration have scored, and the only way scores are committed: each instance once.

Runs of one cohort, model and calibration commit in turns. One that finds that
another has committed since it looked drops, before its own commit, the rows that
the other has scored. So any number of runs at once, each killed anywhere, leave
one score per instance: a row is either part of a commit or of nothing. In the same
way a row of an instance that was erased meanwhile is dropped: an erasure takes a
turn after the instances are gone, which every commit here holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from memmc.errors import StorageError
from memmc.lake.commit import LostTurnError
from memmc.lake.erasure import TURN as ERASURE
from memmc.lake.files import DataFile, read_file, select_rows
from memmc.lake.schemas import INSTANCES, SCORES
from memmc.lake.shards import ShardFile, read_shard, write_shard
from memmc.lake.tables import Lake
from memmc.pipeline.settle import turn_name

ROUNDS = 12  # of dropping anew because another run committed first


@dataclass(frozen=True)
class Committed:
    """What one commit added: rows with a score, flagged ones among them, rows without one."""

    version: int
    scored: int = 0
    abnormal: int = 0
    not_scored: int = 0


class ScoreLedger:
    """The keys of all rows of one cohort, model and calibration; grows with the table, holds nothing but keys."""

    def __init__(self, lake: Lake, cohort: str, model_digest: str, calibration_id: str) -> None:
        self.scored: set[str] = set()
        self.not_scored: set[str] = set()
        self._abnormal: set[str] = set()
        self._lake = lake
        self._where = {"cohort": cohort, "model_digest": model_digest, "calibration_id": calibration_id}
        self._turn_name = f"score {cohort} {model_digest} {calibration_id}"
        self._instances_turn = lake.turn(INSTANCES, turn_name(cohort))  # before any plan is made of them
        self._present: set[str] | None = None
        self._turn = -1
        self._seen: set[str] = set()
        self.refresh()

    @property
    def abnormal(self) -> int:
        """Number of instances scored as abnormal."""
        return len(self._abnormal)

    def abnormal_among(self, uids: Collection[str] | None) -> int:
        """Return how many of the instances are scored as abnormal; of all when None."""
        return len(self._abnormal if uids is None else self._abnormal.intersection(uids))

    def refresh(self) -> bool:
        """Read what has been committed since; return whether another run committed."""
        turn = self._lake.turn(SCORES, self._turn_name)
        if turn == self._turn:
            return False
        self._turn = turn  # read before the rows: a commit between the two is met again at the next turn
        if turn == 0 and not self._lake.exists(SCORES):
            return False
        for file in self._lake.files(SCORES, None, {"cohort": self._where["cohort"]}):
            if file.path not in self._seen:
                self._seen.add(file.path)
                self._add(self._rows_of(file))
        return True

    def known(self, without_score: bool = False) -> pa.Array:
        """Return the SOP Instance UIDs that have a score; those that have a row of any kind `without_score`."""
        keys = self.scored | self.not_scored if without_score else self.scored
        return pa.array(sorted(keys), pa.string())

    def commit(self, shards: Iterable[ShardFile], run: str, step: int) -> Committed | None:
        """Commit shards of this run, less the rows that other runs have committed; None where nothing is left.

        Rows of instances that have left the cohort since the ledger was opened are dropped too.

        Args:
            shards: written, not yet committed.
            run: the run; it commits its steps in order.
            step: 1, 2, ...

        Raises:
            StorageError: the place cannot be written, or other runs won every round.
        """
        kept = list(shards)
        for _ in range(ROUNDS):
            self.refresh()
            erasures = self._lake.turn(SCORES, ERASURE)  # read before the instances: a later erasure fails the commit
            self._look_who_is_left()
            kept = [file for file in (self._without_known(shard) for shard in kept) if file is not None]
            if not kept:
                return None
            try:
                version = self._lake.commit(
                    SCORES, kept, run, step=step, turns={self._turn_name: self._turn}, holds={ERASURE: erasures}
                )
            except LostTurnError:
                continue
            self._turn += 1
            before = (len(self.scored), self.abnormal, len(self.not_scored))
            for file in kept:
                self._seen.add(file.path)
                self._add(self._keys_of(file))
            return Committed(
                version,
                len(self.scored) - before[0],
                self.abnormal - before[1],
                len(self.not_scored) - before[2],
            )
        raise StorageError(f"other runs won {ROUNDS} commits of scores in a row; run `memmc score` again")

    def _look_who_is_left(self) -> None:
        """Read the cohort's instances anew where an ingest or an erasure has committed."""
        turn = self._lake.turn(INSTANCES, turn_name(self._where["cohort"]))
        if turn != self._instances_turn:
            self._instances_turn = turn
            rows = self._lake.read(INSTANCES, ["sop_instance_uid"], filter={"cohort": self._where["cohort"]})
            self._present = set(rows["sop_instance_uid"].to_pylist())

    def _add(self, rows: pa.Table) -> None:
        uids, reasons, flags = (rows[name].to_pylist() for name in ("sop_instance_uid", "not_scored", "is_abnormal"))
        for uid, reason, abnormal in zip(uids, reasons, flags, strict=True):
            if reason is not None:
                self.not_scored.add(uid)
            elif uid not in self.scored:  # a compacted shard brings rows that are known
                self.scored.add(uid)
                if abnormal:
                    self._abnormal.add(uid)

    def _rows_of(self, file: DataFile) -> pa.Table:
        columns = ["sop_instance_uid", "not_scored", "is_abnormal", *self._where]
        return select_rows(read_file(self._lake.storage, SCORES, file, columns), self._where)

    def _keys_of(self, shard: ShardFile) -> pa.Table:
        return read_shard(self._lake.storage, shard.path, ["sop_instance_uid", "not_scored", "is_abnormal"])

    def _without_known(self, shard: ShardFile) -> ShardFile | None:
        """Return the shard as it is, or anew without the rows that are known or erased, or None without any left."""
        keys = self._keys_of(shard)
        known = [
            (self._present is not None and uid not in self._present)
            or uid in self.scored
            or (reason is not None and uid in self.not_scored)
            for uid, reason in zip(keys["sop_instance_uid"].to_pylist(), keys["not_scored"].to_pylist(), strict=True)
        ]
        if not any(known):
            return shard
        rows = read_shard(self._lake.storage, shard.path)
        self._lake.storage.delete(shard.path)
        left = rows.filter(pc.call_function("invert", [pa.array(known, pa.bool_())]))
        return write_shard(self._lake.storage, SCORES, left) if left.num_rows else None
