"""A real Orthanc (Debian's) takes results, over DICOMweb and its DICOM port. The scenario is in push_scenario.py."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from apart import played

pytestmark = pytest.mark.slow

IDENTIFIERS = ("QUOXX", "Müßig", "Überweiser", "1.2.840.99999.7", "correct-horse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """What the scenario tells; one run for all tests."""
    return played("push_scenario.py", folder)


def account(one: dict[str, Any]) -> tuple[int, int, int, int]:
    """Exit status, pushed, present, failed."""
    assert one["images"] == one["pushed"] + one["present"] + one["failed"]
    return one["status"], one["pushed"], one["present"], one["failed"]


def test_results_go_into_the_studies_of_their_films(told):
    films = told["films"]
    assert account(told["no study yet"]) == (1, 0, 0, films)
    assert told["no study yet"]["reasons"] == {"STUDY_ABSENT": films}
    assert account(told["dry run"]) == (0, films, 0, 0)
    assert told["held"] == {"CR": films, "SR": films, "OT": films}
    assert told["results"] == {"files": 2 * films, "strangers": 0, "patients": told["studies"]}


@pytest.mark.parametrize(
    ("killed", "after", "held"),
    [("killed, web", "web", "held"), ("killed, port", "port, second archive", "held, second archive")],
)
def test_a_killed_push_is_finished_by_the_next(told, killed, after, held):
    films = told["films"]
    cut = told[killed]
    assert films // 2 <= cut["SR"] + cut["OT"] < 2 * films
    status, pushed, present, failed = account(told[after])
    assert (status, failed, pushed + present) == (0, 0, films)
    assert told[after]["objects"] == 2 * films - cut["SR"] - cut["OT"]
    assert told[held] == {"CR": films, "SR": films, "OT": films}


def test_what_came_over_dicomweb_is_not_sent_again_over_the_dicom_port(told):
    assert account(told["port"]) == (0, 0, told["films"], 0)


def test_a_patient_that_was_merged_is_left_to_a_person(told):
    merged = told["merged patient"]
    assert merged["status"] == 1
    assert merged["reasons"] == {"PATIENT_DIFFERS": merged["failed"]}
    assert merged["pushed"] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [("stranger's title", "push.ae_title"), ("wrong title", "push.uri"), ("wrong password", "push.user")],
)
def test_an_archive_that_does_not_let_us_in_is_told_with_what_to_look_at(told, call, words):
    assert told[call]["status"] == 1
    assert words in told[call]["output"]


def test_the_objects_in_the_archive_conform(told, folder):
    """By dciodvfy, the standard's checker; no error in any of them."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("needs the Debian package dicom3tools")
    errors: list[str] = []
    for file in sorted((folder / "results").iterdir()):
        done = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
        errors += [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert errors == []


def test_no_identifier_and_no_password_is_left_behind(told):
    assert told["leaks"] == []
    said = told["output"] + "".join(one["output"] for one in told.values() if isinstance(one, dict) and "output" in one)
    assert len(said) > 1000
    assert not [word for word in IDENTIFIERS if word in said]
