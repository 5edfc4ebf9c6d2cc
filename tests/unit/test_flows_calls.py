import getpass
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.runtime import deployment

from flows import calls
from flows.calls import (
    _acting_as_deployment,
    call_flow,
    config_of,
    given_place,
    has_caller,
    is_transient,
    keep_result,
    overrides_of,
    place_shown,
    refuse_credentials,
)
from flows.naming import artifact_key
from flows.summary import as_markdown
from memmc.config import Config, load_config
from memmc.errors import ConfigError, DataError, GateRefused, StorageError, UsageError
from memmc.lake.audit import record_name
from memmc.pipeline.audit import note
from memmc.pipeline.progress import Silent


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["lake.uri=s3://bucket/prefix", "ray.num_cpus=4", "select.modalities=CR,DX", "train.use_gpu=false"],
        ["train.preset=small"],
        ["train.preset=small", "model.encoder_dim=192", "model.memory_slots=16"],
        ["train.preset=base", "score.scorer=gms", "deid.key_file=/keys/key", "train.base_lr=0.00037"],
        ["score.scorer=pasted_ms_ssim"],
        ["score.scorer=pasted_ms_ssim", "score.passes=4"],
        ["model.norm_pix_loss=true", "split.train=0.66", "split.calibrate=0.17", "split.test=0.17"],
    ],
)
def test_overrides_give_back_the_same_configuration(settings, monkeypatch):
    config = load_config(overrides=settings)
    overrides = json.loads(json.dumps(overrides_of(config)))
    assert config_of(overrides) == config
    assert sum(len(fields) for fields in overrides.values()) <= len(settings)


def test_only_what_differs_is_shown():
    assert overrides_of(Config()) == {}
    assert overrides_of(load_config(overrides=["train.preset=small", "score.passes=8"])) == {
        "train": {"preset": "small"},
        "score": {"passes": 8},
    }


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["tiny", "small", "base"]), st.sampled_from([192, 384, 768]), st.sampled_from([0, 16, 40]))
def test_explicit_values_equal_to_another_presets_default_survive(preset, dim, slots):
    config = load_config(
        overrides=[f"train.preset={preset}", f"model.encoder_dim={dim}", f"model.memory_slots={slots}"]
    )
    assert config_of(overrides_of(config)) == config


def test_a_deployed_run_takes_its_parameter_over_the_environment(monkeypatch):
    monkeypatch.setenv("MEMMC_TRACKING__URI", "http://mlflow:5000")
    monkeypatch.setenv("MEMMC_SCORE__PASSES", "8")
    config = config_of({"score": {"passes": 4}})
    assert (config.tracking.uri, config.score.passes) == ("http://mlflow:5000", 4)


@pytest.mark.parametrize("overrides", [{"nothing": {"x": 1}}, {"train": {"sed": 1}}, {"data": {"bits": 12}}])
def test_a_wrong_parameter_is_refused(overrides):
    with pytest.raises(ConfigError):
        config_of(overrides)


@pytest.mark.parametrize(
    "parameters",
    [
        {"source": "s3://key:secret@bucket/x"},
        {"config": {"tracking": {"uri": "postgresql://memmc:pw@db/mlflow"}}},
    ],
)
def test_credentials_never_become_parameters(parameters):
    with pytest.raises(UsageError, match="environment") as caught:
        refuse_credentials(parameters)
    assert "secret" not in str(caught.value)


def test_plain_places_are_accepted():
    refuse_credentials(
        {"source": "s3://bucket/a@b", "config": {"tracking": {"uri": "http://mlflow:5000"}}, "label": None}
    )


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/data/DOE^JANE", "a local path"),
        ("doe", "a local path"),
        ("file:///data/doe", "a local path"),
        ("s3://bucket/doe/x", "s3://bucket"),
        ("orthanc+https://pacs:8042", "orthanc+https://pacs:8042"),
        ("dicomweb+https://pacs/doe", "dicomweb+https://pacs"),
    ],
)
def test_of_a_place_prefect_sees_no_path(place, shown):
    assert place_shown(place) == shown


def test_a_deployed_run_goes_by_its_parameter():
    assert given_place("source", "s3://bucket/x") == "s3://bucket/x"


def test_only_a_place_out_of_reach_is_worth_another_try():
    class State:
        def __init__(self, data):
            self.data = data

    assert is_transient(None, None, State(StorageError("x")))
    assert not any(is_transient(None, None, State(e)) for e in (DataError("x"), ValueError("x"), OSError("x")))


@pytest.mark.parametrize("cohort", ["cxr_2026.a", "a--b", "a", "x" * 64])
def test_artifact_keys_have_prefects_alphabet(cohort):
    assert artifact_key("ingest", cohort).replace("-", "").isalnum()
    assert artifact_key("ingest", cohort) == artifact_key("ingest", cohort).lower()


def test_markdown_flattens_and_escapes():
    text = as_markdown("T", {"a": 0.123456, "b": {"c": "x|y"}, "d": None})
    assert text.splitlines() == ["## T", "", "| | |", "|---|---|", "| a | 0.1235 |", "| b.c | x\\|y |"]


def test_the_audit_trail_names_the_deployment_that_runs(tmp_path, monkeypatch):
    config = load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])
    monkeypatch.delenv("MEMMC_ACTOR", raising=False)

    def gone():
        raise RuntimeError("the server restarts")

    user = getpass.getuser()
    nightly, nobody = (lambda: "ingest-nightly"), (lambda: None)
    for run, name, expected in (
        ("", nightly, (user, "os-user")),  # no worker's process: the server is not asked
        ("a-run", nightly, ("ingest-nightly", "deployment")),
        ("a-run", nobody, (user, "os-user")),
        ("a-run", gone, (user, "os-user")),
    ):
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", run)
        monkeypatch.setitem(deployment.FIELDS, "name", name)
        with _acting_as_deployment():
            head = note(config, "ingest")
        record = json.loads((tmp_path / "lake" / record_name(head.sequence)).read_text())
        assert (record["actor"], record["actor_basis"], record["actor_verified_by"]) == (*expected, None)


def test_what_a_refused_flow_has_found_reaches_its_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "prepare", lambda home: None)
    monkeypatch.setattr(calls, "await_server", lambda: None)

    def run(found, error):
        def flow(**_shown):
            assert has_caller()
            if found:
                keep_result(found)
            raise error

        return call_flow(lambda: flow, {"cohort": "cxr"}, config=Config(), home=tmp_path, progress=Silent())

    assert run({"verdict": "refused"}, GateRefused("worse")) == {"verdict": "refused"}
    with pytest.raises(GateRefused, match="worse"):
        run(None, GateRefused("worse"))
    with pytest.raises(DataError, match="nothing"):
        run({"verdict": "refused"}, DataError("nothing"))
    assert not has_caller()
