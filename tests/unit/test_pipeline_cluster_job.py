import io
import json
from dataclasses import asdict
from unittest.mock import Mock

import pytest

from memmc import errors
from memmc.cli import main
from memmc.config import RayConfig
from memmc.errors import DataError, MemmcError, StorageError
from memmc.lake.commit import LostTurnError
from memmc.pipeline.cluster_job import _command, _named, _outcome, takes_jobs
from memmc.pipeline.progress_lines import ProgressLines, pass_on
from memmc.pipeline.results import ReportResult, ScoreResult
from memmc.s3 import AccessRefusedError, S3Error

CANARY = "SMITH^JOHN"
SCORED = ScoreResult(
    model="memmc-cxr/1", calibration_id="c", cohort="cxr", instances=6, scored=6, already_scored=0, abnormal=1,
    version=1, seconds=1.0, images_per_second=6.0,
)  # fmt: skip


class Listener:
    def __init__(self):
        self.heard = []

    def stage(self, name, total=None):
        self.heard.append(("stage", name, total))

    def advance(self, done, note=""):
        self.heard.append(("advance", done, note))

    def message(self, text):
        self.heard.append(("message", text))


def test_progress_comes_out_of_its_lines_as_it_went_in():
    out, listener = io.StringIO(), Listener()
    lines = ProgressLines(out, every_s=0)
    lines.stage("score", 120)
    lines.advance(40, "13 images/s")
    lines.stage("report")
    lines.message("two\nlines, \u00e9 and {}")
    assert all(pass_on(line, listener) for line in out.getvalue().splitlines())
    assert listener.heard == [
        ("stage", "score", 120),
        ("advance", 40, "13 images/s"),
        ("stage", "report", None),
        ("message", "two\nlines, \u00e9 and {}"),
    ]


def test_progress_is_not_said_at_every_step():
    out = io.StringIO()
    lines = ProgressLines(out, every_s=60)
    lines.stage("score", 3)
    for done in range(100):
        lines.advance(done)
    assert len(out.getvalue().splitlines()) == 2


@pytest.mark.parametrize(
    "line",
    [
        CANARY,
        f"Traceback: could not convert string to float: '{CANARY}'",
        json.dumps({"text": CANARY}),
        json.dumps({"memmc": "shout", "text": CANARY}),
        json.dumps({"memmc": "message", "text": [CANARY]}),
        json.dumps({"memmc": "message", "text": "x", "patient": CANARY}),
        json.dumps({"memmc": "stage", "name": "score", "total": CANARY}),
        json.dumps({"memmc": "advance", "done": CANARY, "note": ""}),
        json.dumps({"memmc": "message", "text": CANARY})[:-1],
        " " + json.dumps({"memmc": "message", "text": CANARY}),
        json.dumps([CANARY]),
    ],
)
def test_no_other_line_of_a_log_is_passed_on(line):
    listener = Listener()
    assert not pass_on(line, listener)
    assert not listener.heard


def log(*lines):
    return "\n".join(["Loading ...", *(json.dumps(line) for line in lines), f"warning: {CANARY}", ""])


def test_the_result_is_typed_and_the_last_that_fits():
    earlier = asdict(SCORED) | {"scored": 1}
    found = _outcome(log(earlier, asdict(SCORED), {"model": "other"}), "SUCCEEDED", "job", ScoreResult)
    assert found == SCORED
    with pytest.raises(MemmcError, match="without a result"):
        _outcome(log(asdict(SCORED)), "SUCCEEDED", "job", ReportResult)


def test_a_failed_job_has_no_result_even_if_one_was_printed():
    with pytest.raises(MemmcError, match="FAILED") as caught:
        _outcome(log(asdict(SCORED)), "FAILED", "job", ScoreResult)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("name", ["DataError", "StorageError", "PreprocessMismatch", "GateRefused", "DivergedError"])
def test_errors_come_back_by_their_name(name):
    with pytest.raises(MemmcError, match=r"^do this$") as caught:
        _outcome(log({"error": name, "message": "do this"}), "FAILED", "job", ScoreResult)
    assert type(caught.value) is getattr(errors, name)


def test_an_error_that_only_another_module_knows_comes_back_as_its_nearest_kin(monkeypatch, capsys):
    """What is worth another try here is worth one there: a task tries again after a StorageError alone."""
    for error in (S3Error("do this"), AccessRefusedError("do this"), LostTurnError("do this")):
        monkeypatch.setattr(main, "app", Mock(side_effect=error))
        monkeypatch.setattr("sys.argv", ["memmc", "score", "--json"])
        with pytest.raises(SystemExit):
            main.main()
        with pytest.raises(StorageError, match=r"^do this$"):
            _outcome(capsys.readouterr().out, "FAILED", "job", ScoreResult)


@pytest.mark.parametrize("name", ["SystemExit", "annotations", "__doc__", "nothing"])
def test_a_name_that_is_no_error_of_ours_stands_for_none(name):
    assert _named(name) is MemmcError
    assert _named("DataError") is DataError


def test_a_job_stopped_over_there_says_so():
    with pytest.raises(MemmcError, match="stopped on the cluster"):
        _outcome("", "STOPPED", "job", ScoreResult)


def test_the_command_is_one_shell_line_whatever_stands_in_it(monkeypatch):
    monkeypatch.setenv("MEMMC_ACTOR", "the night's run")
    who = "MEMMC_PROGRESS=lines 'MEMMC_ACTOR=the night'\"'\"'s run'"
    arguments = ["score", "--cohort", "c; rm -rf /", "--set", "lake.uri=/a b"]
    assert _command(RayConfig(), arguments) == (
        f"exec env {who} memmc score --cohort 'c; rm -rf /' --set 'lake.uri=/a b'"
    )
    ray = RayConfig(job_directory="/srv/it's", job_command="/opt/memmc/bin/memmc")
    assert _command(ray, ["doctor"]) == (f"cd '/srv/it'\"'\"'s' && exec env {who} /opt/memmc/bin/memmc doctor")


@pytest.mark.parametrize(
    ("address", "jobs"),
    [("http://ray:8265", True), ("https://ray", True), ("auto", False), ("ray:6379", False), (None, False)],
)
def test_which_addresses_take_jobs(address, jobs):
    assert takes_jobs(RayConfig(address=address)) is jobs
