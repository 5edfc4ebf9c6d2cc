"""Shards to Ray Data blocks, and pixel columns to arrays.

Ray's own Parquet reader cannot verify page checksums, so our read task opens
each shard. Shape legend: B instances, H rows, W columns, C channels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memmc.errors import DataError, IntegrityError
from memmc.lake.evolution import optional_columns
from memmc.lake.files import DataFile, Filter, select_rows, with_partition
from memmc.lake.schemas import INSTANCES, schema_of
from memmc.lake.shards import iter_shard
from memmc.lake.storage import Storage

if TYPE_CHECKING:
    import ray
    from ray.data import Dataset

PIXEL_COLUMNS = ("pixels", "height", "width", "channels", "bits")
KEY_COLUMN = "object_key"
SMALL_BLOCK = 2 << 20  # bytes; for readers that judge some images at a time: 256 of 64 px


def stream(
    storage: Storage,
    files: Sequence[DataFile],
    columns: Sequence[str],
    parallelism: int = 2,
    *,
    table: str = INSTANCES,
    filter: Filter | None = None,
    keys: Sequence[str] | ray.ObjectRef[Any] | None = None,
    shuffle_seed: int | None = None,
    at_once: int = 2,
    block_bytes: int | None = None,
) -> Dataset:
    """Return the rows of committed shards as a lazy Ray dataset, every byte verified.

    Reading holds no CPU of the cluster: whoever reads, a training worker or a pool of actors, may hold all of them and
    would wait for one without end. For another reason too: Ray fuses steps of equal needs, and a step that takes rows
    by the batch would be fed as many *shards* by one task.

    Args:
        storage: the lake's storage.
        files: shards of a pinned version (`Lake.files`).
        columns: columns of the dataset, in this order; partition columns included where named.
        parallelism: read tasks; at most one per shard.
        table: the table that the shards belong to.
        filter: which rows to keep.
        keys: `object_key`s to keep, or a reference to them as an Arrow array; rows of other keys are dropped.
        shuffle_seed: permutes the shards, the same way for the same seed; None keeps their order.
        at_once: shards read at the same time.
        block_bytes: about the size of a block; Ray's own when None.

    Raises:
        DataError: no shards, or an unknown column.
        IntegrityError: raised while the dataset is read; the shard is named.
    """
    import ray
    import ray.data

    schema = schema_of(table)
    unknown = sorted({*columns, *(filter or {})} - set(schema.names))
    if unknown or not columns:
        raise DataError(f"table '{table}' has no columns {unknown}; its columns are {schema.names}")
    if not files:
        raise DataError("no shards to stream; ingest instances first, or widen the filter")
    ordered = list(files)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(ordered)
    items = [
        {"path": file.path, "size": file.size, "num_rows": file.num_rows, "partition": json.dumps(dict(file.partition))}
        for file in ordered
    ]
    wanted = keys if keys is None or isinstance(keys, ray.ObjectRef) else ray.put(pa.array(keys, pa.string()))
    dataset = ray.data.from_items(items, override_num_blocks=max(1, min(parallelism, len(items))))
    task: Any = _read_task  # Ray's type of a batch function knows no further arguments
    if block_bytes is not None:
        dataset.context.target_max_block_size = block_bytes
    return dataset.map_batches(
        task,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_args=(storage, table, list(columns), dict(filter or {}), wanted),
        compute=ray.data.TaskPoolStrategy(size=at_once),
        num_cpus=0,
    )


def _read_task(
    items: pa.Table, storage: Storage, table: str, columns: list[str], where: Filter, keys: Any
) -> Iterator[pa.Table]:
    """Yield the wanted rows of the shards that one batch of descriptors names, a row group at a time."""
    wanted: pa.Array | None = None
    if keys is not None:
        import ray

        wanted = ray.get(keys)
    for item in items.to_pylist():
        file = DataFile(item["path"], item["size"], item["num_rows"], json.loads(item["partition"]))
        yield from read_rows(storage, table, file, columns, where, wanted)


def read_rows(
    storage: Storage,
    table: str,
    file: DataFile,
    columns: Sequence[str],
    filter: Filter | None = None,
    keys: pa.Array | None = None,
) -> Iterator[pa.Table]:
    """Yield the wanted rows of one committed shard, a row group at a time; needs no Ray."""
    where = dict(filter or {})
    extra = [*where, *([KEY_COLUMN] if keys is not None else [])]
    load = list(dict.fromkeys([*columns, *extra]))
    stored = [name for name in load if name not in file.partition]
    parts = iter_shard(storage, file.path, stored, optional_columns(table)) if stored else [None]
    for part in parts:
        rows = with_partition(table, part, file, load)
        if keys is not None:
            rows = rows.filter(pc.call_function("is_in", [rows[KEY_COLUMN]], pc.SetLookupOptions(value_set=keys)))
        yield select_rows(rows, where).select(list(columns))


def pixels_to_array(table: pa.Table) -> np.ndarray:
    """Return the pixels of a table as one array, a view of the Arrow buffer where the column is one chunk.

    Args:
        table: rows with the columns `PIXEL_COLUMNS`, all of one shape and depth.

    Returns:
        pixels_BHWC, uint8 or little-endian uint16, read-only when it is a view; (0, 0, 0, 0) for no rows.

    Raises:
        IntegrityError: a row without pixels, of another shape or depth, or of a length that is not its shape's.
    """
    if not table.num_rows:
        return np.empty((0, 0, 0, 0), np.uint8)
    height, width, channels, bits = (_only_value(table, name) for name in PIXEL_COLUMNS[1:])
    if bits not in {8, 16}:
        raise IntegrityError(f"pixels of {bits} bits found, expected 8 or 16; the rows were not written by memmc")
    dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
    length = height * width * channels * dtype.itemsize
    parts = [_chunk_bytes(chunk, length) for chunk in table["pixels"].chunks if len(chunk)]
    flat = [part.view(dtype).reshape(-1, height, width, channels) for part in parts]
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


def _only_value(table: pa.Table, name: str) -> int:
    values = table[name].unique().to_pylist()
    if len(values) != 1 or values[0] is None:
        raise IntegrityError(f"column '{name}' holds {len(values)} values, expected one; batch instances of one shape")
    return int(values[0])


def _chunk_bytes(chunk: pa.Array, length: int) -> np.ndarray:
    """Return the values of a binary array, each `length` bytes, as one uint8 view."""
    kind = chunk.type
    if chunk.null_count:
        raise IntegrityError(f"{chunk.null_count} rows hold no pixels; stream rows whose outcome is 'stored'")
    if pa.types.is_fixed_size_binary(kind):
        lengths_fit, start = kind.byte_width == length, chunk.offset * length
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        offset_type = np.dtype("<i4") if pa.types.is_binary(kind) else np.dtype("<i8")
        offsets = np.frombuffer(chunk.buffers()[1], offset_type, len(chunk) + 1, chunk.offset * offset_type.itemsize)
        lengths_fit, start = bool((np.diff(offsets) == length).all()), int(offsets[0])
    else:
        raise IntegrityError(f"column 'pixels' is of type {kind}, expected binary")
    if not lengths_fit:
        raise IntegrityError(f"pixel values are not all {length} bytes long, which their shape asks for")
    return np.frombuffer(chunk.buffers()[-1], np.uint8, len(chunk) * length, start)
