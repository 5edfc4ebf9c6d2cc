"""Decisions on models: why one was trained, promoted, refused or taken back; kept for good in the table `decisions`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from memmc.config import Config
from memmc.lake.files import write_rows
from memmc.lake.schemas import DECISIONS, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline.audit import note
from memmc.pipeline.results import Result

Action = Literal["promote", "rollback", "retrain"]
Outcome = Literal["promoted", "refused", "waiting", "rolled back", "train", "wait", "trained", "failed"]

_NOTED: Mapping[Outcome, Literal["refused", "failed"]] = {"refused": "refused", "failed": "failed"}


@dataclass(frozen=True)
class Decision:
    """One decision.

    Attributes:
        cohort: whose instances it rests on.
        action: what was to be decided.
        outcome: what was: of promote promoted, refused or waiting (for a person); of retrain train, wait or, when the
            training has ended, trained or failed.
        reason: in words.
        name: registered model.
        model: "name/version" it is about.
        champion: "name/version" of the champion before it.
        dataset_version: of `instances`.
        facts: what was looked at, JSON values.
        rules: the settings it was held against.
        author: who began the training run.
        approver: who agreed.
    """

    cohort: str
    action: Action
    outcome: Outcome
    reason: str
    name: str
    model: str | None = None
    champion: str | None = None
    dataset_version: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rules: Mapping[str, Any] = field(default_factory=dict[str, Any])
    author: str | None = None
    approver: str | None = None
    decision_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    decided_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class DecisionsResult(Result):
    """Decisions of a cohort, newest first, each as a JSON object."""

    cohort: str
    decisions: list[dict[str, Any]]


def turn_name(name: str) -> str:
    """Return the name under which what moves a champion takes turns (`Lake.turn`)."""
    return f"champion {name}"


def take_turn(lake: Lake, name: str) -> int:
    """Return the turn to give `record`; to be taken before the champion is looked up."""
    return lake.turn(DECISIONS, turn_name(name))


def record(config: Config, lake: Lake, decision: Decision, turn: int | None = None) -> Decision:
    """Keep a decision, and note it in the audit trail.

    Args:
        turn: of a decision that moves the champion; of two that were taken at the same time one is kept.

    Raises:
        LostTurnError: another decision on this model's champion came first; nothing was kept.
        StorageError: the lake cannot be written.
    """
    row = {**vars(decision), "facts": _json(decision.facts), "rules": _json(decision.rules)}
    row["verdict"] = row.pop("outcome")
    files = write_rows(lake.storage, DECISIONS, pa.Table.from_pylist([row], schema=SCHEMAS[DECISIONS]))
    turns = None if turn is None else {turn_name(decision.name): turn}
    lake.commit(DECISIONS, files, f"decision-{decision.decision_id}", {"action": decision.action}, turns=turns)
    note(
        config,
        decision.action,
        outcome=_NOTED.get(decision.outcome, "ok"),
        cohort=decision.cohort,
        decision=decision.outcome,
        decision_id=decision.decision_id,
        model=decision.model,
        champion=decision.champion,
        approver=_in_ascii(decision.approver),
        dataset_version=decision.dataset_version,
    )
    return decision


def read(lake: Lake, *, cohort: str | None = None, name: str | None = None) -> list[Decision]:
    """Return decisions, newest first."""
    if not lake.exists(DECISIONS):
        return []
    rows = [{**row, "outcome": row["verdict"]} for row in lake.read(DECISIONS).to_pylist()]
    found = [
        Decision(
            **{name: row[name] for name in row if name not in {"verdict", "facts", "rules"}},
            facts=json.loads(row["facts"]),
            rules=json.loads(row["rules"]),
        )
        for row in rows
        if (cohort is None or row["cohort"] == cohort) and (name is None or row["name"] == name)
    ]
    return sorted(found, key=lambda item: (item.decided_at, item.decision_id), reverse=True)


def decisions(config: Config, cohort: str) -> DecisionsResult:
    """Return what was decided about a cohort's models, and why."""
    found = read(Lake(config.lake.uri), cohort=cohort)
    return DecisionsResult(cohort, [as_json(item) for item in found])


def as_json(decision: Decision) -> dict[str, Any]:
    """Return a decision as JSON values."""
    at = decision.decided_at.isoformat(timespec="seconds")
    return {**vars(decision), "facts": dict(decision.facts), "rules": dict(decision.rules), "decided_at": at}


def _in_ascii(name: str | None) -> str | None:
    """Return a name as the audit trail takes it: other letters as character references, so that none is lost."""
    return None if name is None else name.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, allow_nan=False)
