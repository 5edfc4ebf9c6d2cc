"""The training images of one pinned table version, for every worker to read its part of through Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memmc.config import TrainConfig
from memmc.lake.files import DataFile
from memmc.lake.storage import Storage
from memmc.lake.stream import KEY_COLUMN, PIXEL_COLUMNS, read_rows, stream
from memmc.training.feed import CachedFeed, Feed, StreamedFeed

_COLUMNS = ("sop_instance_uid", *PIXEL_COLUMNS)
_AHEAD_BLOCKS = 2


@dataclass(frozen=True)
class ShardSource:
    """Where the images lie; travels to the workers, the images do not.

    Attributes:
        storage: of the lake.
        table: the table that the shards belong to.
        files: the shards.
        keys: reference to the `object_key`s of the training images, an Arrow array.
        num_images: their number.
        shard_rows: how many of them each shard holds; None when every worker keeps all images in memory.
    """

    storage: Storage
    table: str
    files: tuple[DataFile, ...]
    keys: Any
    num_images: int
    shard_rows: tuple[int, ...] | None

    @classmethod
    def open(
        cls, ray: Any, storage: Storage, table: str, files: Sequence[DataFile], keys: Sequence[str], *, cached: bool
    ) -> ShardSource:
        """Describe a training set on a connected cluster.

        Args:
            cached: every worker shall keep all images in memory; else the rows of each shard are counted, in parallel.
        """
        wanted = ray.put(pa.array(keys, pa.string()))
        rows: tuple[int, ...] | None = None
        if not cached:
            count = ray.remote(num_cpus=1)(_count)
            rows = tuple(ray.get([count.remote(storage, table, file, wanted) for file in files]))
        return cls(storage, table, tuple(files), wanted, len(keys), rows)

    def feed(self, config: TrainConfig, rank: int) -> Feed:
        """Return a worker's batches; reads the whole set at once when it is to be kept in memory."""
        if self.shard_rows is None:
            return CachedFeed(self.tables(), self.num_images, config.batch_size, config.seed, rank)
        return StreamedFeed(self.tables, self.shard_rows, config.batch_size, config.seed, rank)

    def tables(self, numbers: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """Yield the images of the shards with these numbers, of all when None, in this order, as Arrow tables."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.use_datasource_v2 = False
        files = self.files if numbers is None else [self.files[number] for number in numbers]
        if not files:
            return
        dataset = stream(self.storage, files, _COLUMNS, parallelism=len(files), table=self.table, keys=self.keys)
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_AHEAD_BLOCKS)


def _count(storage: Storage, table: str, file: DataFile, keys: pa.Array) -> int:
    """Return how many rows of a shard have one of the keys."""
    options = pc.SetLookupOptions(value_set=keys)
    parts = read_rows(storage, table, file, [KEY_COLUMN])
    return sum(part.filter(pc.call_function("is_in", [part[KEY_COLUMN]], options)).num_rows for part in parts)
