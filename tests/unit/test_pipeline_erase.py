"""`memmc erase` from the command line: who is meant, what is listed, what is kept as a record."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lake_erasure import bytes_of, instances, scores
from typer.testing import CliRunner

from memmc.cli.main import app
from memmc.config import TrackingConfig
from memmc.dicom.deidentify import key_id, keyed_patient, keyed_uid, load_key
from memmc.errors import MemmcError
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCORES
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.lake.views import define, parse_rule
from memmc.pipeline.vault import write_entries
from memmc.registry.models import register
from memmc.registry.tracking import open_tracking

ORIGINAL, STUDY = "4711-0815", "1.2.840.113619.2.1"


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Two registered models: one of version 1 of cohort a, one of cohort z."""
    home = tmp_path_factory.mktemp("home") / ".memmc"
    tracking = open_tracking(TrackingConfig(), home)
    for cohort in ("a", "z"):
        folder = home.parent / cohort
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(cohort.encode() * 99)
        (folder / "model.json").write_text(json.dumps({"cohort": cohort, "dataset_version": 1, "preprocess_id": "x"}))
        register(tracking, tracking.start_run(f"memmc/{cohort}", "train"), folder, f"memmc-{cohort}")
    return home.parent


@pytest.fixture
def lake(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(registry)
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text("k" * 64)
    key = load_key(str(tmp_path / "key"))
    lake = Lake(tmp_path / "lake")
    lake.check_key_id(key_id(key))
    rows = instances(range(12)).to_pylist()
    for row in rows:
        if row["patient_key"].startswith("01"):
            row |= {"patient_key": keyed_patient(key, ORIGINAL), "study_uid": keyed_uid(key, STUDY)}
            row["split"] = "train" if row["outcome"] == "stored" else "none"
    lake.append(INSTANCES, pa.Table.from_pylist(rows))
    lake.append(SCORES, scores(pa.Table.from_pylist(rows)))
    lake.storage.write("reports/a-m-v1.html", b"<img>")
    lake.storage.write("reports/b-m-v1.html", b"<img>")
    return lake


def erase(lake: Lake, *words: str, text: str = "") -> dict:
    settings = ["--set", f"deid.key_file={lake.storage.local_path().parent / 'key'}"]
    done = CliRunner().invoke(app, ["erase", *words, "--lake", lake.uri, "--json", *settings], input=text)
    if isinstance(done.exception, MemmcError):
        raise done.exception
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_a_patient_named_by_the_original(lake):
    before = lake.storage.list()
    plan = erase(lake, "--patient", "-", "--dry-run", text=f"{ORIGINAL}\n")
    assert plan["erased"] is False and lake.storage.list() == before
    done = erase(lake, "--patient", "-", text=f"{ORIGINAL}\n")
    assert plan["rows"] == done["rows"] == {"scores": 2, "instances": 3}
    assert done["models"] == plan["models"] == [{"model": "memmc-a/1", "use": "training"}]
    assert (done["waiting"], done["writers"], done["cohorts"]) == (0, 0, ["a"]) and done["files"] > 0
    assert done["reports"] == ["reports/a-m-v1.html"] and lake.storage.list("reports") == ["reports/b-m-v1.html"]
    record = json.loads(lake.storage.read(done["record"]))
    assert record["rows"] == done["rows"] and record["kind"] == "patient"
    key = load_key(str(lake.storage.local_path().parent / "key"))
    left = bytes_of(lake)
    for name in (ORIGINAL, keyed_patient(key, ORIGINAL), keyed_uid(key, STUDY)):
        assert name.encode() not in left
    with pytest.raises(MemmcError, match="nothing of this patient"):
        erase(lake, "--patient", "-", text=f"{ORIGINAL}\n")


def test_the_vault_forgets_too(lake):
    root = lake.storage.local_path().parent
    key = load_key(str(root / "key"))
    vault, rows = Storage.open(root / "vault"), lake.read(INSTANCES).to_pylist()
    entries = [
        {**row, "object_uid": row["sop_instance_uid"], "sealed": b"0"} for row in rows if row["sop_instance_uid"]
    ]
    entries = [entry for entry in entries if entry["patient_key"] and entry["study_uid"]]
    write_entries(vault, bytes(32), entries)
    mine = sum(entry["patient_key"] == keyed_patient(key, ORIGINAL) for entry in entries)
    assert 0 < mine < len(entries)
    done = erase(lake, "--patient", "-", "--set", f"deid.vault_uri={root / 'vault'}", text=f"{ORIGINAL}\n")
    assert done["rows"]["vault"] == mine
    (left,) = (pq.read_table(root / "vault" / name) for name in vault.list())
    assert left.num_rows == len(entries) - mine
    assert keyed_patient(key, ORIGINAL) not in left["patient_key"].to_pylist()


def test_a_study_by_its_pseudonym(lake):
    study = lake.read(INSTANCES, ["study_uid"], filter={"object_key": f"a{2:063x}"})["study_uid"][0].as_py()
    model = {"model_digest": "no", "model": "gone/1", "cohort": "a", "dataset_version": 1, "calibration_id": "c"}
    lake.append(
        CALIBRATIONS,
        pa.Table.from_pylist(
            [
                {
                    **model,
                    **dict.fromkeys(("preprocess_id", "scorer"), "x"),
                    **dict.fromkeys(("false_positive_rate", "threshold"), 0.1),
                    "num_normals": 1,
                    "created_at": lake.read(INSTANCES, ["ingested_at"])["ingested_at"][0].as_py(),
                }
            ]
        ),
    )
    done = erase(lake, "--study", study)
    assert done["rows"]["instances"] == 3 and done["models"] == [{"model": "memmc-a/1", "use": "training"}]
    assert study.encode() not in bytes_of(lake)


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ((), "", "one of them"),
        (("--patient", "x", "--study", "y"), "", "one of them"),
        (("--patient", ORIGINAL), "", "not a patient's pseudonym"),
        (("--patient", "f" * 64), "", "nothing of this patient"),
        (("--study", "-"), "\n", "no study"),
        (("--patient", "-", "--cohort", "b"), ORIGINAL, "nothing of this patient"),
    ],
)
def test_who_is_not_meant(lake, words, text, message):
    before = lake.storage.list()
    with pytest.raises(MemmcError, match=message) as caught:
        erase(lake, *words, text=text)
    assert ORIGINAL not in str(caught.value) and lake.storage.list() == before


def test_a_view_is_not_what_is_erased(lake):
    define(lake, "part", ("a",), parse_rule(["label=normal"]))
    with pytest.raises(MemmcError, match="view of a"):
        erase(lake, "--patient", "-", "--cohort", "part", text=ORIGINAL)


def test_only_the_key_of_the_lake_finds_originals(lake):
    (lake.storage.local_path().parent / "key").write_text("other" * 20)
    with pytest.raises(MemmcError, match="identity key"):
        erase(lake, "--patient", "-", text=ORIGINAL)
