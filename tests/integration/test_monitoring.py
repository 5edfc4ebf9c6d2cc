"""The monitor flow on a real local server, and a short simulated year through the whole loop."""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memmc.config import load_config
from memmc.monitoring.watch import Alarm
from memmc.pipeline.monitor import MonitorResult
from memmc.pipeline.progress import Silent

pytestmark = pytest.mark.slow

YEAR = Path(__file__).parents[2] / "infra" / "benchmarks" / "simulated_year.py"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
SHIFT = {
    "group": "pixels", "name": "mean", "stratum": "pooled", "num_baseline": 90, "num_window": 40, "p_value": 1e-6,
    "effect": 0.5, "adjusted": 1e-5, "drifted": True,
}  # fmt: skip


def look(**change):
    fields = {"cohort": "cxr", "run": "watch-cxr-1", "model": "memmc-cxr/1", "calm": True, "alarms": []}
    return MonitorResult(**{**fields, "drift": {"shifts": [SHIFT]}, "canaries": {"curve": [{"size": 0.1}]}, **change})


def events_with(client, prefix, count):
    """Return events of our own that the server keeps, waiting until it keeps so many."""
    for _ in range(60):
        answer = client._client.post("/events/filter", json={"filter": {"event": {"prefix": [prefix]}}})
        found = answer.json()["events"]
        if len(found) >= count:
            return found
        time.sleep(0.5)
    raise AssertionError(f"{len(found)} events of {prefix}, expected {count}")


def test_alarms_are_events_and_what_was_found_is_shown(home, tmp_path, monkeypatch):
    from prefect import get_client

    import memmc.pipeline.monitor as step
    from flows import monitor

    config = load_config(overrides=[f"lake.uri={tmp_path / 'lake'}"])
    alarms = [vars(Alarm.of("no_data", "80 h")), vars(Alarm.of("drift", "pixels: mean"))]
    results = iter([look(), look(calm=False, alarms=alarms)])
    monkeypatch.setattr(step, "monitor", lambda *_, **__: next(results))
    monkeypatch.setattr(step, "picture_of", lambda *_: PNG)
    for _ in range(2):
        monitor.run(config, "cxr", home=home, progress=Silent())
    with get_client(sync_client=True) as client:
        assert len(events_with(client, "memmc.monitor.calm", 1)) == 1
        found = events_with(client, "memmc.alarm.", 2)
        assert {event["event"] for event in found} == {"memmc.alarm.no_data", "memmc.alarm.drift"}
        assert {event["resource"]["prefect.resource.id"] for event in found} == {"memmc.cohort.cxr"}
        assert all(set(event["payload"]) == {"cohort", "model", "run", "found", "to_do"} for event in found)
        artifacts = client._client.post("/artifacts/filter", json={}).json()
        kinds = {(item["key"], item["type"]) for item in artifacts if item["key"]}
        assert {("monitor-cxr", "markdown"), ("monitor-cxr-drift", "table"), ("monitor-cxr-trend", "markdown")} <= kinds
        newest = [item["data"] for item in artifacts if item["key"] == "monitor-cxr"]
        assert any("no_data" in text and "look at the source" in text for text in newest)
        assert any("No alarm stands" in text for text in newest)


@pytest.mark.skipif(not os.environ.get("MEMMC_TEST_YEAR"), reason="takes ten minutes: set MEMMC_TEST_YEAR")
@pytest.mark.timeout(1200)
def test_a_short_year_goes_as_expected(tmp_path):
    command = [sys.executable, str(YEAR), "--weeks", "6", "--steps", "250", "--out", str(tmp_path / "year")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    year = json.loads((tmp_path / "year" / "year.json").read_text())
    assert all(year["met"].values())
    assert (tmp_path / "year" / "timeline.png").stat().st_size > 5000
