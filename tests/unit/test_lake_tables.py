import pickle
import threading

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from lake_rows import NOW, instance_rows, label_rows

from memmc.errors import DataError, IdentityKeyError, IntegrityError
from memmc.lake import shards
from memmc.lake.files import write_rows
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, LABELS, SCHEMAS, SCORES, conform
from memmc.lake.tables import Lake


def test_commit_read_and_time_travel(tmp_path):
    lake = pickle.loads(pickle.dumps(Lake(tmp_path / "lake")))
    assert not lake.exists(INSTANCES)
    first = lake.append(INSTANCES, instance_rows(), "run-1", {"seen": 6})
    second = lake.append(INSTANCES, instance_rows(6), "run-2")
    assert lake.version(INSTANCES) == second > first
    assert lake.read(INSTANCES, ["object_key"]).num_rows == 12
    assert lake.read(INSTANCES, ["object_key"], version=first).num_rows == 6
    rows = lake.read(INSTANCES, ["object_key", "outcome", "pixels", "ingested_at"], filter={"split": "train"})
    assert rows["pixels"].to_pylist() == [bytes([row]) * 16 for row in (0, 6)] or rows["pixels"].to_pylist() == [
        bytes([row]) * 16 for row in (6, 0)
    ]
    assert set(rows["outcome"].to_pylist()) == {"stored"} and rows["ingested_at"][0].as_py() == NOW
    newest = lake.history(INSTANCES)[0]
    assert (newest["version"], newest["run"]) == (second, "run-2")
    assert lake.history(INSTANCES)[1]["metadata"] == {"seen": 6}
    with pytest.raises(DataError, match="no version 99"):
        lake.read(INSTANCES, version=99)
    with pytest.raises(DataError, match="no table 'scores' yet"):
        lake.version(SCORES)
    with pytest.raises(DataError, match="no table 'nothing'"):
        lake.version("nothing")


def test_pixels_are_read_only_when_named(tmp_path, monkeypatch):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows())
    assert "pixels" not in lake.read(INSTANCES).column_names

    def refuse(*_: object) -> bytes:
        raise AssertionError("a whole shard was fetched")

    monkeypatch.setattr(type(lake.storage), "read", refuse)
    assert lake.read(INSTANCES, filter={"outcome": "stored"}).num_rows == 3
    assert lake.instances_with_labels().num_rows == 6


def test_a_run_commits_once(tmp_path):
    lake = Lake(tmp_path)
    files = write_rows(lake.storage, INSTANCES, instance_rows())
    first = lake.commit(INSTANCES, files, "run-1")
    lake.append(INSTANCES, instance_rows(6), "run-2")
    assert lake.commit(INSTANCES, files, "run-1") == first
    assert lake.read(INSTANCES, ["object_key"]).num_rows == 12
    third = lake.commit(INSTANCES, write_rows(lake.storage, INSTANCES, instance_rows(12)), "run-1", step=2)
    assert lake.read(INSTANCES, ["object_key"], third).num_rows == 18


def test_writers_at_once(tmp_path):
    lake = Lake(tmp_path)
    versions: list[int] = []
    barrier = threading.Barrier(6)

    def write(index: int) -> None:
        barrier.wait()
        for step in range(4):
            versions.append(lake.append(INSTANCES, instance_rows(6 * (4 * index + step)), f"run-{index}-{step}"))
        # All threads commit one run: one of them adds it.
        lake.commit(LABELS, write_rows(lake.storage, LABELS, label_rows([("uid0", "normal", 0)])), "same")

    threads = [threading.Thread(target=write, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(versions)) == 24
    keys = lake.read(INSTANCES, ["object_key"])["object_key"].to_pylist()
    assert len(keys) == len(set(keys)) == 24 * 6
    assert lake.read(LABELS).num_rows == 1


def test_files_prune(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(cohort="a"))
    lake.append(INSTANCES, instance_rows(6, cohort="b"))
    assert len(lake.files(INSTANCES)) == 12
    train = lake.files(INSTANCES, partitions={"outcome": "stored", "split": ["train", "test"]})
    assert len(train) == 4 and {file.partition["split"] for file in train} == {"train", "test"}
    assert all(file.num_rows == 1 and (tmp_path / file.path).stat().st_size == file.size for file in train)
    only_b = lake.files(INSTANCES, partitions={"cohort": "b", "split": "train"})
    assert len(only_b) == 1
    assert lake.read(INSTANCES, ["cohort"], filter={"cohort": "b"})["cohort"].to_pylist() == ["b"] * 6
    assert lake.read(INSTANCES, ["split"], filter={"cohort": "c"}).num_rows == 0
    assert lake.read(INSTANCES, ["outcome", "split"], filter={"split": "none"}).num_rows == 6
    assert lake.read(INSTANCES, ["object_key"], filter={"reason": None}).num_rows == 6


def test_the_newest_opinion_is_the_label(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows())
    assert set(lake.instances_with_labels(["label"])["label"].to_pylist()) == {"unknown"}
    first = lake.append(LABELS, label_rows([("uid0", "abnormal", 5), ("uid1", "normal", 1)]))
    lake.append(LABELS, label_rows([("uid0", "normal", 9), ("uid1", "abnormal", 0), ("uid2", "abnormal", 0)]))
    lake.append(LABELS, label_rows([("uid3", "abnormal", 0)], cohort="other"))
    rows = lake.instances_with_labels(["sop_instance_uid", "label"]).to_pydict()
    found = dict(zip(rows["sop_instance_uid"], rows["label"], strict=True))
    assert found == {
        **{f"uid{index}": "unknown" for index in range(6)},
        "uid0": "normal",
        "uid1": "normal",
        "uid2": "abnormal",
    }
    normal = lake.instances_with_labels(["object_key"], filter={"label": "normal", "split": ["train", "calibrate"]})
    assert normal.column_names == ["object_key"] and normal.num_rows == 2
    old = lake.instances_with_labels(["label"], filter={"sop_instance_uid": "uid0"}, labels_version=first)
    assert old["label"].to_pylist() == ["abnormal"]
    assert lake.read(INSTANCES, ["label"])["label"].unique().to_pylist() == ["unknown"]


def test_opens_as_a_plain_delta_table(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows())
    rows = DeltaTable(str(tmp_path / INSTANCES)).to_pyarrow_table(partitions=[("outcome", "=", "stored")])
    assert rows.num_rows == 3 and set(rows.column_names) == set(SCHEMAS[INSTANCES].names)
    assert rows["pixels"].null_count == 0
    state = {"calibration_id": "c", "model": "m/1", "model_digest": "d", "cohort": "a", "dataset_version": 1}
    state |= {"preprocess_id": "p", "scorer": "l1", "false_positive_rate": 0.05, "threshold": 1.5, "num_normals": 2}
    state |= {"normal_scores": [0.5, 1.5], "map_scale": 0.1, "scorer_state": b"\x00\x01", "created_at": NOW}
    threshold = {"rate": 0.05, "threshold": 1.5, "low": 0.0, "high": 0.2, "refused": None}
    pooled = {"stratum": "pooled", "num_normals": 2, "num_patients": 2, "normal_scores": [0.5, 1.5], "refused": None}
    state |= {"passes": 4, "strata_columns": [], "strata": [{**pooled, "thresholds": [threshold]}]}
    state |= {"study_p_values": None, "map_level": 2.5, "normal_peaks": [1.0, 2.5]}
    stage = {"passes": 2, "low": 0.9, "high": 1.1, "scorer_state": b"\x02"}
    state |= {"early_stop": {"bound": 0.02, "thresholds": [{"stratum": "pooled", "threshold": 1.5}], "stages": [stage]}}
    lake.append(CALIBRATIONS, pa.Table.from_pylist([state]))
    assert lake.read(CALIBRATIONS).to_pylist() == [state]
    assert DeltaTable(str(tmp_path / CALIBRATIONS)).to_pyarrow_table().to_pylist() == [state]


def test_rows_that_do_not_fit_are_refused():
    good = instance_rows()
    assert conform(INSTANCES, good).schema.equals(SCHEMAS[INSTANCES])
    with pytest.raises(DataError, match="no columns"):
        conform(INSTANCES, good.append_column("patient_name", pa.array(["x"] * 6)))
    with pytest.raises(DataError, match="'cohort': 6 rows hold no value"):
        conform(INSTANCES, good.drop_columns(["cohort"]))
    with pytest.raises(DataError, match="'size_bytes': expected int64"):
        conform(INSTANCES, good.drop_columns(["size_bytes"]).append_column("size_bytes", pa.array(["secret"] * 6)))
    with pytest.raises(DataError, match="'outcome': a value is none of") as caught:
        index = good.column_names.index("outcome")
        conform(INSTANCES, good.set_column(index, "outcome", pa.array(["../x"] * 6)))
    assert "../x" not in str(caught.value)


def test_a_shard_of_another_table_is_refused(tmp_path):
    lake = Lake(tmp_path)
    files = write_rows(lake.storage, LABELS, label_rows([("uid0", "normal", 0)]))
    with pytest.raises(DataError, match="another table"):
        lake.commit(INSTANCES, files, "run")


def test_rot_is_named(tmp_path):
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows())
    file = lake.files(INSTANCES, partitions={"split": "train"})[0]
    path = tmp_path / file.path
    bad = bytearray(path.read_bytes())
    bad[len(bad) // 2] ^= 4
    path.write_bytes(bad)
    with pytest.raises(IntegrityError, match=file.path):
        lake.read(INSTANCES, ["pixels"])


def test_large_groups_become_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("memmc.lake.files.SHARD_BYTES", 2000)
    lake = Lake(tmp_path)
    lake.append(INSTANCES, instance_rows(num=120))
    assert len(lake.files(INSTANCES, partitions={"split": "train"})) > 1
    keys = lake.read(INSTANCES, ["object_key"])["object_key"].to_pylist()
    assert sorted(keys) == sorted(f"{index:064x}" for index in range(120))


def test_an_empty_run_commits(tmp_path):
    lake = Lake(tmp_path)
    version = lake.append(INSTANCES, SCHEMAS[INSTANCES].empty_table(), "empty")
    assert lake.read(INSTANCES).num_rows == 0
    assert lake.history(INSTANCES)[0]["run"] == "empty" and lake.version(INSTANCES) == version


def test_one_identity_key_per_lake(tmp_path):
    lake = Lake(tmp_path)
    assert lake.key_id() is None
    lake.check_key_id("k0", tie=False)
    assert lake.key_id() is None
    lake.check_key_id("k1")
    lake.check_key_id("k1")
    with pytest.raises(IdentityKeyError, match="made with identity key k1"):
        lake.check_key_id("k2", tie=False)
    with pytest.raises(IdentityKeyError, match="made with identity key k1"):
        Lake(tmp_path).check_key_id("k2")
    lake.storage.write("_identity.json", b"{")
    with pytest.raises(IdentityKeyError, match="unreadable"):
        lake.check_key_id("k1")


def test_bulk_columns_are_columns():
    assert set().union(*(schema.names for schema in SCHEMAS.values())) >= shards.BULK_COLUMNS
