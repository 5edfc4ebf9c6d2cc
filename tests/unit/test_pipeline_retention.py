"""Checkpoints go when their run has been silent for long enough, and only then."""

import json
import time

import pytest

from memmc.config import load_config
from memmc.errors import IntegrityError
from memmc.lake.audit import HEAD
from memmc.pipeline.retention import expire_checkpoints

DAY_S = 86400.0


@pytest.fixture
def lake(tmp_path):
    def run(name, days, *, ended=True, drivers=1):
        record = tmp_path / "training" / "records" / "cxr" / name
        record.mkdir(parents=True)
        for number in range(1, drivers + 1):
            age_s = (days + drivers - number) * DAY_S
            (record / f"driver-{number:04d}.json").write_text("{}")
            (record / f"beat-{number:04d}.json").write_text(json.dumps({"at": time.time() - age_s}))
        if ended:
            (record / "ended.json").write_text("{}")
        checkpoint = tmp_path / "training" / name / "checkpoint_1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")

    run("train-cxr-old", 31)
    run("train-cxr-left-behind", 400, ended=False)
    run("train-cxr-new", 29)
    run("train-cxr-taken-over", 1, ended=False, drivers=90)
    (tmp_path / "instances").mkdir()
    (tmp_path / "instances" / "shard.parquet").write_bytes(b"rows")
    return tmp_path


def kept(lake):
    return {path.parts[-3] for path in lake.glob("training/*/*/model.safetensors")}


def test_old_runs_go_and_others_stay(lake):
    config = load_config(overrides=[f"lake.uri={lake}"])
    planned = expire_checkpoints(config, dry_run=True)
    assert planned.runs == ["train-cxr-left-behind", "train-cxr-old"] and not planned.deleted
    assert len(kept(lake)) == 4
    done = expire_checkpoints(config, dry_run=False)
    assert (done.runs, done.files) == (planned.runs, 3 + 4)
    (record,) = [json.loads(path.read_text()) for path in lake.glob("_audit/*") if path != lake / HEAD]
    assert (record["action"], record["subject"]) == ("lake-expire", {"runs": 2, "files": 7, "days": 30})
    assert kept(lake) == {"train-cxr-new", "train-cxr-taken-over"}
    assert not list(lake.glob("training/records/cxr/train-cxr-old/*"))
    assert (lake / "instances" / "shard.parquet").exists()
    assert expire_checkpoints(config, dry_run=False).runs == []


def test_the_setting_is_what_decides(lake):
    config = load_config(overrides=[f"lake.uri={lake}", "lake.keep_checkpoints_days=20"])
    assert "train-cxr-new" in expire_checkpoints(config, dry_run=True).runs


def test_a_run_that_is_taken_up_meanwhile_stays(lake, monkeypatch):
    from memmc.lake.storage import Storage

    config = load_config(overrides=[f"lake.uri={lake}"])
    delete = Storage.delete

    def taken_up(self, name):
        beat = lake / "training" / "records" / "cxr" / "train-cxr-old" / "beat-0002.json"
        beat.write_text(json.dumps({"at": time.time()}))
        delete(self, name)

    monkeypatch.setattr(Storage, "delete", taken_up)
    assert expire_checkpoints(config, dry_run=False).runs == ["train-cxr-left-behind"]
    assert "train-cxr-old" in kept(lake)


@pytest.mark.parametrize("spoilt", ["", "{}", "[]", '{"at": null}'])
def test_a_damaged_beat_says_what_to_do(lake, spoilt):
    (lake / "training" / "records" / "cxr" / "train-cxr-old" / "beat-0001.json").write_text(spoilt)
    with pytest.raises(IntegrityError, match=r"train-cxr-old is damaged.*delete"):
        expire_checkpoints(load_config(overrides=[f"lake.uri={lake}"]), dry_run=True)


def test_a_lake_without_training_has_nothing_to_expire(tmp_path):
    assert expire_checkpoints(load_config(overrides=[f"lake.uri={tmp_path}"]), dry_run=False).runs == []


def test_an_interrupted_call_is_finished_by_the_next(lake, monkeypatch):
    from memmc.lake.storage import Storage

    config = load_config(overrides=[f"lake.uri={lake}"])
    delete, calls = Storage.delete, []

    def fail(self, name):
        calls.append(name)
        if len(calls) == 3:
            raise OSError("gone")
        delete(self, name)

    monkeypatch.setattr(Storage, "delete", fail)
    with pytest.raises(OSError, match="gone"):
        expire_checkpoints(config, dry_run=False)
    monkeypatch.setattr(Storage, "delete", delete)
    assert len(expire_checkpoints(config, dry_run=False).runs) == 2
    assert kept(lake) == {"train-cxr-new", "train-cxr-taken-over"}
