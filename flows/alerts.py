"""The events that monitoring emits, and what they carry: names and counts, nothing of a patient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "memmc.alarm."
"""Every alarm is an event of this beginning and a name of `memmc.monitoring.watch.TO_DO`; automations listen for it."""

CALM = "memmc.monitor.calm"
"""A look that found nothing; its absence is what a proactive automation can listen for."""


def events_of(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (event, payload) for each alarm of a `MonitorResult`, or the one that says all is calm."""
    shared = {"cohort": result["cohort"], "model": result["model"], "run": result["run"]}
    if result["calm"]:
        return [(CALM, shared)]
    return [
        (f"{PREFIX}{alarm['name']}", {**shared, "found": alarm["found"], "to_do": alarm["to_do"]})
        for alarm in result["alarms"]
    ]
