"""Which image of an epoch is seen when, and by which worker: arithmetic alone, so that a restart can repeat it.

A run is one endless stream of images, one epoch after the other: the image at position `p` belongs to epoch
`p // num_images`, and a batch may end one epoch and begin the next, so that each image is seen exactly once an epoch.
From a cut on, batches of the stream go to the workers in turn; a restart with another number of workers makes a cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Position:
    """Where in the stream a run stands.

    Attributes:
        images: images seen by all workers, hence the position of the next one.
        cuts: (position, workers) pairs, ascending: from that position on so many workers share the stream.
    """

    images: int
    cuts: tuple[tuple[int, int], ...]

    def shared_by(self, workers: int) -> Position:
        """Return this position with a new cut where the number of workers has changed."""
        if self.cuts and self.cuts[-1][1] == workers:
            return self
        return Position(self.images, (*self.cuts, (self.images, workers)))


def fallen_to(cut: tuple[int, int], low: int, high: int, batch_size: int) -> Indices:
    """Return how many of the positions low..high-1 each worker gets when batches go round from the cut on."""
    start, workers = cut

    def before(position: int) -> Indices:
        rounds, rest = divmod(position - start, batch_size * workers)
        return rounds * batch_size + np.clip(rest - batch_size * np.arange(workers, dtype=np.int64), 0, batch_size)

    return before(high) - before(low)


def whole_shuffle(num_images: int, seed: int, epoch: int) -> Indices:
    """Return a uniform permutation of the epoch's images, the same for any number of workers."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def window_shuffle(rows: Indices, window: int, seed: tuple[int, ...]) -> Indices:
    """Return the rows, each moved by less than `window` places: sorted by place + uniform(0, window)."""
    keys = np.arange(len(rows)) + np.random.default_rng(seed).uniform(0, window, len(rows))
    return rows[np.argsort(keys, kind="stable")]


def streamed_rows(
    num_images: int, epoch: int, position: Position, batch_size: int, rank: int, window: int, seed: int
) -> Indices:
    """Return the rows of an epoch's shard sequence that are left for a worker, in the order it sees them.

    Each worker gets a run of rows of its own, shuffled within a window; what earlier cuts have seen is taken out and
    the rest shared anew, so that no row is seen twice in an epoch however often the number of workers changes.

    Args:
        num_images: rows of an epoch.
        epoch: number of the epoch.
        position: of the run; rows before it are left out.
        batch_size: images per worker and batch.
        rank: the worker, of those of the last cut.
        window: bound of the shuffle, rows.
        seed: of the run.
    """
    begin, end = epoch * num_images, (epoch + 1) * num_images
    left = np.arange(num_images, dtype=np.int64)
    stops = [start for start, _ in position.cuts[1:]]
    for cut, stop in zip(position.cuts, [*stops, None], strict=True):
        if stop is not None and stop <= begin:
            continue
        low = max(cut[0], begin)
        parts = np.split(left, np.cumsum(fallen_to(cut, low, end, batch_size))[:-1])
        orders = [window_shuffle(part, window, (seed, epoch, low, number)) for number, part in enumerate(parts)]
        if stop is None:
            seen = fallen_to(cut, low, max(position.images, low), batch_size)
            return orders[rank][seen[rank] :]
        seen = fallen_to(cut, low, stop, batch_size)
        left = np.sort(np.concatenate([order[count:] for order, count in zip(orders, seen, strict=True)]))
    raise AssertionError("a position has at least one cut")
