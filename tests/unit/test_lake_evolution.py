"""A grid of two versions of the code over one table: yesterday's schema is today's without some columns."""

import threading

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from lake_rows import instance_rows, label_rows

from memmc.errors import DataError, IntegrityError
from memmc.lake import schemas
from memmc.lake.files import read_file
from memmc.lake.schemas import INSTANCES, LABELS, SCHEMAS
from memmc.lake.stream import read_rows
from memmc.lake.tables import Lake

NEW = {"patient_sex", "pixel_std", "pixels", "lossy"}
SMALL = ["object_key", "patient_sex"]


def without(schema: pa.Schema, names: set[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in names])


@pytest.fixture
def versions(monkeypatch):
    """Return a switch: the code knows today's columns of a table, or yesterday's."""
    today = dict(SCHEMAS)

    def switch(table: str, schema: pa.Schema | None) -> None:
        monkeypatch.setattr(schemas, "SCHEMAS", {**today, table: schema or today[table]})
        monkeypatch.setattr("memmc.lake.tables.SCHEMAS", {**today, table: schema or today[table]})

    return switch


def rows(start: int, names: set[str] = frozenset()) -> pa.Table:
    table = instance_rows(start).append_column("patient_sex", pa.array(["F"] * 6))
    return table.drop_columns(sorted(names & set(table.column_names)))


def test_every_writer_and_every_reader(tmp_path, versions):
    lake, old = Lake(tmp_path), without(SCHEMAS[INSTANCES], NEW)
    versions(INSTANCES, old)
    lake.append(INSTANCES, rows(0, NEW), "old")
    versions(INSTANCES, None)
    assert lake.read(INSTANCES, SMALL)["patient_sex"].to_pylist() == [None] * 6  # writer N-1, reader N
    lake.append(INSTANCES, rows(6), "new")
    assert {field.name for field in DeltaTable(tmp_path / INSTANCES).schema().fields} == set(SCHEMAS[INSTANCES].names)
    versions(INSTANCES, old)
    assert lake.read(INSTANCES).num_rows == 12 and NEW.isdisjoint(lake.read(INSTANCES).column_names)  # N, N-1
    with pytest.raises(DataError, match="no columns"):
        lake.read(INSTANCES, ["pixels"])
    lake.append(INSTANCES, rows(12, NEW), "old again")  # writer N-1 on a table of N
    versions(INSTANCES, None)
    lake.append(INSTANCES, rows(18), "new again")
    found = {row["object_key"]: row for row in lake.read(INSTANCES, [*SMALL, "pixels", "outcome"]).to_pylist()}
    assert len(found) == 24
    for index in range(24):
        row, is_new = found[f"{index:064x}"], index // 6 % 2 == 1
        assert row["patient_sex"] == ("F" if is_new else None)
        assert row["pixels"] == (bytes([index]) * 16 if is_new and row["outcome"] == "stored" else None)
    assert lake.read(INSTANCES, SMALL, filter={"patient_sex": "F"}).num_rows == 12
    plain = DeltaTable(tmp_path / INSTANCES).to_pyarrow_table(columns=SMALL)  # other tools see the same
    assert plain["patient_sex"].to_pylist().count("F") == 12 and plain.num_rows == 24


def test_a_shard_without_any_wanted_column_still_gives_its_rows(tmp_path, versions):
    lake = Lake(tmp_path)
    versions(INSTANCES, without(SCHEMAS[INSTANCES], NEW))
    lake.append(INSTANCES, rows(0, NEW))
    versions(INSTANCES, None)
    for file in lake.files(INSTANCES):
        for columns in (["patient_sex"], ["pixels"], ["split", "lossy"]):
            assert read_file(lake.storage, INSTANCES, file, columns).num_rows == file.num_rows
            assert sum(part.num_rows for part in read_rows(lake.storage, INSTANCES, file, columns)) == file.num_rows


def test_a_required_column_is_never_made_up(tmp_path, versions):
    lake = Lake(tmp_path)
    versions(LABELS, without(SCHEMAS[LABELS], {"source"}))
    lake.append(LABELS, label_rows([("uid0", "normal", 0)]).drop_columns(["source"]))
    versions(LABELS, None)
    with pytest.raises(IntegrityError, match=r"no columns \['source'\]"):
        lake.read(LABELS)
    with pytest.raises(DataError, match=r"required columns \['source'\]"):
        lake.append(LABELS, label_rows([("uid1", "normal", 0)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patient_sex": pa.field("sex", pa.string())}, "renaming"),
        ({"size_bytes": pa.field("size", pa.int64(), nullable=False)}, "required columns"),
        ({"size_bytes": pa.field("size_bytes", pa.int32(), nullable=False)}, "'size_bytes' is of type int64 there"),
        ({"reason": pa.field("reason", pa.large_binary())}, "'reason' is of type string there"),
    ],
)
def test_renaming_and_narrowing_are_refused(tmp_path, versions, change, message):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(0))
    before = lake.version(INSTANCES)
    versions(INSTANCES, pa.schema([change.get(field.name, field) for field in SCHEMAS[INSTANCES]]))
    with pytest.raises(DataError, match=message):
        lake.commit(INSTANCES, [], "later")
    versions(INSTANCES, None)
    assert lake.version(INSTANCES) == before
    lake.commit(INSTANCES, [], "later")


def test_a_required_column_may_become_optional(tmp_path, versions):
    lake, loose = Lake(tmp_path), pa.schema([field.with_nullable(True) for field in SCHEMAS[LABELS]])
    lake.append(LABELS, label_rows([("uid0", "normal", 0)]))
    versions(LABELS, loose)
    lake.append(LABELS, label_rows([("uid1", "normal", 0)]).drop_columns(["source"]))
    assert sorted(lake.read(LABELS)["source"].to_pylist(), key=str) == [None, "reader"]
    assert all(field.nullable for field in DeltaTable(tmp_path / LABELS).schema().fields)
    versions(LABELS, None)
    lake.append(LABELS, label_rows([("uid2", "normal", 0)]))  # yesterday's writer asks for more than it has to
    assert lake.read(LABELS).num_rows == 3
    assert all(field.nullable for field in DeltaTable(tmp_path / LABELS).schema().fields)


@pytest.mark.parametrize("table", list(SCHEMAS))
def test_a_table_just_made_needs_no_change(tmp_path, table):
    """The types go to Delta's and back unchanged, lists and structs included."""
    lake = Lake(tmp_path)
    first = lake.commit(table, [], "one")
    assert lake.commit(table, [], "two") == first + 1


def test_a_column_of_another_type_is_refused_when_read(tmp_path, versions):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(0))
    kinds = {"cohort": pa.field("cohort", pa.int32(), nullable=False)}
    versions(INSTANCES, pa.schema([kinds.get(field.name, field) for field in SCHEMAS[INSTANCES]]))
    with pytest.raises(DataError, match="the lake holds string"):
        lake.read(INSTANCES, ["cohort"])


def test_writers_that_race_to_add_the_columns(tmp_path, versions):
    lake = Lake(tmp_path)
    versions(INSTANCES, without(SCHEMAS[INSTANCES], NEW))
    lake.append(INSTANCES, rows(0, NEW))
    versions(INSTANCES, None)
    threads = [threading.Thread(target=lake.append, args=(INSTANCES, rows(6 * n), f"r{n}")) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lake.read(INSTANCES, SMALL)["patient_sex"].to_pylist().count("F") == 24
