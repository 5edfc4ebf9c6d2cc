"""What is shown beside a run's account never fails the run, and never says what a step's error said."""

import logging

import pytest

from flows.cockpit import shown
from flows.status import as_page
from memmc.errors import StorageError


@pytest.fixture
def log(caplog):
    from prefect.logging import disable_run_logger

    with disable_run_logger(), caplog.at_level(logging.WARNING):
        yield caplog


def fail(error):
    def show(_):
        raise error

    return show


def test_what_can_be_shown_is_returned(log):
    assert shown("it", {"score": {"passes": 8}}, lambda config: config.score.passes) == 8


@pytest.mark.parametrize("error", [StorageError("the lake is away"), KeyError("SMITH^JOHN"), OSError("/data/doe")])
def test_a_lack_never_fails_a_run(log, error):
    assert shown("the curves", None, fail(error)) is None


def test_a_wrong_setting_is_a_lack_too(log):
    assert shown("it", {"score": {"pases": 8}}, lambda config: config) is None


ROW = {
    "deployment": "ingest/scheduled", "paused": False, "last": "ingest-cxr-v3-20261122-0100", "state": "COMPLETED",
    "ended": "2026-11-22 01:02", "recent": {"COMPLETED": 95, "CANCELLED": 1}, "next": "2026-11-22 01:15",
}  # fmt: skip
LAKE = {
    "dataset_version": 3, "cohorts": {"cxr": {"stored": 10, "excluded": 2}}, "scores": 9, "abnormal": 1,
    "champions": ["memmc-cxr/2"], "models": 2,
}  # fmt: skip


def test_the_page_says_that_all_is_well():
    page = as_page([ROW], LAKE, 24.0)
    assert page.startswith("# All well.")
    assert "| 1 cancelled, 95 completed | 2026-11-22 01:15 |" in page
    assert "| cxr | 10 | 0 | 2 | 0 |" in page
    assert "9 scores, 1 abnormal; 2 models, champion: memmc-cxr/2." in page


@pytest.mark.parametrize("state", ["FAILED", "CRASHED"])
def test_the_page_names_first_what_to_look_at(state):
    page = as_page([ROW, ROW | {"deployment": "score/scheduled", "state": state}], None, 24.0)
    assert page.startswith("# **Look at** `score/scheduled`.")
    assert "The lake could not be read" in page


def test_a_deployment_that_never_ran_and_one_that_is_paused():
    never = {**ROW, "last": None, "state": None, "ended": None, "recent": {}, "next": None}
    page = as_page([never, never | {"paused": True}], LAKE, 24.0)
    assert "| - | never ran | - | none | by hand |" in page and "| none | paused |" in page
