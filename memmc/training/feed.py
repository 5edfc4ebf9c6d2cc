"""Batches for one training worker, from a stream of shard rows.

A worker whose share fits in memory reads it once and shuffles all of it every
epoch; one whose share does not streams every epoch again through a shuffling
window. Both are seeded by epoch. In the first mode the share is settled by the
instances' keyed UIDs, so it depends on neither timing nor file order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from memmc.errors import TrainingError
from memmc.lake.stream import pixels_to_array

Pixels = npt.NDArray[np.unsignedinteger]

_READ_ROWS = 1024
_WINDOW_BATCHES = 64


class CachedFeed:
    """A worker's share of the images, held in memory.

    Args:
        tables: Arrow tables with the columns `sop_instance_uid` and `pixels`; together the whole training set.
        batch_size: images per batch.
        seed: of the shuffle.
        rank: this worker.
        world_size: all workers.

    Raises:
        TrainingError: no image falls to this worker.
    """

    def __init__(self, tables: Iterable[Any], batch_size: int, seed: int, rank: int, world_size: int) -> None:
        uids: list[str] = []
        parts: list[Pixels] = []
        for table in tables:
            names = table["sop_instance_uid"].to_pylist()
            mine = np.array([share_of(name, world_size) == rank for name in names])
            uids += [name for name, keep in zip(names, mine, strict=True) if keep]
            parts.append(pixels_to_array(table)[mine])
        if not uids:
            raise TrainingError("a worker got no image; lower train.num_workers or ingest more normals")
        self.images_NHWC: Pixels = np.concatenate(parts)[np.argsort(uids)]
        self._batch_size = min(batch_size, len(uids))
        self._seed = (seed, rank)

    def __call__(self, epoch: int) -> Iterator[Pixels]:
        """Yield the epoch's batches, (B, H, W, C); a last, smaller batch is left for the next epoch's shuffle."""
        order = np.random.default_rng((*self._seed, epoch)).permutation(len(self.images_NHWC))
        for start in range(0, len(order) - self._batch_size + 1, self._batch_size):
            yield self.images_NHWC[np.sort(order[start : start + self._batch_size])]


class StreamedFeed:
    """A worker's share of the images, read anew every epoch.

    Args:
        tables_of: makes one pass over this worker's share; takes (rows, window_rows, seed).
        batch_size: images per batch.
        seed: of the shuffle.
    """

    def __init__(self, tables_of: Callable[[int, int, int], Iterable[Any]], batch_size: int, seed: int) -> None:
        self._tables_of, self._batch_size, self._seed = tables_of, batch_size, seed

    def __call__(self, epoch: int) -> Iterator[Pixels]:
        """Yield the epoch's batches, (B, H, W, C), shuffled within a window of 64 batches."""
        for table in self._tables_of(self._batch_size, _WINDOW_BATCHES * self._batch_size, self._seed + epoch):
            yield pixels_to_array(table)


def share_of(sop_instance_uid: str, world_size: int) -> int:
    """Return the worker an instance falls to; keyed UIDs (2.25.<integer>) are as good as random."""
    return int(sop_instance_uid.rsplit(".", 1)[-1]) % world_size
