"""Labels that arrive later: by path, by UID, by pseudonym; once."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from memmc.cli.main import app
from memmc.config import Config, load_config
from memmc.dicom.deidentify import frame_uid, key_id, keyed_uid, load_key, seal_path
from memmc.errors import DataError, IdentityKeyError, UsageError
from memmc.lake.schemas import INSTANCES, LABELS
from memmc.lake.tables import Lake
from memmc.pipeline.relabel import relabel

UIDS = [f"1.2.3.{number}" for number in range(6)]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("k" * 64)
    (tmp_path / "key").chmod(0o600)
    return load_config(overrides=[f"lake.uri={tmp_path / 'lake'}", f"deid.key_file={tmp_path / 'key'}"])


@pytest.fixture
def lake(config) -> Lake:
    """Five single images and one object of three frames, all unknown; one object was not stored."""
    key = load_key(str(config.deid.key_file))
    lake = Lake(config.lake.uri)
    lake.check_key_id(key_id(key))
    rows = []
    for number, uid in enumerate(UIDS):
        for frame in (1, 2, 3) if number == 5 else (None,):
            pseudonym = keyed_uid(key, uid)
            rows.append(
                {
                    "cohort": "c",
                    "object_key": f"{number}{frame}",
                    "source_ref": seal_path(key, f"folder/{number}.dcm"),
                    "outcome": "excluded" if number == 4 else "stored",
                    "split": "none" if number == 4 else "train",
                    "content_key": "x",
                    "size_bytes": 1,
                    "sop_instance_uid": pseudonym if frame is None else frame_uid(pseudonym, frame),
                    "frame_number": frame,
                    "label": "unknown",
                    "ingest_run": "r",
                    "ingested_at": datetime(2026, 1, 1, tzinfo=UTC),
                }
            )
    lake.append(INSTANCES, pa.Table.from_pylist(rows), "ingest")
    return lake


def table(tmp_path, *rows: str, header: str = "path,label"):
    file = tmp_path / "labels.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def labels(lake: Lake) -> list[str]:
    rows = lake.instances_with_labels(["source_ref", "frame_number", "label"], None, {"outcome": "stored"})
    return rows.sort_by([("frame_number", "ascending")])["label"].to_pylist()


def test_paths_and_uids_label_without_touching_instances(config, lake, tmp_path):
    version = lake.version(INSTANCES)
    file = table(
        tmp_path, "folder/0.dcm,normal", "1.2.3.1,abnormal", "1.2.3.5,normal", "folder/4.dcm,normal", "9.9,normal"
    )
    first = relabel(config, "c", file)
    assert (first.stated, first.unknown, first.added, first.unchanged) == (5, 2, 5, 0)
    assert first.labels == {"abnormal": 1, "normal": 4}
    assert sorted(labels(lake)) == ["abnormal", "normal", "normal", "normal", "normal", "unknown", "unknown"]
    assert labels(lake)[:3] == ["normal"] * 3  # the frames of the one object
    assert lake.version(INSTANCES) == version
    again = relabel(config, "c", file)
    assert (again.added, again.unchanged, again.version) == (0, 5, first.version)
    assert lake.read(LABELS).num_rows == 5
    changed = relabel(config, "c", table(tmp_path, "folder/0.dcm,abnormal"))
    assert (changed.added, changed.version) == (1, first.version + 1)
    assert sorted(labels(lake)).count("abnormal") == 2
    back = relabel(config, "c", table(tmp_path, "folder/0.dcm,normal"))
    assert back.added == 1  # the newest opinion was another
    assert sorted(labels(lake)).count("abnormal") == 1


def test_a_path_precedes_a_uid(config, lake, tmp_path):
    for order in (("folder/0.dcm,normal", "1.2.3.0,abnormal"), ("1.2.3.0,abnormal", "folder/0.dcm,normal")):
        relabel(config, "c", table(tmp_path, *order))
        assert lake.read(LABELS, ["label"])["label"].to_pylist() == ["normal"]


def test_pseudonyms_need_no_key_and_everything_else_does(config, lake, tmp_path):
    pseudonym = keyed_uid(load_key(str(config.deid.key_file)), UIDS[2])
    (tmp_path / "other").write_text("o" * 64)
    (tmp_path / "other").chmod(0o600)
    stranger = load_config(overrides=[f"lake.uri={config.lake.uri}", f"deid.key_file={tmp_path / 'other'}"])
    file = table(tmp_path, f"{pseudonym},0.5,abnormal", header="sop_instance_uid,anomaly_score,label")
    assert relabel(stranger, "c", file).added == 1
    with pytest.raises(IdentityKeyError, match="only the holder") as refused:
        relabel(stranger, "c", table(tmp_path, "1.2.3.1,normal"))
    assert "1.2.3.1" not in str(refused.value)


def test_a_table_that_names_nothing_is_refused(config, lake, tmp_path):
    with pytest.raises(DataError, match="none of the 1 names") as refused:
        relabel(config, "c", table(tmp_path, "elsewhere/SMITH.dcm,normal"))
    assert "SMITH" not in str(refused.value)
    with pytest.raises(DataError, match="no stored images"):
        relabel(config, "d", table(tmp_path, "folder/0.dcm,normal"))
    with pytest.raises(UsageError, match="line 3"):
        relabel(config, "c", table(tmp_path, "folder/0.dcm,normal", "folder/1.dcm,healthy"))
    with pytest.raises(UsageError, match="lacks a column"):
        relabel(config, "c", table(tmp_path, "a,normal", header="file,label"))
    assert not lake.exists(LABELS)


def test_the_verb_counts_before_it_writes(config, lake, tmp_path):
    file = table(tmp_path, "folder/0.dcm,normal", "gone.dcm,normal")
    words = ["label", "--labels", str(file), "--cohort", "c", "--lake", config.lake.uri]
    words += ["--set", f"deid.key_file={config.deid.key_file}"]
    dry = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert json.loads(dry.stdout)["added"] == 1
    assert not lake.exists(LABELS)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "set 1 normal; 0 labels are so already",
        "1 of 2 names are not stored in cohort c",
    ]
