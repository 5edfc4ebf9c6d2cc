import json
import math
import pickle
import shutil
from pathlib import Path

import pytest

from memmc.config import TrackingConfig
from memmc.errors import ConfigError, IntegrityError, ModelError, StorageError
from memmc.model.artifact import load_model
from memmc.model.digest import model_digest
from memmc.registry.models import CHAMPION, all_versions, download, register, registered_before, resolve
from memmc.registry.tracking import open_tracking


@pytest.fixture(scope="module")
def migrated(tmp_path_factory):
    """One empty database, migrated once; each test gets a copy."""
    home = tmp_path_factory.mktemp("registry")
    open_tracking(TrackingConfig(), home)
    return home / "mlflow.db"


@pytest.fixture
def tracking(migrated, tmp_path):
    home = tmp_path / ".memmc"
    home.mkdir()
    (home / "mlflow.db").write_bytes(migrated.read_bytes())
    return open_tracking(TrackingConfig(), home)


def model_folder(path, fill=b"a"):
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(fill * 1000)
    (path / "model.json").write_text(json.dumps({"format": 1}))
    return path


def registered(tracking, tmp_path, cohort, fill=b"a"):
    run = tracking.start_run(f"memmc/{cohort}", "train")
    folder = model_folder(tmp_path / f"{cohort}-{fill.hex()}", fill)
    return register(tracking, run, folder, f"memmc-{cohort}", {"cohort": cohort})


def test_a_registered_folder_comes_back_byte_for_byte(tracking, tmp_path):
    version = registered(tracking, tmp_path, "cxr")
    assert (version.ref, version.aliases, version.tags["cohort"]) == ("memmc-cxr/1", ("challenger",), "cxr")
    fetched = download(tracking, version)
    assert fetched == tracking.home / "models" / version.digest
    assert sorted(p.name for p in fetched.iterdir()) == ["model.json", "model.safetensors"]
    assert (fetched / "model.safetensors").read_bytes() == b"a" * 1000
    assert model_digest(fetched) == version.digest == model_digest(tmp_path / "cxr-61")
    assert [p.name for p in fetched.parent.iterdir()] == [version.digest]


def test_every_form_of_reference(tracking, tmp_path):
    one = registered(tracking, tmp_path, "cxr", b"1")
    two = registered(tracking, tmp_path, "cxr", b"2")
    other = registered(tracking, tmp_path, "hand", b"3")
    refs = {form: resolve(tracking, form).ref for form in ("memmc-cxr/1", "models:/memmc-cxr/1", "memmc-cxr/01")}
    assert set(refs.values()) == {one.ref}
    assert resolve(tracking, "memmc-cxr").ref == two.ref  # no champion: newest
    assert resolve(tracking, "memmc-cxr@challenger").ref == two.ref
    assert resolve(tracking).ref == other.ref  # no champion: newest of all
    tracking.client.set_registered_model_alias("memmc-cxr", CHAMPION, "1")
    for form in ("memmc-cxr", "models:/memmc-cxr@champion", "memmc-cxr@champion", None):
        assert resolve(tracking, form).ref == one.ref
    tracking.client.set_registered_model_alias("memmc-hand", CHAMPION, "1")
    with pytest.raises(ModelError, match="2 models have a champion and no cohort was named: memmc-cxr/1, memmc-hand/1"):
        resolve(tracking)
    local = resolve(tracking, str(tmp_path / "hand-33"))
    assert local.ref == f"local/{other.digest}"
    assert download(tracking, local) == tmp_path / "hand-33"


def test_a_cohort_is_scored_with_its_own_champion(tracking, tmp_path):
    one, two = registered(tracking, tmp_path, "cxr", b"1"), registered(tracking, tmp_path, "cxr", b"2")
    other = registered(tracking, tmp_path, "hand", b"3")
    # Before the first champion: the newest of the cohort's own model, of all where it has none.
    assert [resolve(tracking, cohort=cohort).ref for cohort in ("cxr", "other")] == [two.ref, other.ref]
    tracking.client.set_registered_model_alias("memmc-cxr", CHAMPION, "1")
    assert {resolve(tracking, cohort=cohort).ref for cohort in ("cxr", "hand", "other")} == {one.ref}
    tracking.client.set_registered_model_alias("memmc-hand", CHAMPION, "1")
    assert [resolve(tracking, cohort=cohort).ref for cohort in ("cxr", "hand")] == [one.ref, other.ref]
    with pytest.raises(ModelError, match="none is of cohort 'other': memmc-cxr/1, memmc-hand/1; name a model"):
        resolve(tracking, cohort="other")


def test_a_version_is_found_by_the_run_and_the_weights_it_was_made_of(tracking, tmp_path):
    one, two = registered(tracking, tmp_path, "cxr", b"1"), registered(tracking, tmp_path, "cxr", b"2")
    again = model_folder(tmp_path / "again", b"1")
    (again / "model.json").write_text(json.dumps({"format": 1, "train_seconds": 9.5}))
    assert registered_before(tracking, two.run_id, again, "memmc-cxr") is None
    assert registered_before(tracking, one.run_id, again, "memmc-hand") is None
    assert registered_before(tracking, one.run_id, model_folder(tmp_path / "other", b"3"), "memmc-cxr") is None
    assert resolve(tracking, "memmc-cxr@challenger").ref == two.ref
    found = registered_before(tracking, one.run_id, again, "memmc-cxr")
    assert (found.ref, found.digest) == (one.ref, one.digest)
    assert resolve(tracking, "memmc-cxr@challenger").ref == one.ref
    assert len(all_versions(tracking)) == 2


@pytest.mark.parametrize("form", ["nothing", "memmc-cxr/7", "memmc-cxr@champion", "a'b/1", "models:/m-1/2/3", ""])
def test_what_does_not_exist_is_answered_with_what_does(tracking, tmp_path, form):
    registered(tracking, tmp_path, "cxr")
    with pytest.raises(ModelError, match=r"it holds memmc-cxr/1 @challenger"):
        resolve(tracking, form)


def test_an_empty_registry_says_what_to_do(tracking):
    with pytest.raises(ModelError, match="memmc train"):
        resolve(tracking)


def test_models_of_others_in_the_same_registry_are_never_chosen(tracking, tmp_path):
    mine = registered(tracking, tmp_path, "cxr")
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n")
    tracking.client.create_registered_model("foreign")
    tracking.client.create_model_version("foreign", folder.as_uri())
    assert resolve(tracking).ref == mine.ref
    with pytest.raises(ModelError):
        resolve(tracking, "foreign")
    assert [version.ref for version in all_versions(tracking)] == [mine.ref]


@pytest.mark.parametrize("extra", ["model.pkl", "MLmodel", "sub/model.json", "weights.pt"])
def test_only_safetensors_and_json_go_in(tracking, tmp_path, extra):
    folder = model_folder(tmp_path / "m")
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_bytes(b"x")
    run = tracking.start_run("memmc/cxr", "train")
    with pytest.raises(ModelError, match="only"):
        register(tracking, run, folder, "memmc-cxr")
    assert all_versions(tracking) == []


def test_only_safetensors_and_json_come_out(tracking, tmp_path):
    version = registered(tracking, tmp_path, "cxr")
    stored = next((tracking.home / "mlartifacts").rglob("model.safetensors")).parent
    (stored / "model.pkl").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model\.pkl"):
        download(tracking, version)
    assert not list((tracking.home / "models").iterdir())


class Planted:
    """Unpickled, leaves a mark."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("planted", ["MLmodel", "python_model.pkl", "model.pt", "data/model.json", "loader.py"])
def test_what_could_run_code_is_never_fetched(tracking, tmp_path, planted):
    """As somebody with rights on the artifacts would plant it, beside or in place of the weights."""
    version = registered(tracking, tmp_path, "cxr")
    stored = next((tracking.home / "mlartifacts").rglob("model.safetensors")).parent
    mark = tmp_path / "ran"
    (stored / planted).parent.mkdir(exist_ok=True)
    if planted == "MLmodel":
        loader = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
        (stored / "code").mkdir()
        (stored / "code" / "evil_loader.py").write_text(loader)
        (stored / planted).write_text("flavors:\n  python_function:\n    loader_module: evil_loader\n    code: code\n")
    else:
        (stored / planted).write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(ModelError, match="only"):
        download(tracking, version)
    assert not mark.exists() and not list((tracking.home / "models").iterdir())
    pickle.loads(pickle.dumps(Planted(mark))).close()
    assert mark.exists()  # the plant works where it is unpickled


def test_a_pickle_in_the_place_of_the_weights_is_not_unpickled(tracking, tmp_path):
    mark = tmp_path / "ran"
    folder = tmp_path / "m"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "model-format-1" / "head", folder)
    load_model(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Planted(mark)))
    version = register(tracking, tracking.start_run("memmc/cxr", "train"), folder, "memmc-cxr")
    with pytest.raises(ModelError, match="header"):
        load_model(download(tracking, version))
    assert not mark.exists()


def test_changed_bytes_are_refused_at_the_source_and_in_the_kept_copy(tracking, tmp_path):
    version = registered(tracking, tmp_path, "cxr")
    stored = next((tracking.home / "mlartifacts").rglob("model.safetensors"))
    original = stored.read_bytes()
    stored.write_bytes(original[:-1] + b"b")
    with pytest.raises(IntegrityError, match=version.digest):
        download(tracking, version)
    stored.write_bytes(original)
    kept = download(tracking, version)
    (kept / "model.json").write_text("{}")
    with pytest.raises(IntegrityError, match=version.digest):
        download(tracking, version)


def test_a_folder_without_weights_is_not_a_model(tracking, tmp_path):
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        register(tracking, tracking.start_run("memmc/cxr", "train"), folder, "memmc-cxr")


def test_runs_hold_params_tags_and_all_metrics(tracking):
    run = tracking.start_run(
        "memmc/cxr", "train-1", {"git": "abc"}, {f"p{i}": i for i in range(150)} | {"long": "x" * 9000}
    )
    tracking.log_metrics(run, [(step, {"loss": 1 / (step + 1), "lr": 0.1}) for step in range(1000)])
    tracking.log_metrics(run, [(1000, {"loss": math.nan})])
    tracking.log_metrics(run, [])
    tracking.end_run(run, "FAILED")
    found = tracking.client.get_run(run)
    assert (found.info.run_name, found.info.status, found.data.tags["git"]) == ("train-1", "FAILED", "abc")
    assert found.data.params["p149"] == "149"
    assert [metric.step for metric in tracking.client.get_metric_history(run, "lr")] == list(range(1000))
    assert tracking.lost == 0
    assert tracking.client.get_experiment_by_name("memmc/cxr") is not None


def test_artifacts_lie_under_home(tracking, tmp_path):
    run = tracking.start_run("memmc/cxr", "train")
    (tmp_path / "report.html").write_text("ok")
    tracking.log_artifact(run, tmp_path / "report.html", "reports")
    (tmp_path / "report.html").unlink()  # what is logged is copied at once
    tracking.end_run(run)
    assert (tracking.waiting, tracking.lost) == (0, 0)
    assert [path for path in (tracking.home / "spool").rglob("*") if path.is_file()] == []
    assert [p.read_text() for p in (tracking.home / "mlartifacts").rglob("report.html")] == ["ok"]


def test_two_stores_in_one_process_do_not_mix(tracking, migrated, tmp_path):
    other_home = tmp_path / "other"
    other_home.mkdir()
    (other_home / "mlflow.db").write_bytes(migrated.read_bytes())
    other = open_tracking(TrackingConfig(), other_home)
    mine = registered(tracking, tmp_path, "cxr")
    assert all_versions(other) == []
    assert download(tracking, mine).is_relative_to(tracking.home)


def test_nothing_is_written_into_the_working_directory(migrated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / ".memmc"
    home.mkdir()
    (home / "mlflow.db").write_bytes(migrated.read_bytes())
    download(
        open_tracking(TrackingConfig(), home), registered(open_tracking(TrackingConfig(), home), tmp_path / "in", "cxr")
    )
    assert {path.name for path in tmp_path.iterdir()} == {".memmc", "in"}


@pytest.mark.parametrize("uri", ["file:///tmp/x", "./mlruns", "databricks", "ftp://host"])
def test_other_kinds_of_store_are_refused(uri, tmp_path):
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        open_tracking(TrackingConfig(uri=uri), tmp_path)


def test_a_store_that_cannot_be_opened_is_a_storage_error_without_credentials(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"tracking\.uri"):
        open_tracking(TrackingConfig(), tmp_path)
    with pytest.raises(StorageError) as caught:
        open_tracking(TrackingConfig(uri="http://user:secret@127.0.0.1:9"), tmp_path)
    assert "secret" not in str(caught.value)
