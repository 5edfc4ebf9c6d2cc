import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memmc.errors import IntegrityError, StorageError
from memmc.lake import shards
from memmc.lake.shards import iter_shard, read_shard, write_shard
from memmc.lake.storage import Storage


def make_table(num_rows: int = 40, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    pixels = [rng.integers(0, 256, 256, np.uint8).tobytes() for _ in range(num_rows)]
    return pa.table(
        {
            "cohort": ["a"] * num_rows,
            "split": ["train"] * num_rows,
            "object_key": [f"{index:064x}" for index in range(num_rows)],
            "pixels": pa.array(pixels, pa.binary()),
            "height": pa.array([16] * num_rows, pa.int32()),
        }
    )


def test_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 4096)
    storage, table = Storage.open(tmp_path), make_table()
    shard = write_shard(storage, "instances", table, {"split": "train"})
    stored = table.drop_columns(["split"])
    assert shard.num_rows == 40 and shard.size == storage.local_path(shard.path).stat().st_size
    assert shard.path.startswith("instances/split=train/") and shard.sha256 in shard.path
    assert read_shard(storage, shard.path).equals(stored)
    assert read_shard(storage, shard.path, ["height", "cohort"]).equals(stored.select(["height", "cohort"]))
    assert len(list(iter_shard(storage, shard.path))) > 1
    assert write_shard(storage, "instances", table).path != shard.path


def test_layout(tmp_path):
    storage = Storage.open(tmp_path)
    shard = write_shard(storage, "instances", make_table())
    group = pq.ParquetFile(tmp_path / shard.path).metadata.row_group(0)
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    assert not columns["pixels"].is_stats_set and not columns["pixels"].has_dictionary_page
    assert columns["cohort"].has_dictionary_page
    assert columns["pixels"].compression == "LZ4"


def test_empty_shard(tmp_path):
    storage = Storage.open(tmp_path)
    shard = write_shard(storage, "instances", make_table(0))
    assert read_shard(storage, shard.path).num_rows == 0
    assert read_shard(storage, shard.path, ["cohort", "pixels"]).column_names == ["cohort", "pixels"]


def test_every_flipped_bit_is_found_when_pixels_are_read(tmp_path):
    storage = Storage.open(tmp_path)
    shard = write_shard(storage, "instances", make_table())
    path, good = tmp_path / shard.path, storage.read(shard.path)
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, len(good) * 8, 300):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        with pytest.raises(IntegrityError, match=shard.sha256):
            read_shard(storage, shard.path, ["pixels"])


def test_flipped_bits_of_small_columns_never_give_other_values(tmp_path):
    storage, table = Storage.open(tmp_path), make_table()
    shard = write_shard(storage, "instances", table)
    path, good = tmp_path / shard.path, storage.read(shard.path)
    columns = ["cohort", "object_key", "height"]
    rng = np.random.default_rng(2)
    found = 0
    for bit in rng.integers(0, len(good) * 8, 400):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        try:
            assert read_shard(storage, shard.path, columns).equals(table.select(columns))
        except IntegrityError:
            found += 1
    assert found > 20


def test_page_checksums_are_there_to_be_verified(tmp_path):
    storage = Storage.open(tmp_path)
    shard = write_shard(storage, "instances", make_table())
    path = tmp_path / shard.path
    bad = bytearray(path.read_bytes())
    bad[bad.index(make_table()["pixels"][3].as_py())] ^= 1
    path.write_bytes(bad)
    assert pq.read_table(path)["pixels"][3] != make_table()["pixels"][3]  # Parquet's default lets it pass
    with pytest.raises(OSError):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_cut_shard(tmp_path, keep):
    storage = Storage.open(tmp_path)
    shard = write_shard(storage, "instances", make_table())
    good = storage.read(shard.path)
    (tmp_path / shard.path).write_bytes(good[: int(keep * len(good)) if keep == 0.5 else keep])
    for columns in (None, ["cohort"]):
        with pytest.raises(IntegrityError, match=shard.sha256):
            read_shard(storage, shard.path, columns)


def test_swapped_and_absent_shards(tmp_path):
    storage = Storage.open(tmp_path)
    one, two = (write_shard(storage, "instances", make_table(seed=seed)) for seed in (1, 2))
    storage.write(one.path, storage.read(two.path))
    with pytest.raises(IntegrityError, match="SHA-256"):
        read_shard(storage, one.path)
    storage.delete(one.path)
    with pytest.raises(StorageError):
        read_shard(storage, one.path, ["cohort"])
    with pytest.raises(IntegrityError, match="no columns"):
        read_shard(storage, two.path, ["nothing"])


def test_a_store_that_fails_is_not_asked_again_for_the_whole_file(tmp_path, monkeypatch):
    storage = Storage.open(tmp_path)
    shard = write_shard(storage, "instances", make_table())
    asked: list[int] = []

    def ranges(self, rel, start, length):
        asked.append(start)
        if start >= 0:
            raise StorageError("no answer")
        return read_range(self, rel, start, length)

    read_range = Storage.read_range
    monkeypatch.setattr(Storage, "read_range", ranges)
    monkeypatch.setattr(shards, "TAIL_BYTES", 600)
    with pytest.raises(StorageError, match="no answer"):
        read_shard(storage, shard.path, ["cohort"])
    assert [start >= 0 for start in asked].count(True) == 1
