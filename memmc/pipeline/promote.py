"""Promote: a challenger through the gates and into the champion's place; rollback: the champion before it again."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from memmc.config import Config, PromoteConfig
from memmc.errors import DataError, MemmcError, UsageError
from memmc.evaluation.gates import Gate, passed, refusal
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.approval import check_approver, check_name
from memmc.pipeline.canaries import canaries
from memmc.pipeline.challenge import Case, measure
from memmc.pipeline.decisions import Decision, Outcome, read, record, take_turn
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result
from memmc.pipeline.select import newest_calibration
from memmc.pipeline.standing import promotion_cut_short
from memmc.registry.models import CHALLENGER, ModelVersion, all_versions, resolve
from memmc.registry.promotion import author_of, champion_of, crown, step_back
from memmc.registry.tracking import Tracking


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

    The verdict is kept before the alias moves: where a process dies between the two, the next call ends its promotion.

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
    kept = None if dry_run else _cut_short(lake, tracking, version)
    if kept is not None:
        _enthrone(config, tracking, version, kept.cohort, progress)
        return _result(kept)
    turn = take_turn(lake, version.name) if not dry_run else None
    case = _case(config, lake, tracking, cohort, version.ref)
    author = author_of(tracking, version)
    check_approver(config.promote, approve, author)
    known = _waiting(config, lake, case) if approve else None
    gates = [_gate(values) for values in known.facts["gates"]] if known else measure(config, lake, case, progress)
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
            _enthrone(config, tracking, version, cohort, progress)
    result = _result(decision)
    return replace(result, decision_id=None) if dry_run else result


def waiting_verdict(config: Config, cohort: str, model: str) -> PromoteResult | None:
    """Return the newest verdict on a challenger if it waits for a person and nothing has changed since.

    Raises:
        ModelError: there is no such model.
    """
    lake = Lake(config.lake.uri)
    if _newest(lake, cohort, model) is None:
        return None
    found = _waiting(config, lake, _case(config, lake, tracking_of(config, home_directory()), cohort, model))
    return _result(found) if found else None


def find_waiting(config: Config, cohort: str) -> PromoteResult:
    """Return the newest verdict on a cohort's models, which waits for a person.

    Raises:
        DataError: it does not.
    """
    check_cohort(cohort)
    verdicts = (item for item in read(Lake(config.lake.uri), cohort=cohort) if item.action != "retrain")
    found = next(verdicts, None)
    if found is None or found.outcome != "waiting":
        raise DataError(f"no verdict of cohort {cohort} waits for a person; see `memmc decisions --cohort {cohort}`")
    return _result(found)


def decline(config: Config, cohort: str, model: str, name: str) -> PromoteResult:
    """Keep that a person said no to a challenger that waited for them.

    Raises:
        DataError: no verdict on it waits.
        UsageError: `name` is none.
    """
    check_cohort(cohort)
    check_name(name)
    lake = Lake(config.lake.uri)
    found = _newest(lake, cohort, model)
    if found is None:
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
    return _result(said)


def verdict(rules: PromoteConfig, gates: list[Gate], approver: str | None) -> tuple[Outcome, str]:
    """Return what the gates and the person amount to, and why."""
    if not passed(gates):
        return "refused", refusal(gates)
    asked = ", ".join(gate.name for gate in gates if gate.verdict == "pass")
    if rules.approval == "person" and approver is None:
        return "waiting", f"passes {asked}; a person must agree: promote --approve NAME"
    return "promoted", f"passes {asked}" + (f"; {approver} agrees" if approver else "")


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


def _newest(lake: Lake, cohort: str, model: str) -> Decision | None:
    """Return the newest verdict on a model if it waits."""
    verdicts = (item for item in read(lake, cohort=cohort) if item.model == model and item.action != "retrain")
    found = next(verdicts, None)
    return found if found is not None and found.outcome == "waiting" else None


def _waiting(config: Config, lake: Lake, case: Case) -> Decision | None:
    """Return the newest verdict on this challenger if it waits, and nothing has changed since."""
    found = _newest(lake, case.cohort, case.challenger.ref)
    champion = case.champion.ref if case.champion else None
    if found is None or found.champion != champion or found.rules != config.promote.model_dump(mode="json"):
        return None
    return found if found.facts["calibrations"] == _calibrations(lake, case) else None


def _cut_short(lake: Lake, tracking: Tracking, version: ModelVersion) -> Decision | None:
    """Return the verdict that gave this version the champion's place, if the registry was not told."""
    versions = [item for item in all_versions(tracking) if item.name == version.name]
    found = promotion_cut_short(tracking, read(lake, name=version.name), versions)
    return found if found is not None and found.model == version.ref else None


def _enthrone(config: Config, tracking: Tracking, version: ModelVersion, cohort: str, progress: Progress) -> None:
    """Tell the registry of a verdict that is kept."""
    crown(tracking, version)
    _plant_canaries(config, cohort, version.ref, progress)


def _result(decision: Decision) -> PromoteResult:
    return PromoteResult(
        model=str(decision.model),
        cohort=decision.cohort,
        champion=decision.champion,
        outcome=decision.outcome,
        reason=decision.reason,
        gates=list(decision.facts["gates"]),
        author=decision.author,
        approver=decision.approver,
        decision_id=decision.decision_id,
    )


def _gate(values: Mapping[str, Any]) -> Gate:
    try:
        return Gate(**values)
    except TypeError:
        raise DataError("the verdict that waits was kept by another version of memmc; measure again") from None
