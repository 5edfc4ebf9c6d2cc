"""A real Orthanc (Debian's) as a source: nothing missed, nothing twice. The scenario is in orthanc_scenario.py."""

from __future__ import annotations

from typing import Any

import pytest
from apart import played

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scenario tells; one run for all tests."""
    return played("orthanc_scenario.py", tmp_path_factory.mktemp("o"))


def counts(account: dict[str, Any]) -> tuple[int, int, int]:
    """Stored, duplicate, pending."""
    assert account["seen"] == sum(account[name] for name in ("stored", "duplicate", "excluded", "quarantined"))
    assert account["excluded"] == account["quarantined"] == 0
    return account["stored"], account["duplicate"], account["pending"]


def test_three_rounds_miss_nothing_and_take_nothing_twice(told):
    assert counts(told["first"]) == (75, 0, 0)
    assert counts(told["second"]) == (65, 0, 0)
    assert counts(told["third"]) == (60, 1, 0)  # the instance that was deleted and sent again
    assert told["third"]["reasons"] == {"same_object": 1}
    rows = told["rows"]["cxr"]
    assert (rows["stored"], rows["uids"]) == (200, 200)
    assert rows["rows"] == rows["keys"]
    assert told["archive"]["CountInstances"] == 200


def test_a_run_with_nothing_new_commits_nothing_and_asks_little(told):
    for first, again in (("first", "first again"), ("third", "third again"), ("web", "web again")):
        assert told[again]["version"] == told[first]["version"]
        assert told[again]["stored"] == 0
    assert told["first again"]["seen"] == told["third again"]["seen"] == 0  # the cursor stands behind them all


def test_studies_that_are_still_arriving_wait(told):
    assert counts(told["second, too early"]) == (0, 0, 65)
    assert told["second, too early"]["version"] == told["first"]["version"]


def test_dicomweb_gives_the_same_instances(told):
    assert counts(told["web"]) == (200, 0, 0)
    assert told["rows"]["web"] == {**told["rows"]["web"], "rows": 200, "stored": 200, "uids": 200}
    assert told["rows"]["web"]["digest"] == told["rows"]["cxr"]["digest"]


def test_an_archive_set_up_anew_is_read_from_its_beginning(told):
    assert counts(told["set up anew"]) == (0, 30, 0)
    assert told["set up anew"]["reasons"] == {"same_object": 30}


def test_no_identifier_and_no_password_is_left_behind(told):
    assert told["leaks"] == []
    assert not any(word in told["output"] for word in ("MUSTERMANN", "HOSPITAL-00", "ACC-4711", "correct-horse"))
    assert "1.2.826.0.1.3680043.8.498.4711" not in told["output"]
