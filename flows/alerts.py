"""The events that monitoring emits, and what they carry: names and counts, nothing of a patient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "memmc.alarm."
"""Every alarm is an event of this beginning and a name of `memmc.monitoring.watch.TO_DO`; automations listen for it."""

CALM = "memmc.monitor.calm"
"""A look that found nothing; its absence is what a proactive automation can listen for."""

WAITING = "memmc.approval.waiting"
"""A challenger has passed the gates and waits for a person."""


def events_of(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (event, payload) for each alarm of a `MonitorResult`, or the one that says all is calm."""
    shared = {"cohort": result["cohort"], "model": result["model"], "run": result["run"]}
    if result["calm"]:
        return [(CALM, shared)]
    return [
        (f"{PREFIX}{alarm['name']}", {**shared, "found": alarm["found"], "to_do": alarm["to_do"]})
        for alarm in result["alarms"]
    ]


def waiting_of(verdict: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the event, and its payload, of a `PromoteResult` that waits for a person."""
    cohort, model = verdict["cohort"], verdict["model"]
    to_do = f"run the deployment approve/on-demand, or: memmc promote {model} --cohort {cohort} --approve NAME"
    return WAITING, {"cohort": cohort, "model": model, "champion": verdict["champion"], "to_do": to_do}
