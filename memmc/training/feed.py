"""Batches for one training worker, from shards through Ray Data.

A training set that fits in memory is read once and shuffled as a whole every epoch; a larger one is streamed every
epoch anew: the shards in an order drawn for the epoch, the rows within a window of 64 batches. Both orders follow from
(seed, epoch) alone (`order`), so a restart goes on with the image after the last one seen.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memmc.errors import IntegrityError, TrainingError
from memmc.lake.stream import pixels_to_array
from memmc.training.order import Indices, Position, streamed_rows, whole_shuffle

Array = npt.NDArray[np.unsignedinteger]

_WINDOW_BATCHES = 64
_AHEAD = 4
_LEAVE_S = 30.0


@dataclass(frozen=True)
class Batch:
    """Images as stored, and whose they are.

    Attributes:
        pixels: pixels_BHWC, unsigned integers.
        uids: the instances' keyed UIDs, in the same order; what a person looks a bad batch up by.
    """

    pixels: Array | Tensor
    uids: Sequence[str] = ()


class Feed(Protocol):
    """Where a worker's batches come from."""

    num_images: int

    def __call__(self, position: Position) -> Iterator[Batch]:
        """Yield this worker's batches from a position of the run on, without end."""
        ...


class CachedFeed:
    """The whole training set in the memory of each worker, so that every epoch is one uniform shuffle.

    Args:
        tables: Arrow tables with the columns `sop_instance_uid` and `PIXEL_COLUMNS`; together the training set.
        num_images: rows of all tables.
        batch_size: images per batch.
        seed: of the shuffle.
        rank: this worker.

    Raises:
        TrainingError: no images.
        IntegrityError: the tables hold another number of images.
    """

    def __init__(self, tables: Iterable[Any], num_images: int, batch_size: int, seed: int, rank: int) -> None:
        uids: list[str] = []
        images: Array | None = None
        for table in tables:
            if not table.num_rows:
                continue
            part = pixels_to_array(table)
            if images is None:
                images = np.empty((num_images, *part.shape[1:]), part.dtype)
            if len(uids) + len(part) <= num_images:
                images[len(uids) : len(uids) + len(part)] = part
            uids += table["sop_instance_uid"].to_pylist()
        if images is None:
            raise TrainingError("there is no training image; ingest normals first")
        _check_count(len(uids), num_images)
        # Tables come in any order; the stream is one over UIDs in order.
        self._by_uid: Indices = np.argsort(np.array(uids))
        self.images_NHWC, self._uids = images, uids
        self.num_images = num_images
        self._batch_size, self._seed, self._rank = batch_size, seed, rank

    def __call__(self, position: Position) -> Iterator[Batch]:
        """Yield this worker's batches from a position of the run on, without end."""
        workers = position.cuts[-1][1]
        start = position.images + self._rank * self._batch_size
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            places = np.arange(start, start + self._batch_size)
            rows = np.empty(self._batch_size, np.int64)
            for number in np.unique(places // self.num_images):
                if number != epoch:
                    epoch, order = int(number), self._by_uid[whole_shuffle(self.num_images, self._seed, int(number))]
                here = places // self.num_images == number
                rows[here] = order[places[here] % self.num_images]
            yield Batch(self.images_NHWC[rows], [self._uids[row] for row in rows])
            start += workers * self._batch_size


class StreamedFeed:
    """A worker's share of the images, read anew every epoch.

    Args:
        tables_of: streams the shards of the given numbers, in that order; Arrow tables as for `CachedFeed`.
        shard_rows: rows that each shard gives.
        batch_size: images per batch.
        seed: of the shuffle.
        rank: this worker.
    """

    def __init__(
        self,
        tables_of: Callable[[Sequence[int]], Iterable[Any]],
        shard_rows: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int,
    ) -> None:
        self._tables_of, self._shard_rows = tables_of, np.asarray(shard_rows, np.int64)
        self._batch_size, self._seed, self._rank = batch_size, seed, rank
        self.num_images = int(self._shard_rows.sum())

    def __call__(self, position: Position) -> Iterator[Batch]:
        """Yield this worker's batches from a position of the run on, without end."""
        if not self.num_images:
            raise TrainingError("there is no training image; ingest normals first")
        return _prefetched(self._batches(position))

    def _batches(self, position: Position) -> Generator[Batch]:
        pixels: list[Array] = []
        uids: list[str] = []
        for image, uid in self._images(position):
            pixels.append(image)
            uids.append(uid)
            if len(uids) == self._batch_size:
                yield Batch(np.stack(pixels), uids)
                pixels, uids = [], []

    def _images(self, position: Position) -> Iterator[tuple[Array, str]]:
        epoch = position.images // self.num_images
        while True:
            window = _WINDOW_BATCHES * self._batch_size
            order = streamed_rows(self.num_images, epoch, position, self._batch_size, self._rank, window, self._seed)
            yield from self._in_order(epoch, order)
            epoch += 1

    def _in_order(self, epoch: int, order: Indices) -> Iterator[tuple[Array, str]]:
        """Read the shards that hold the rows, once and in the epoch's order; hold back what is not due yet."""
        shards = np.random.default_rng((self._seed, epoch, 0)).permutation(len(self._shard_rows))
        ends = np.cumsum(self._shard_rows[shards])
        wanted = np.sort(order)
        touched = np.unique(np.searchsorted(ends, wanted, side="right"))
        # Row numbers, within the epoch, of what the touched shards give.
        spans = [np.arange(int(ends[k] - self._shard_rows[shards[k]]), int(ends[k])) for k in touched]
        coming = np.concatenate(spans or [np.empty(0, np.int64)])
        mine = np.isin(coming, wanted, assume_unique=True)
        held: dict[int, tuple[Array, str]] = {}
        done, read = 0, 0
        for table in self._tables_of([int(shards[k]) for k in touched]):
            if read + table.num_rows > len(coming):
                break
            pixels, uids = pixels_to_array(table), table["sop_instance_uid"].to_pylist()
            for place in np.flatnonzero(mine[read : read + table.num_rows]):
                held[int(coming[read + place])] = (pixels[place], uids[place])
            read += table.num_rows
            while done < len(order) and (row := int(order[done])) in held:
                done += 1
                yield held.pop(row)
        _check_count(done, len(order))


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise IntegrityError(f"the shards gave {found} training images, expected {expected}; run `memmc train` again")


class PinnedFeed:
    """Another feed's batches in page-locked memory, put there ahead of time, for a copy to the GPU beside the step."""

    def __init__(self, feed: Feed) -> None:
        self._feed, self.num_images = feed, feed.num_images

    def __call__(self, position: Position) -> Iterator[Batch]:
        """Yield this worker's batches from a position of the run on, without end."""
        return _prefetched(
            Batch(torch.from_numpy(np.ascontiguousarray(batch.pixels)).pin_memory(), batch.uids)
            for batch in self._feed(position)
        )


def _prefetched(batches: Iterator[Batch]) -> Generator[Batch]:
    """Yield the batches, made up to four ahead by a thread that ends with the generator."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    over = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not over.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if over.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the batches are taken
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="feed")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        # A reader that outlived its cluster would make Ray start another.
        over.set()
        thread.join(_LEAVE_S)
