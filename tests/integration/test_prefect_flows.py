"""The flows on a real local server; the pipeline's functions are replaced only to inject faults and to be quick."""

import base64
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from unittest.mock import Mock

import pytest

from memmc.config import load_config
from memmc.errors import (
    DataError,
    GateRefused,
    IdentityKeyError,
    MissingClassError,
    PreprocessMismatch,
    StorageError,
    UsageError,
)
from memmc.pipeline.progress import Silent
from memmc.pipeline.results import EvaluationResult, IngestResult, ReportResult, ScoreResult, TrainResult

pytestmark = pytest.mark.slow

CANARY = "SMITH^JOHN"
ACCOUNT = IngestResult(
    seen=10, stored=6, duplicate=1, excluded=2, quarantined=1,
    reasons={"already_ingested": 1, "modality": 2, "PARSE_LENGTH": 1}, version=3, cohort="cxr", run="ingest-cxr-1",
)  # fmt: skip
TRAINED = TrainResult(
    model="memmc-cxr/1", model_digest="0" * 16, run="train-cxr-1", cohort="cxr", steps=10, loss=0.5, num_images=6,
    dataset_version=3, preprocess_id="0" * 16, train_seconds=1.0, seconds=2.0, calibration={"threshold": 0.75},
)  # fmt: skip
SCORED = ScoreResult(
    model="memmc-cxr/1", calibration_id="c", cohort="cxr", instances=6, scored=6, already_scored=0, abnormal=1,
    version=1, seconds=1.0, images_per_second=6.0,
)  # fmt: skip


class Listener(Silent):
    """The caller's progress."""

    def __init__(self):
        self.heard = []

    def stage(self, name, total=None):
        self.heard.append(("stage", name, total))

    def message(self, text):
        self.heard.append(("message", text))


@pytest.fixture
def client(home):
    from prefect import get_client

    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(autouse=True)
def no_waiting(home, monkeypatch):
    from flows import ingest, score

    monkeypatch.chdir(home.parent)  # what a run shows is read from MLflow's file there
    monkeypatch.setattr(ingest, "ingest_objects", ingest.ingest_objects.with_options(retry_delay_seconds=[0, 0]))
    monkeypatch.setattr(score, "score_instances", score.score_instances.with_options(retry_delay_seconds=[0, 0]))


def fake(monkeypatch, name, function):
    """Put `function` in the place of a step; its module is not imported."""
    monkeypatch.setitem(sys.modules, f"memmc.pipeline.{name}", types.SimpleNamespace(**{name: function}))


def newest_run(client):
    return max(client.read_flow_runs(), key=lambda run: run.created)


def task_runs_of(client, run, count):
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    end = time.monotonic() + 30
    while True:  # task runs arrive as events
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
        if (
            len(found) >= count and all(task.state and task.state.is_final() for task in found)
        ) or time.monotonic() > end:
            return {task.name.rsplit("-", 1)[0]: task for task in found}
        time.sleep(0.3)


def artifacts_of(client, run):
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])))
    return {artifact.key: artifact for artifact in found}


def logs_of(client, run, until):
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    end = time.monotonic() + 30
    while True:
        text = "\n".join(
            log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
        )
        if until in text or time.monotonic() > end:
            return text
        time.sleep(0.3)


def test_ingest_runs_as_a_flow_with_its_account_shown(home, client, monkeypatch):
    from flows import ingest

    calls = []

    def step(config, source, cohort, *, label, labels_file, progress):
        calls.append((config, source, cohort, label, labels_file))
        progress.stage("convert", 10)
        progress.advance(7, "7 of 10")
        progress.message("10 objects listed, 9 new")
        return ACCOUNT

    fake(monkeypatch, "ingest", step)
    private = ["source.uri=/data/DOE^JANE", "source.labels_file=/data/doe.csv", "deid.key_file=/keys/doe"]
    config = load_config(overrides=["score.passes=8", "lake.uri=/data/lake", *private])
    listener = Listener()
    result = ingest.run(config, "/data/DOE^JANE", "cxr", None, "/data/doe.csv", home=home, progress=listener)

    assert result == ACCOUNT
    assert calls == [(config, "/data/DOE^JANE", "cxr", None, "/data/doe.csv")]
    assert ("stage", "convert", 10) in listener.heard
    assert ("message", "10 objects listed, 9 new") in listener.heard
    run = newest_run(client)
    assert re.fullmatch(r"ingest-cxr-v3-\d{8}-\d{4}", run.name)
    assert run.state.is_completed()
    assert run.parameters["config"] == {"score": {"passes": 8}, "lake": {"uri": "/data/lake"}}
    assert (run.parameters["source"], run.parameters["labels_file"]) == ("a local path", "a local path")
    assert "doe" not in run.model_dump_json().lower()
    shown = artifacts_of(client, run)
    assert set(shown) == {"ingest-cxr", "ingest-cxr-convert"}
    assert shown["ingest-cxr-convert"].data == 100
    assert '"quarantined", "objects": 1' in shown["ingest-cxr"].data
    assert '"reason PARSE_LENGTH", "objects": 1' in shown["ingest-cxr"].data
    assert "10 objects listed, 9 new" in logs_of(client, run, "9 new")
    assert list(task_runs_of(client, run, 1)) == ["ingest-objects"]


def test_a_secret_block_reaches_the_step_in_memory_alone(home, client, monkeypatch):
    from prefect.blocks.system import Secret

    from flows import ingest
    from memmc.pipeline.custody import handed_over

    key, held = secrets.token_hex(32), []
    Secret(value=key).save("identity", overwrite=True)

    def step(*_, **__):
        held.append(handed_over())
        return ACCOUNT

    fake(monkeypatch, "ingest", step)
    config = load_config(overrides=["deid.key_secret=identity"])
    assert ingest.run(config, "/data", "cxr", home=home, progress=Silent()) == ACCOUNT
    assert held == [key.encode()]
    assert handed_over() is None
    run = newest_run(client)
    assert run.parameters["config"] == {"deid": {"key_secret": "identity"}}
    for form in (key, key.encode().hex(), base64.b64encode(key.encode()).decode()):
        assert form not in run.model_dump_json() + logs_of(client, run, "Finished")
    with pytest.raises(IdentityKeyError, match="key_secret"):
        ingest.run(load_config(overrides=["deid.key_secret=absent"]), "/data", "cxr", home=home, progress=Silent())
    assert len(held) == 1


def test_a_place_out_of_reach_is_tried_again(home, client, monkeypatch):
    from flows import ingest

    tries = []

    def step(*_, **__):
        tries.append(1)
        if len(tries) == 1:
            raise StorageError("the lake could not be read")
        if len(tries) == 2:
            raise ConnectionResetError(f"connection to {CANARY} reset")
        return ACCOUNT

    fake(monkeypatch, "ingest", step)
    assert ingest.run(load_config(), "/data", "cxr", home=home, progress=Silent()) == ACCOUNT
    run = newest_run(client)
    assert task_runs_of(client, run, 1)["ingest-objects"].run_count == 3
    assert run.state.is_completed()


@pytest.mark.parametrize("kind", [DataError, PreprocessMismatch, GateRefused, UsageError])
def test_other_errors_are_not_tried_again_and_come_out_as_they_are(home, client, monkeypatch, kind):
    from flows import score

    tries = []

    def step(*_, **__):
        tries.append(1)
        try:
            raise ValueError(f"could not convert string to float: '{CANARY}'")
        except ValueError as cause:
            raise kind("the data cannot do that; do this") from cause

    fake(monkeypatch, "score", step)
    with pytest.raises(kind, match=r"^the data cannot do that; do this$") as caught:
        score.run(load_config(), "cxr", home=home, progress=Silent())
    assert type(caught.value) is kind
    assert len(tries) == 1
    run = newest_run(client)
    assert run.state.is_failed()
    assert "the data cannot do that" in run.state.message


def test_a_place_that_stays_out_of_reach_is_a_storage_error(home, client, monkeypatch):
    from flows import ingest

    def step(*_, **__):
        raise StorageError("the lake could not be read")

    fake(monkeypatch, "ingest", step)
    with pytest.raises(StorageError, match=r"^the lake could not be read$"):
        ingest.run(load_config(), "/data", "cxr", home=home, progress=Silent())
    assert task_runs_of(client, newest_run(client), 1)["ingest-objects"].run_count == 3


def test_the_text_of_an_unforeseen_error_reaches_the_caller_and_never_prefect(home, client, monkeypatch):
    from flows import ingest

    def step(*_, **__):
        raise KeyError(CANARY)

    fake(monkeypatch, "ingest", step)
    with pytest.raises(KeyError, match="SMITH"):
        ingest.run(load_config(), "/data", "cxr", home=home, progress=Silent())
    run = newest_run(client)
    assert run.state.is_failed()
    assert "unexpected KeyError" in run.state.message
    assert "withheld" in logs_of(client, run, "withheld")
    stored = [path for path in (home / "prefect").rglob("*") if path.is_file()]
    assert any(b"withheld" in path.read_bytes() for path in stored)  # the search can find what is there
    assert not [path.name for path in stored if CANARY.encode() in path.read_bytes()]


def test_train_summarises_its_model(home, client, monkeypatch):
    from flows import train

    fake(monkeypatch, "train", lambda config, cohort, *, progress: TRAINED)
    assert train.run(load_config(overrides=["train.preset=small"]), "cxr", home=home, progress=Silent()) == TRAINED
    run = newest_run(client)
    assert run.parameters["config"] == {"train": {"preset": "small"}}
    assert "| calibration.threshold | 0.75 |" in artifacts_of(client, run)["train-cxr"].data


def evaluation():
    return EvaluationResult(
        auroc=0.9, auroc_low=0.8, auroc_high=0.95, average_precision=0.7, controls={"mean": 0.5}, num_normal=5,
        num_abnormal=1, model="memmc-cxr/1", cohort="cxr", calibration_id="c", scorer="l1",
        average_precision_low=0.5, average_precision_high=0.8, false_positive_rate=0.05, false_positive_rate_low=0.0,
        false_positive_rate_high=0.1, chosen_false_positive_rate=0.05, sensitivity=0.8,
    )  # fmt: skip


def test_score_measures_and_reports_on_request(home, client, monkeypatch):
    from flows import score

    seen = []
    fake(monkeypatch, "score", lambda config, cohort, model, *, since, limit, progress: SCORED)
    fake(monkeypatch, "evaluate", lambda config, cohort, model, *, progress: seen.append(model) or evaluation())
    page = ReportResult(report="/data/lake/reports/cxr.html", model="memmc-cxr/1", cohort="cxr")
    fake(monkeypatch, "report", lambda config, cohort, model, *, progress: page)
    wanted = {"evaluate": True, "report": True}
    assert score.run(load_config(), "cxr", "memmc-cxr", home=home, progress=Silent(), **wanted) == SCORED
    run = newest_run(client)
    shown = artifacts_of(client, run)
    assert set(shown) == {"score-cxr", "evaluate-cxr", "report-cxr"}
    assert "| auroc | 0.9 |" in shown["evaluate-cxr"].data
    assert "file:///data/lake/reports/cxr.html" in shown["report-cxr"].data
    assert seen == ["memmc-cxr/1"]  # the version that was scored, not the name that was asked for
    assert set(task_runs_of(client, run, 3)) == {"score-instances", "evaluate-model", "write-report"}


def test_a_cohort_without_labels_is_scored_and_not_measured(home, client, monkeypatch):
    from flows import score

    fake(monkeypatch, "score", lambda config, cohort, model, *, since, limit, progress: SCORED)
    fake(monkeypatch, "evaluate", Mock(side_effect=MissingClassError("no labelled image")))
    assert score.run(load_config(), "cxr", home=home, progress=Silent(), evaluate=True) == SCORED
    run = newest_run(client)
    assert run.state.is_completed()
    assert set(artifacts_of(client, run)) == {"score-cxr"}
    assert "not evaluated: no labelled image" in logs_of(client, run, "not evaluated")
    fake(monkeypatch, "evaluate", Mock(side_effect=DataError("the window is closed")))
    with pytest.raises(DataError, match="the window is closed"):
        score.run(load_config(), "cxr", home=home, progress=Silent(), evaluate=True)


def test_progress_is_throttled(home, client, monkeypatch):
    from flows import ingest
    from flows.progress import PrefectProgress

    sent = []
    publish = PrefectProgress._publish
    monkeypatch.setattr(PrefectProgress, "_publish", lambda self, *now: sent.append(now) or publish(self, *now))

    def step(*_, progress, **__):
        progress.stage("convert", 1000)
        for done in range(1000):
            progress.advance(done)
            time.sleep(0.005)
        return ACCOUNT

    fake(monkeypatch, "ingest", step)
    ingest.run(load_config(), "/data", "cxr", home=home, progress=Silent())
    assert 2 <= len(sent) <= 6
    assert sent[-1][:2] == ("convert", 100.0)
    assert artifacts_of(client, newest_run(client))["ingest-cxr-convert"].data == 100


def test_bad_parameters_start_no_run(home, client, monkeypatch):
    from flows import ingest

    before = len(client.read_flow_runs())
    with pytest.raises(UsageError, match="environment"):
        ingest.run(load_config(), "s3://key:secret@bucket/x", "cxr", home=home, progress=Silent())
    assert len(client.read_flow_runs()) == before


def test_a_cohort_that_is_no_name_never_becomes_one(home, client):
    from flows import ingest

    with pytest.raises(UsageError):
        ingest.run(load_config(), "/data", CANARY, home=home, progress=Silent())
    assert not [
        path for path in (home / "prefect").rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def test_the_local_server_wants_its_password(home):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/admin/version", timeout=20)
    assert caught.value.code == 401


def test_the_local_server_ends_with_a_killed_process(tmp_path):
    code = (
        "from pathlib import Path; from flows.server import LocalServer; import time\n"
        "server = LocalServer(Path('.')); print(server._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    server = int(parent.stdout.readline())
    os.kill(server, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(server, signal.SIGKILL)
    raise AssertionError("the server outlived its process")


def test_a_server_out_of_reach_is_a_storage_error_in_time(tmp_path):
    code = (
        "from pathlib import Path; from flows import ingest; from memmc.config import Config\n"
        "from memmc.errors import StorageError; from memmc.pipeline.progress import Silent\n"
        "try:\n    ingest.run(Config(), '/data', 'cxr', home=Path('.memmc'), progress=Silent())\n"
        "except StorageError as error:\n    print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert "check PREFECT_API_URL" in done.stdout
