"""Each image once an epoch, whatever dies in between; batches are what was stored; a silent worker ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake_rows import instance_rows

from memmc.errors import IntegrityError, TrainingError
from memmc.lake.stream import PIXEL_COLUMNS, read_rows
from memmc.lake.tables import Lake
from memmc.training.feed import Batch, CachedFeed, Feed, StreamedFeed
from memmc.training.order import Position, whole_shuffle, window_shuffle
from memmc.training.source import _count
from memmc.training.watchdog import Watchdog

SIDE = 4


def rows(numbers: Sequence[int]) -> pa.Table:
    """Images whose pixels tell their number."""
    pixels = [np.full((SIDE, SIDE), number, "<u2").tobytes() for number in numbers]
    shape = {name: pa.array([value] * len(numbers), pa.int32()) for name, value in
             {"height": SIDE, "width": SIDE, "channels": 1, "bits": 16}.items()}  # fmt: skip
    uids = [f"2.25.{number}" for number in numbers]
    return pa.table({"sop_instance_uid": uids, "pixels": pa.array(pixels, pa.binary()), **shape})


def shards(sizes: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def cached(sizes: Sequence[int], batch_size: int, rank: int, seed: int = 0) -> Feed:
    return CachedFeed(map(rows, shards(sizes)), sum(sizes), batch_size, seed, rank)


def streamed(sizes: Sequence[int], batch_size: int, rank: int, seed: int = 0) -> Feed:
    parts = shards(sizes)

    def tables(numbers: Sequence[int]) -> Iterator[pa.Table]:
        for number in numbers:
            half = len(parts[number]) // 2
            yield rows(parts[number][:half])
            yield rows(parts[number][half:])

    return StreamedFeed(tables, sizes, batch_size, seed, rank)


def seen(make, sizes, batch_size, attempts: Sequence[tuple[int, int]], *, forget_cuts: bool = False) -> list[int]:
    """Numbers of the images all workers saw, over attempts of (workers, steps), in order of steps."""
    position = Position(0, ((0, attempts[0][0]),))
    numbers: list[int] = []
    for workers, steps in attempts:
        position = position.shared_by(workers)
        if forget_cuts:
            position = Position(position.images, ((0, workers),))
        streams = [make(sizes, batch_size, rank)(position) for rank in range(workers)]
        for _ in range(steps):
            for stream in streams:
                batch = next(stream)
                assert [f"2.25.{number}" for number in batch.pixels[:, 0, 0, 0]] == list(batch.uids)
                numbers += batch.pixels[:, 0, 0, 0].tolist()
        position = Position(position.images + steps * workers * batch_size, position.cuts)
        for stream in streams:
            stream.close()
    return numbers


def once_an_epoch(numbers: list[int], num_images: int) -> bool:
    epochs = [numbers[start : start + num_images] for start in range(0, len(numbers), num_images)]
    return all(len(set(epoch)) == len(epoch) for epoch in epochs)


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)
ATTEMPTS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=4)


@pytest.mark.parametrize("make", [cached, streamed])
@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 4), attempts=ATTEMPTS)
def test_every_image_once_an_epoch_across_restarts_with_other_numbers_of_workers(make, sizes, batch_size, attempts):
    assert once_an_epoch(seen(make, sizes, batch_size, attempts), sum(sizes))


def test_a_restart_that_forgets_its_cuts_sees_images_twice() -> None:
    """The negative control of the test above."""
    attempts = [(2, 3), (1, 3), (3, 2)]
    assert once_an_epoch(seen(streamed, [10, 10, 10], 2, attempts), 30)
    assert not once_an_epoch(seen(streamed, [10, 10, 10], 2, attempts, forget_cuts=True), 30)


@pytest.mark.parametrize("make", [cached, streamed])
def test_a_restart_goes_on_with_the_batches_an_unbroken_run_has(make) -> None:
    whole = seen(make, [7, 5, 8], 2, [(2, 12)])
    assert seen(make, [7, 5, 8], 2, [(2, 5), (2, 4), (2, 3)]) == whole
    assert whole[:20] != whole[20:40], "epochs are shuffled alike"


def test_the_cached_order_is_the_same_for_any_number_of_workers_and_order_of_tables() -> None:
    assert seen(cached, [6, 6], 1, [(4, 3)]) == seen(cached, [6, 6], 2, [(2, 3)])
    turned = CachedFeed(map(rows, reversed(shards([6, 6]))), 12, 3, 0, 0)
    position = Position(0, ((0, 1),))
    for one, other in itertools.islice(zip(turned(position), cached([6, 6], 3, 0)(position), strict=False), 8):
        assert one.uids == other.uids


def test_shuffles_are_seeded_and_as_wide_as_they_say() -> None:
    assert sorted(whole_shuffle(50, 1, 2)) == list(range(50))
    assert (whole_shuffle(50, 1, 2) == whole_shuffle(50, 1, 2)).all()
    assert (whole_shuffle(50, 1, 2) != whole_shuffle(50, 1, 3)).any()
    order = window_shuffle(np.arange(2000), 100, (0,))
    moved = np.abs(order - np.arange(2000))
    assert sorted(order) == list(range(2000))
    assert 40 < moved.max() < 100


def test_shards_that_give_other_rows_than_counted_are_refused() -> None:
    with pytest.raises(IntegrityError, match="gave 6 training images, expected 7"):
        CachedFeed(map(rows, shards([3, 3])), 7, 2, 0, 0)
    with pytest.raises(TrainingError, match="no training image"):
        CachedFeed([], 0, 2, 0, 0)
    short = StreamedFeed(lambda _: iter([rows([0, 1])]), [3], 1, 0, 0)
    with pytest.raises(IntegrityError, match="expected 3"):
        list(itertools.islice(short(Position(0, ((0, 1),))), 4))


def test_an_error_of_the_reader_comes_out_and_its_thread_ends() -> None:
    def broken(_: Sequence[int]) -> Iterator[pa.Table]:
        yield rows([0, 1])
        raise IntegrityError("shard is not what was written")

    with pytest.raises(IntegrityError, match="not what was written"):
        for batch in StreamedFeed(broken, [2, 2], 2, 0, 0)(Position(0, ((0, 1),))):
            assert isinstance(batch, Batch)
    stream = streamed([4], 1, 0)(Position(0, ((0, 1),)))
    next(stream)
    stream.close()
    assert not any(thread.name == "feed" for thread in threading.enumerate())


def test_watchdog_barks_at_silence_alone() -> None:
    silent, beaten, unborn = (threading.Event() for _ in range(3))
    dogs = [Watchdog(0.2, event.set) for event in (silent, beaten, unborn)]
    with dogs[0].guarding() as one, dogs[1].guarding() as other, dogs[2].guarding():
        one.beat()
        other.beat()
        with other.away():
            time.sleep(0.3)
        for _ in range(10):
            time.sleep(0.03)
            other.beat()
    assert silent.is_set()
    assert not beaten.is_set()
    assert not unborn.is_set(), "the first step may take as long as it takes"


def test_real_shards_are_counted_and_streamed_in_their_order(tmp_path) -> None:
    """The rows that have a key, of every shard of a lake, through the reader that the read tasks use."""
    lake = Lake(tmp_path)
    for start in (0, 12, 24):
        lake.append("instances", instance_rows(start, 12))
    files = lake.files("instances", None, {"outcome": "stored"})
    stored = [key for row in lake.read("instances", ["object_key", "outcome"], filter={"outcome": "stored"}).to_pylist()
              if (key := row["object_key"])]  # fmt: skip
    keys = pa.array(stored[:-1])
    counts = [_count(lake.storage, "instances", file, keys) for file in files]
    assert sum(counts) == len(stored) - 1
    columns = ("sop_instance_uid", *PIXEL_COLUMNS)

    def tables(numbers: Sequence[int]) -> Iterator[pa.Table]:
        for number in numbers:
            yield from read_rows(lake.storage, "instances", files[number], columns, keys=keys)

    stream = StreamedFeed(tables, counts, 1, 0, 0)(Position(0, ((0, 1),)))
    batches = list(itertools.islice(stream, len(keys)))
    assert len({batch.uids[0] for batch in batches}) == len(keys)
    assert all(batch.pixels.shape == (1, 4, 4, 1) for batch in batches)
    assert all(int(batch.uids[0].removeprefix("uid")) % 256 == batch.pixels[0, 0, 0, 0] for batch in batches)
    stream.close()
