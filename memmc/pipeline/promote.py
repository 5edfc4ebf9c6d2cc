"""Promote: a challenger through the gates and into the champion's place; rollback: the champion before it again."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from memmc.config import Config, PromoteConfig
from memmc.errors import DataError, GateRefused, MemmcError, UsageError
from memmc.evaluation.gates import Gate, passed, refusal
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.canaries import canaries
from memmc.pipeline.challenge import Case, measure
from memmc.pipeline.decisions import Decision, Outcome, read, record, take_turn
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result
from memmc.pipeline.select import newest_calibration
from memmc.registry.models import CHALLENGER, resolve
from memmc.registry.promotion import author_of, champion_of, crown, step_back
from memmc.registry.tracking import Tracking

_PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")


@dataclass(frozen=True)
class PromoteResult(Result):
    """A verdict on a challenger.

    Attributes:
        outcome: promoted, refused, waiting (for a person), or of a dry run what it would be.
        reason: in words.
        champion: before the verdict; None before the first.
        gates: each `memmc.evaluation.gates.Gate`.
        decision_id: of the row in `decisions`; None for a dry run.
    """

    model: str
    cohort: str
    champion: str | None
    outcome: str
    reason: str
    gates: list[dict[str, Any]]
    author: str | None
    approver: str | None
    decision_id: str | None


@dataclass(frozen=True)
class RollbackResult(Result):
    """The champion that went, and the one that is back."""

    name: str
    left: str
    champion: str
    decision_id: str


def promote(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    approve: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PromoteResult:
    """Measure a challenger against the champion on the same images, keep the verdict, and move the alias if it passes.

    The verdict is kept before the alias moves: a process that dies between the two is run again.

    Args:
        cohort: whose images are the judges; a view may name a frozen set.
        model: the challenger of the cohort's own model when absent.
        approve: the person who agrees, where `promote.approval` asks for one. A verdict that waited for them is taken
            up as it stands, as long as neither champion, calibrations nor settings have changed.
        dry_run: measure, keep no verdict and move nothing; the scores that measuring needs are kept.

    Raises:
        GateRefused: whoever approves began the training.
        UsageError: the model is the champion already, or no version of a registered model.
        DataError: a model is not calibrated, or the cohort has hardly any held-out normals.
        LostTurnError: another promotion came first.
    """
    check_cohort(cohort)
    progress = progress or Silent()
    lake, tracking = Lake(config.lake.uri), tracking_of(config, home_directory())
    version = resolve(tracking, model or f"memmc-{cohort}@{CHALLENGER}")
    if version.folder is not None:
        raise UsageError("only a version of a registered model can be promoted; name it as name/version")
    turn = take_turn(lake, version.name) if not dry_run else None
    case = _case(config, lake, tracking, cohort, version.ref)
    author = author_of(tracking, version)
    check_approver(config.promote, approve, author)
    known = _waiting(config, lake, case) if approve else None
    gates = known or measure(config, lake, case, progress)
    outcome, reason = verdict(config.promote, gates, approve)
    decision = Decision(
        cohort=cohort,
        action="promote",
        outcome=outcome,
        reason=reason,
        name=version.name,
        model=case.challenger.ref,
        champion=case.champion.ref if case.champion else None,
        dataset_version=lake.version(INSTANCES),
        facts={"gates": [asdict(gate) for gate in gates], "calibrations": _calibrations(lake, case)},
        rules=config.promote.model_dump(mode="json"),
        author=author,
        approver=approve,
    )
    if not dry_run:
        record(config, lake, decision, turn)
        if outcome == "promoted":
            crown(tracking, version)
            _plant_canaries(config, cohort, case.challenger.ref, progress)
    return PromoteResult(
        model=case.challenger.ref,
        cohort=cohort,
        champion=decision.champion,
        outcome=outcome,
        reason=reason,
        gates=[asdict(gate) for gate in gates],
        author=author,
        approver=approve,
        decision_id=None if dry_run else decision.decision_id,
    )


def decline(config: Config, cohort: str, model: str, name: str) -> PromoteResult:
    """Keep that a person said no to a challenger that waited for them.

    Raises:
        DataError: no verdict on it waits.
        UsageError: `name` is none.
    """
    check_cohort(cohort)
    _check_name(name)
    lake = Lake(config.lake.uri)
    found = next((item for item in read(lake, cohort=cohort) if item.model == model), None)
    if found is None or found.outcome != "waiting":
        raise DataError(f"no verdict on {model} waits for a person; see `memmc decisions --cohort {cohort}`")
    said = replace(
        found,
        outcome="refused",
        reason=f"{name} does not agree",
        approver=name,
        decision_id=uuid.uuid4().hex[:16],
        decided_at=datetime.now(UTC),
    )
    record(config, lake, said)
    return PromoteResult(
        model=model,
        cohort=cohort,
        champion=found.champion,
        outcome=said.outcome,
        reason=said.reason,
        gates=found.facts["gates"],
        author=found.author,
        approver=name,
        decision_id=said.decision_id,
    )


def verdict(rules: PromoteConfig, gates: list[Gate], approver: str | None) -> tuple[Outcome, str]:
    """Return what the gates and the person amount to, and why."""
    if not passed(gates):
        return "refused", refusal(gates)
    asked = ", ".join(gate.name for gate in gates if gate.verdict == "pass")
    if rules.approval == "person" and approver is None:
        return "waiting", f"passes {asked}; a person must agree: promote --approve NAME"
    return "promoted", f"passes {asked}" + (f"; {approver} agrees" if approver else "")


def check_approver(rules: PromoteConfig, approver: str | None, author: str | None) -> None:
    """Refuse a name that is none, and with `promote.two_people` the one who began the training.

    Raises:
        UsageError: letters, digits, space, '.', '_', '@' and '-' make a name.
        GateRefused: it takes two people.
    """
    if approver is None:
        return
    _check_name(approver)
    if rules.approval != "person" or not rules.two_people:
        return
    if author is None:
        raise GateRefused(
            "nobody knows who began this model's training, so that nobody can be told from them; train it again, or "
            "set promote.two_people=false"
        )
    if approver.strip().casefold() == author.strip().casefold():
        raise GateRefused(f"{author} began the training of this model; another person must approve it")


def _check_name(name: str) -> None:
    if not _PERSON.fullmatch(name):
        raise UsageError("a name here is at most 64 letters, digits, spaces, '.', '_', '@' and '-' (--approve NAME)")


def rollback(config: Config, name: str | None = None, *, cohort: str | None = None) -> RollbackResult:
    """Give the champion's place back to the one before, and keep that it was.

    Args:
        name: registered model; when absent that of the cohort, or the only one with a champion.
        cohort: kept in the decision; the model's own when absent.

    Raises:
        ModelError: no champion, none before it, or several models have one and neither name nor cohort is given.
        LostTurnError: a promotion came in between; nothing was moved.
    """
    lake, tracking = Lake(config.lake.uri), tracking_of(config, home_directory())
    chosen = name or (f"memmc-{cohort}" if cohort else resolve(tracking).name)
    turn = take_turn(lake, chosen)
    left, back = step_back(tracking, chosen, dry_run=True)
    decision = Decision(
        cohort=cohort or chosen.removeprefix("memmc-"),
        action="rollback",
        outcome="rolled back",
        reason=f"{chosen}/{back} takes the place of {chosen}/{left} again",
        name=chosen,
        model=f"{chosen}/{back}",
        champion=f"{chosen}/{left}",
    )
    record(config, lake, decision, turn)
    step_back(tracking, chosen)
    return RollbackResult(chosen, f"{chosen}/{left}", f"{chosen}/{back}", decision.decision_id)


def _case(config: Config, lake: Lake, tracking: Tracking, cohort: str, reference: str) -> Case:
    home = home_directory()
    challenger = open_model(config, home, reference)
    found = champion_of(tracking, challenger.ref.partition("/")[0])
    if found is None:
        return Case(cohort, challenger, None)
    if found.ref == challenger.ref:
        raise UsageError(f"{challenger.ref} is the champion already; name another version, or train one")
    champion = open_model(config, home, found.ref)
    if champion.preprocess_id != challenger.preprocess_id:
        return Case(cohort, challenger, None, f"the champion {champion.ref} knows pixels prepared otherwise")
    newest_calibration(lake, champion)
    return Case(cohort, challenger, champion)


def _plant_canaries(config: Config, cohort: str, model: str, progress: Progress) -> None:
    """Measure what later canaries are compared with; the promotion stands without it."""
    try:
        canaries(config, cohort, model, progress=progress)
    except MemmcError as error:
        progress.message(f"no canaries were planted at the promotion: {error}")


def _calibrations(lake: Lake, case: Case) -> list[str]:
    models = [case.challenger, *([case.champion] if case.champion else [])]
    return [newest_calibration(lake, model)["calibration_id"] for model in models]


def _waiting(config: Config, lake: Lake, case: Case) -> list[Gate] | None:
    """Return the gates of the newest verdict on this challenger if it waits, and nothing has changed since."""
    ref, champion = case.challenger.ref, case.champion.ref if case.champion else None
    found = next((item for item in read(lake, cohort=case.cohort) if item.model == ref), None)
    if found is None or found.outcome != "waiting" or found.champion != champion:
        return None
    if found.rules != config.promote.model_dump(mode="json") or found.facts["calibrations"] != _calibrations(
        lake, case
    ):
        return None
    return [_gate(values) for values in found.facts["gates"]]


def _gate(values: Mapping[str, Any]) -> Gate:
    try:
        return Gate(**values)
    except TypeError:
        raise DataError("the verdict that waits was kept by another version of memmc; measure again") from None
