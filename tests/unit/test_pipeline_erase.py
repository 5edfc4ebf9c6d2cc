"""`memmc erase` from the command line: who is meant, what is listed, what is kept as a record."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lake_rows import label_rows
from test_lake_erasure import NOW, bytes_of, instances, patient, scores
from typer.testing import CliRunner

from memmc.cli.erase import summary
from memmc.cli.main import app
from memmc.config import TrackingConfig, load_config
from memmc.dicom.deidentify import key_id, keyed_patient, keyed_uid, load_key
from memmc.errors import IntegrityError, MemmcError, ModelError, StorageError
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, LABELS, SCORES
from memmc.lake.storage import Storage
from memmc.lake.tables import Lake
from memmc.lake.views import define, parse_rule
from memmc.pipeline import erase as module
from memmc.pipeline.progress import Silent
from memmc.pipeline.vault import write_entries
from memmc.registry.models import ModelVersion, all_versions, register
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
    write_reports(lake, "a-memmc-a-v1", "b-memmc-b-v1")
    return lake


def write_reports(lake: Lake, *names: str) -> None:
    for name in names:
        lake.storage.write(f"reports/{name}.html", b"<img>")


def calibrated(lake: Lake, digest: str) -> None:
    """A calibration of a model on the held-out normals of cohort a, version 1."""
    row = {"model_digest": digest, "model": "m/1", "cohort": "a", "dataset_version": 1, "calibration_id": "c"}
    row |= {"preprocess_id": "x", "scorer": "x", "false_positive_rate": 0.1, "threshold": 0.1, "num_normals": 1}
    lake.append(CALIBRATIONS, pa.Table.from_pylist([{**row, "created_at": NOW}]))


def left_reports(lake: Lake) -> set[str]:
    return {name.removeprefix("reports/").removesuffix(".html") for name in lake.storage.list("reports")}


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
    assert done["reports"] == plan["reports"] == ["reports/a-memmc-a-v1.html"]
    assert lake.storage.list("reports") == ["reports/b-memmc-b-v1.html"]
    record = json.loads(lake.storage.read(done["record"]))
    assert record["rows"] == done["rows"] and record["kind"] == "patient"
    key = load_key(str(lake.storage.local_path().parent / "key"))
    left = bytes_of(lake)
    for name in (ORIGINAL, keyed_patient(key, ORIGINAL), keyed_uid(key, STUDY)):
        assert name.encode() not in left
    with pytest.raises(MemmcError, match="nothing of this patient"):
        erase(lake, "--patient", "-", text=f"{ORIGINAL}\n")


def test_every_report_that_may_show_the_patient_goes_and_no_other(lake):
    define(lake, "frontal", ("a",), parse_rule(["label=normal"]))
    concerned = ["a-memmc-b-v2", "a-local-v0123456789abcdef", "frontal-memmc-b-v1"]
    nearest_normals = ["b-memmc-a-v1", "b-memmc-a-v17", "b-memmc-frontal-v3"]
    untold = ["b-local-v0123456789abcdef", "b", "b-m-v1"]
    two_ways = ["a-memmc-x-memmc-b-v1", "monitor-memmc-a-v1"]  # a cohort and a model each, wherever they are cut
    others = ["a-icu-memmc-b-v1", "frontal-2-memmc-b-v1", "a.b-memmc-a_b-v1", "b-memmc-a-icu-v1", "b-memmc-b-v1"]
    monitoring = ["monitor-a", "monitor-b", "monitor-a-icu"]
    write_reports(lake, *concerned, *nearest_normals, *untold, *two_ways, *others, *monitoring)
    lake.storage.write("reports/monitor-a.png", b"\x89PNG")
    done = erase(lake, "--patient", "-", text=ORIGINAL)
    gone = [*concerned, *nearest_normals, *untold, *two_ways, "a-memmc-a-v1"]
    assert done["reports"] == sorted(f"reports/{name}.html" for name in gone)
    assert left_reports(lake) == {*others, *monitoring, "monitor-a.png"}


def test_reports_of_a_model_that_was_calibrated_on_the_patient_go(lake, registry):
    digests = {
        version.ref: version.digest for version in all_versions(open_tracking(TrackingConfig(), registry / ".memmc"))
    }
    calibrated(lake, digests["memmc-z/1"])
    write_reports(lake, "b-memmc-z-v1", "b-memmc-z-v2")
    done = erase(lake, "--patient", patient(3))
    assert done["models"] == [{"model": "memmc-z/1", "use": "calibration"}]
    assert done["reports"] == ["reports/a-memmc-a-v1.html", "reports/b-memmc-z-v1.html"]
    assert left_reports(lake) == {"b-memmc-b-v1", "b-memmc-z-v2"}


@pytest.mark.parametrize("error", [ModelError, IntegrityError, StorageError, KeyError])
def test_a_version_that_cannot_be_read_is_listed_and_stops_no_erasure(lake, monkeypatch, error):
    def gone(*_arguments, **_more):
        raise error("weights")

    trained = {"cohort": "a", "dataset_version": "1"}
    versions = [
        ModelVersion("memmc-y", "1", digest="y"),
        ModelVersion("memmc-x", "4", digest="x", tags={**trained, "dataset_version": "9"}),  # of another lake
        ModelVersion("memmc-a", "2", digest="a", tags=trained),
    ]
    monkeypatch.setattr(module, "all_versions", lambda _: versions)
    monkeypatch.setattr(module, "open_model", gone)
    calibrated(lake, "y")
    write_reports(lake, "b-memmc-y-v1", "b-memmc-x-v4")
    unknown = {"model": "memmc-y/1", "use": "unknown: it cannot be read"}
    done = erase(lake, "--patient", "-", text=ORIGINAL)
    assert done["models"] == [unknown, {"model": "memmc-a/2", "use": "training"}]  # by their tags, unopened
    assert left_reports(lake) == {"b-memmc-b-v1", "b-memmc-x-v4"}
    # What a model was calibrated on is known without it.
    calibration = {"model": "memmc-y/1", "use": "calibration"}
    assert erase(lake, "--patient", patient(3))["models"] == [unknown, calibration]


def test_what_a_model_learned_counts_by_the_labels_of_its_time(lake, monkeypatch):
    """The patient's images were normals then; a reader has called them abnormal since."""
    tags = {"cohort": "a", "dataset_version": "1"}
    versions = [
        ModelVersion("memmc-a", "3", tags={**tags, "pinned_labels": "-1"}),  # before the first label
        ModelVersion("memmc-a", "4", tags=tags),  # any label, as it does not say which
    ]
    monkeypatch.setattr(module, "all_versions", lambda _: versions)
    key = keyed_patient(load_key(str(lake.storage.local_path().parent / "key")), ORIGINAL)
    uids = lake.read(INSTANCES, ["sop_instance_uid"], filter={"patient_key": key})["sop_instance_uid"].to_pylist()
    lake.append(LABELS, label_rows([(uid, "abnormal", 1) for uid in uids]))
    pinned = {"pinned_labels": str(lake.version(LABELS))}
    versions.append(ModelVersion("memmc-a", "5", tags={**tags, **pinned}))  # after the reader's
    done = erase(lake, "--patient", "-", "--dry-run", text=ORIGINAL)
    assert done["models"] == [{"model": f"memmc-a/{number}", "use": "training"} for number in (3, 4)]


def test_what_the_model_it_began_from_had_learned_counts_and_damaged_tags_stop_nothing(lake, monkeypatch):
    other = {"cohort": "a", "dataset_version": "0"}
    versions = [
        ModelVersion("memmc-z", "6", tags={"cohort": "z", "dataset_version": "1", "ancestors": '{"a": 1}'}),
        ModelVersion("memmc-z", "7", tags={**other, "pinned_labels": "first"}),
        ModelVersion("memmc-z", "8", tags={**other, "ancestors": "a"}),
    ]
    monkeypatch.setattr(module, "all_versions", lambda _: versions)
    unknown = "unknown: it cannot be read"
    assert erase(lake, "--patient", "-", "--dry-run", text=ORIGINAL)["models"] == [
        {"model": "memmc-z/6", "use": "training"},
        {"model": "memmc-z/7", "use": unknown},
        {"model": "memmc-z/8", "use": unknown},
    ]


def test_a_calibration_counts_by_any_label_as_it_does_not_say_which_it_read(lake, monkeypatch):
    tags = {"cohort": "z", "dataset_version": "1", "pinned_labels": "-1"}
    monkeypatch.setattr(module, "all_versions", lambda _: [ModelVersion("memmc-z", "9", digest="z9", tags=tags)])
    calibrated(lake, "z9")
    assert erase(lake, "--patient", patient(3), "--dry-run")["models"] == [{"model": "memmc-z/9", "use": "calibration"}]
    rows = lake.read(INSTANCES, ["sop_instance_uid"], filter={"patient_key": patient(3)})
    lake.append(LABELS, label_rows([(uid, "abnormal", 1) for uid in rows["sop_instance_uid"].to_pylist()]))
    assert erase(lake, "--patient", patient(3), "--dry-run")["models"] == [{"model": "memmc-z/9", "use": "calibration"}]


def test_the_summary_tells_models_that_met_the_images_from_those_that_cannot_be_read():
    models = [{"model": "memmc-a/1", "use": "training"}, {"model": "memmc-y/1", "use": "unknown: it cannot be read"}]
    counts = {"rows": {"instances": 1}, "files": 1, "waiting": 0, "writers": 0, "cohorts": ["a"], "reports": []}
    lines = summary(module.EraseResult(erased=True, models=models, record="r", **counts)).splitlines()
    assert lines[1] == "  memmc-a/1: training met these images; train and calibrate anew"
    assert lines[2] == "  memmc-y/1: unknown: it cannot be read"


def test_a_registry_that_cannot_be_reached_stops_the_erasure(lake, monkeypatch):
    def unreachable(_):
        raise StorageError("the tracking store cannot be read")

    monkeypatch.setattr(module, "all_versions", unreachable)
    before = lake.storage.list()
    with pytest.raises(StorageError, match="tracking store"):
        erase(lake, "--patient", "-", text=ORIGINAL)
    assert lake.storage.list() == before


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
    (left,) = (pq.read_table(root / "vault" / name) for name in vault.list("entries"))
    assert left.num_rows == len(entries) - mine
    assert keyed_patient(key, ORIGINAL) not in left["patient_key"].to_pylist()


@pytest.mark.parametrize(
    ("vault", "cohort", "word"), [(None, None, "No deid.vault_uri"), ("vault", "a", "--cohort"), ("vault", None, "")]
)
def test_a_vault_that_keeps_its_entries_is_said(lake, vault, cohort, word):
    said = []

    class Heard(Silent):
        def message(self, text):
            said.append(text)

    place = [f"deid.vault_uri={lake.storage.local_path().parent / vault}"] if vault else []
    config = load_config(overrides=[f"lake.uri={lake.uri}", *place])
    module.erase(config, "patient", patient(3), cohort, dry_run=True, progress=Heard())
    assert [word in text for text in said] == ([True] if word else [])


def test_a_study_by_its_pseudonym(lake):
    study = lake.read(INSTANCES, ["study_uid"], filter={"object_key": f"a{2:063x}"})["study_uid"][0].as_py()
    calibrated(lake, "no")
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
