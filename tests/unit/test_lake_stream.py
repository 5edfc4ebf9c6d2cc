import numpy as np
import pyarrow as pa
import pytest
from lake_rows import instance_rows

from memmc.errors import DataError, IntegrityError
from memmc.lake.schemas import INSTANCES
from memmc.lake.stream import pixels_to_array, read_rows, stream
from memmc.lake.tables import Lake


def pixel_table(images: np.ndarray, kind: pa.DataType | None = None) -> pa.Table:
    num, height, width, channels = images.shape
    shape = {"height": height, "width": width, "channels": channels, "bits": images.dtype.itemsize * 8}
    columns = {name: pa.array([value] * num, pa.int32()) for name, value in shape.items()}
    return pa.table({"pixels": pa.array([image.tobytes() for image in images], kind or pa.binary()), **columns})


def make_images(dtype: str, num: int = 7, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max, (num, 5, 3, channels), dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), "fixed"])
def test_pixels_round_trip(dtype, channels, kind):
    images = make_images(dtype, channels=channels)
    table = pixel_table(images, pa.binary(images[0].nbytes) if kind == "fixed" else kind)
    found = pixels_to_array(table)
    assert found.dtype == np.dtype(dtype) and np.array_equal(found, images)
    start = table["pixels"].chunk(0).buffers()[-1].address
    assert found.ctypes.data == start, "one chunk is viewed, not copied"
    assert np.array_equal(pixels_to_array(table.slice(2, 3)), images[2:5])
    assert pixels_to_array(table.slice(2, 3)).ctypes.data == start + 2 * images[0].nbytes
    assert np.array_equal(
        pixels_to_array(pa.concat_tables([table.slice(3), table.slice(0, 2)])), images[[3, 4, 5, 6, 0, 1]]
    )
    assert pixels_to_array(table.slice(0, 0)).shape == (0, 0, 0, 0)


def test_a_view_after_an_odd_offset():
    images = make_images("uint16", 2)
    column = pa.array([b"x", *(image.tobytes() for image in images)], pa.binary()).slice(1)
    assert np.array_equal(pixels_to_array(pixel_table(images).set_column(0, "pixels", column)), images)


def test_pixels_of_another_length_are_refused():
    images = make_images("uint8", 3)
    good = pixel_table(images)
    values = [image.tobytes() for image in images]
    for bad in (
        [values[0], values[1][:-1], values[2]],
        [values[0] + b"x", values[1][:-1], values[2]],
        [None, *values[1:]],
    ):
        with pytest.raises(IntegrityError):
            pixels_to_array(good.set_column(0, "pixels", pa.array(bad, pa.binary())))
    index = good.column_names.index("height")
    with pytest.raises(IntegrityError, match="'height' holds 2 values"):
        pixels_to_array(good.set_column(index, "height", pa.array([5, 5, 6], pa.int32())))
    with pytest.raises(IntegrityError, match="12 bits"):
        pixels_to_array(good.set_column(good.column_names.index("bits"), "bits", pa.array([12] * 3, pa.int32())))
    with pytest.raises(IntegrityError, match="binary"):
        pixels_to_array(good.set_column(0, "pixels", pa.array([[1], [2], [3]])))


def test_read_rows_filters_and_adds_partitions(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(num=60))
    columns = ["pixels", "split", "object_key"]
    files = lake.files(INSTANCES, partitions={"split": "train"})
    keys = pa.array([f"{index:064x}" for index in (0, 6, 1)])
    rows = pa.concat_tables(
        part for file in files for part in read_rows(lake.storage, INSTANCES, file, columns, keys=keys)
    )
    assert rows.column_names == columns and rows["split"].to_pylist() == ["train"] * 2
    assert rows["object_key"].to_pylist() == keys[:2].to_pylist()
    none = list(read_rows(lake.storage, INSTANCES, files[0], ["split"], {"cohort": "b"}))
    assert sum(part.num_rows for part in none) == 0


def test_stream_refuses_what_it_cannot_give(tmp_path):
    lake = Lake(tmp_path)
    with pytest.raises(DataError, match="no shards"):
        stream(lake.storage, [], ["pixels"])
    lake.append(INSTANCES, instance_rows())
    with pytest.raises(DataError, match="no columns"):
        stream(lake.storage, lake.files(INSTANCES), ["patient_name"])


@pytest.fixture
def in_order():
    """A Ray cluster whose datasets keep the order of their files."""
    import shutil
    import tempfile

    import ray

    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
        mine = not ray.is_initialized()  # another test's cluster serves as well
        try:
            if mine:
                settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
                for name, value in settings.items():
                    patch.setenv(name, value)
                ray.init(
                    num_cpus=2, include_dashboard=False, _temp_dir=folder, logging_level="error", log_to_driver=False
                )
            context = ray.data.DataContext.get_current()
            patch.setattr(context, "enable_progress_bars", False)
            patch.setattr(context.execution_options, "preserve_order", True)
            yield
        finally:
            if mine:
                ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_stream_gives_every_row_once(tmp_path, in_order):
    lake = Lake(tmp_path)
    for run in range(4):
        lake.append(INSTANCES, instance_rows(60 * run, 60))
    files = lake.files(INSTANCES, partitions={"outcome": "stored"})
    columns = ["object_key", "pixels", "height", "width", "channels", "bits", "split"]

    def keys_of(**options: object) -> list[str]:
        dataset = stream(lake.storage, files, columns, 2, **options)
        found: list[str] = []
        for batch in dataset.iter_batches(batch_size=16, batch_format="pyarrow"):
            assert batch.column_names == columns
            images = pixels_to_array(batch)
            keys = batch["object_key"].to_pylist()
            assert (images == np.array([int(key, 16) % 256 for key in keys], np.uint8)[:, None, None, None]).all()
            found += keys
        return found

    stored = lake.read(INSTANCES, ["object_key"], filter={"outcome": "stored"})["object_key"].to_pylist()
    plain, shuffled = keys_of(), keys_of(shuffle_seed=1)
    in_file_order = [
        key
        for file in files
        for part in read_rows(lake.storage, INSTANCES, file, ["object_key"])
        for key in part["object_key"].to_pylist()
    ]
    assert plain == in_file_order and sorted(plain) == sorted(stored) and len(plain) == 120
    assert shuffled != plain and sorted(shuffled) == sorted(plain) and keys_of(shuffle_seed=1) == shuffled
    assert sorted(keys_of(keys=stored[:5])) == sorted(stored[:5])


@pytest.mark.slow
def test_large_batches_do_not_bring_all_shards_to_one_task(tmp_path, in_order):
    """A batch of rows is larger than the number of shards: Ray, left alone, makes one task of all."""
    lake = Lake(tmp_path)
    for run in range(4):
        lake.append(INSTANCES, instance_rows(60 * run, 60))
    files = lake.files(INSTANCES, partitions={"outcome": "stored"})

    def task_of(batch: pa.Table) -> pa.Table:
        import ray

        return pa.table({"task": [ray.get_runtime_context().get_task_id()], "rows": [batch.num_rows]})

    dataset = stream(lake.storage, files, ["object_key"], len(files), block_bytes=1 << 12)
    looked = dataset.map_batches(task_of, batch_size=16, batch_format="pyarrow")
    found = pa.concat_tables(looked.iter_batches(batch_format="pyarrow"))
    counts = found["rows"].to_pylist()
    assert sum(counts) == 120 and max(counts) <= 16
    assert len(set(found["task"].to_pylist())) >= 120 // 32


@pytest.mark.slow
def test_whoever_holds_every_cpu_can_read(tmp_path, in_order):
    import ray

    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(num=60))
    files = lake.files(INSTANCES, partitions={"outcome": "stored"})

    class Actor:
        def __call__(self, batch: pa.Table) -> pa.Table:
            return batch

    dataset = stream(lake.storage, files, ["object_key"], len(files))
    share = ray.cluster_resources()["CPU"] / 2
    pool = dataset.map_batches(
        Actor, batch_size=16, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=2), num_cpus=share
    )
    assert sum(batch.num_rows for batch in pool.iter_batches(batch_format="pyarrow")) == 30


@pytest.mark.slow
def test_a_flipped_bit_ends_the_stream(tmp_path, in_order):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(num=60))
    files = lake.files(INSTANCES, partitions={"outcome": "stored"})
    path = tmp_path / files[1].path
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 3] ^= 1
    path.write_bytes(bad)
    with pytest.raises(Exception, match="SHA-256 differs"):
        for _ in stream(lake.storage, files, ["pixels"], 2).iter_batches(batch_format="pyarrow"):
            pass
