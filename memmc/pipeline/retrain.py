"""Retrain: decide whether to, screen the new normals, train a challenger, put it through the gates.

Three steps that each leave a row in `decisions`, so that one that was killed is followed by one that goes on: a
challenger that is trained and not judged is judged, not trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from memmc.config import Config
from memmc.errors import DataError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.decisions import Decision, read, record
from memmc.pipeline.drift import drift
from memmc.pipeline.findings import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.models import OpenModel, open_model, tracking_of
from memmc.pipeline.pins import Pins
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.promote import PromoteResult, promote
from memmc.pipeline.quality import gate
from memmc.pipeline.results import Result, TrainResult
from memmc.pipeline.retrain_policy import Choice, Facts, choose
from memmc.pipeline.review import ScreenResult, screen
from memmc.pipeline.select import newest_reviews, normals
from memmc.registry.models import ModelVersion, registered_at
from memmc.registry.promotion import champion_of
from memmc.registry.tracking import Tracking


@dataclass(frozen=True)
class RetrainPlan(Result):
    """Whether to train, and why.

    Attributes:
        outcome: train, judge (what is trained already) or wait.
        facts: `memmc.pipeline.retrain_policy.Facts`.
        screened: `ScreenResult` of the new normals; None where they were not screened.
        decision_id: of the row in `decisions`; None for a dry run.
    """

    cohort: str
    outcome: str
    reason: str
    facts: dict[str, Any]
    screened: dict[str, Any] | None
    decision_id: str | None


@dataclass(frozen=True)
class RetrainResult(Result):
    """All that a call did; what it did not come to is None."""

    plan: dict[str, Any]
    trained: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = field(default=None)


def retrain(
    config: Config,
    cohort: str,
    *,
    approve: str | None = None,
    dry_run: bool = False,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> RetrainResult:
    """Decide; then, if it is to be, train a challenger and put it through the gates.

    Args:
        approve: as for `promote`.
        dry_run: say what would be decided by what is known, and do nothing.
        now: time of the decision.

    Raises:
        MemmcError: of the steps; a refused challenger is no error but a verdict.
    """
    plan = plan_retrain(config, cohort, dry_run=dry_run, now=now, progress=progress)
    if dry_run or plan.outcome == "wait":
        return RetrainResult(plan.as_dict())
    trained = None
    if plan.outcome == "train":
        trained = train_challenger(config, cohort, plan, now=now, progress=progress)
    challenger = trained.model if trained else str(plan.facts["pending"])
    verdict = judge_challenger(config, cohort, challenger, approve=approve, progress=progress)
    return RetrainResult(plan.as_dict(), trained.as_dict() if trained else None, verdict.as_dict())


def plan_retrain(
    config: Config,
    cohort: str,
    *,
    dry_run: bool = False,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> RetrainPlan:
    """Screen the new normals, look for drift, decide, and keep the decision.

    Raises:
        DataError: nothing stored in the cohort, or the champion is not calibrated.
    """
    check_cohort(cohort)
    progress, now = progress or Silent(), now or datetime.now(UTC)
    lake, tracking = Lake(config.lake.uri), tracking_of(config, home_directory())
    screened: ScreenResult | None = None
    if not dry_run:
        gate(config, cohort, progress=progress)
        screened = screen(config, cohort, progress=progress) if config.retrain.screen else None
    champion = champion_of(tracking, f"memmc-{cohort}")
    facts = facts_of(config, lake, tracking, cohort, champion, now, dry_run=dry_run, progress=progress)
    choice = choose(facts, config.retrain)
    decision = Decision(
        cohort=cohort,
        action="retrain",
        outcome="train" if choice.train else "wait",
        reason=choice.reason,
        name=f"memmc-{cohort}",
        model=facts.pending,
        champion=facts.champion,
        dataset_version=lake.version(INSTANCES),
        facts={**facts.as_json(), "screened": screened.as_dict() if screened else None},
        rules=config.retrain.model_dump(mode="json"),
        decided_at=now,
    )
    if not dry_run and not choice.judge:
        record(config, lake, decision)
    progress.message(f"{outcome_of(choice)}: {choice.reason}")
    return RetrainPlan(
        cohort=cohort,
        outcome=outcome_of(choice),
        reason=choice.reason,
        facts=facts.as_json(),
        screened=screened.as_dict() if screened else None,
        decision_id=None if dry_run or choice.judge else decision.decision_id,
    )


def outcome_of(choice: Choice) -> str:
    """Return train, judge or wait."""
    return "train" if choice.train else "judge" if choice.judge else "wait"


@dataclass(frozen=True)
class ReplayResult(Result):
    """Past decisions asked again, newest first: when, what was decided, what the present settings would, and why."""

    cohort: str
    changed: int
    decisions: list[dict[str, Any]]


def replay(config: Config, cohort: str) -> ReplayResult:
    """Ask the policy about the facts of every kept retraining decision, by the settings as they are now."""
    check_cohort(cohort)
    found: list[dict[str, Any]] = []
    for item in read(Lake(config.lake.uri), cohort=cohort):
        if item.action == "retrain" and item.outcome in {"train", "wait"}:
            choice = choose(Facts.from_json(item.facts), config.retrain)
            at = item.decided_at.isoformat(timespec="seconds")
            was = {"decided_at": at, "decision_id": item.decision_id, "was": item.outcome}
            found.append({**was, "now": outcome_of(choice), "reason": choice.reason})
    return ReplayResult(cohort, sum(item["was"] != item["now"] for item in found), found)


def train_challenger(
    config: Config, cohort: str, plan: RetrainPlan, *, now: datetime | None = None, progress: Progress | None = None
) -> TrainResult:
    """Train on what the plan was made for, from the champion's weights or from none, and keep that it was done.

    Raises:
        MemmcError: as `memmc.pipeline.train.train`.
    """
    from memmc.pipeline.train import train

    champion = plan.facts["champion"] if config.retrain.start == "champion" else None
    settings = config.train.model_copy(update={"warm_start": champion or config.train.warm_start})
    trained = train(config.model_copy(update={"train": settings}), cohort, progress=progress)
    lake = Lake(config.lake.uri)
    decision = Decision(
        cohort=cohort,
        action="retrain",
        outcome="trained",
        reason=f"{trained.num_images} normal images, {trained.steps} steps"
        + (f", from the weights of {champion}" if champion else ", from random weights"),
        name=f"memmc-{cohort}",
        model=trained.model,
        champion=plan.facts["champion"],
        dataset_version=trained.dataset_version,
        facts={"plan": plan.decision_id, "run": trained.run, "images": trained.num_images, "steps": trained.steps},
        rules=config.retrain.model_dump(mode="json"),
        decided_at=now or datetime.now(UTC),
    )
    record(config, lake, decision)
    return trained


def judge_challenger(
    config: Config, cohort: str, model: str, *, approve: str | None = None, progress: Progress | None = None
) -> PromoteResult:
    """Put a challenger through the gates; as `promote`."""
    return promote(config, cohort, model, approve=approve, progress=progress)


def facts_of(
    config: Config,
    lake: Lake,
    tracking: Tracking,
    cohort: str,
    champion: ModelVersion | None,
    now: datetime,
    *,
    dry_run: bool,
    progress: Progress,
) -> Facts:
    """Return what the policy looks at."""
    decisions = read(lake, name=f"memmc-{cohort}")
    newest = next((item for item in decisions if item.outcome == "trained"), None)
    if champion is None:
        since = _days(newest.decided_at if newest else None, now)
        return Facts(pending=pending(decisions), since_training_days=since, new_patients=len(_patients(lake, cohort)))
    opened = open_model(config, home_directory(), champion.ref)
    trained_at = next(
        (item.decided_at for item in decisions if item.outcome == "trained" and item.model == champion.ref),
        registered_at(tracking, champion),
    )
    known = {row["patient_key"] for row in training_rows(lake, opened, champion)}
    drifted, findings = _drift(config, lake, cohort, opened, now, dry_run=dry_run, progress=progress)
    times = [item for item in (trained_at, newest.decided_at if newest else None) if item is not None]
    return Facts(
        champion=champion.ref,
        pending=pending(decisions),
        known_patients=len(known),
        new_patients=len(_patients(lake, cohort) - known),
        age_days=_days(trained_at, now),
        since_training_days=_days(max(times, default=None), now),
        drifted=drifted,
        findings=findings,
        suspects=sum(row["state"] == "suspect" for row in newest_reviews(lake, cohort).values()),
    )


def training_rows(lake: Lake, model: OpenModel, version: ModelVersion) -> list[dict[str, Any]]:
    """Return the rows a registered model learned from, by the versions it is stamped with."""
    return normals(lake, model.cohort, "train", model.dataset_version, Pins.of_tags(version.tags))


def pending(decisions: Sequence[Decision]) -> str | None:
    """Return the newest trained challenger if no verdict was kept since, nor one on it at any time.

    A verdict may seem older than the training before it, where the clocks of two hosts differ.

    Args:
        decisions: newest first.
    """
    judged = {item.model for item in decisions if item.action in {"promote", "rollback"}}
    for item in decisions:
        if item.action in {"promote", "rollback"}:
            return None
        if item.outcome == "trained":
            return None if item.model in judged else item.model
    return None


def _patients(lake: Lake, cohort: str) -> set[str]:
    try:
        return {row["patient_key"] for row in normals(lake, cohort, "train")}
    except DataError:  # none that may be learned from
        return set()


def _days(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max(0.0, (now - moment) / timedelta(days=1))


def _drift(
    config: Config, lake: Lake, cohort: str, champion: OpenModel, now: datetime, *, dry_run: bool, progress: Progress
) -> tuple[bool | None, tuple[str, ...]]:
    """Return whether the stream has drifted from the champion's baseline, and what of it; of a dry run as last seen."""
    if not config.retrain.on_drift:
        return None, ()
    if dry_run:
        rows = recorded(lake, cohort, "drift", champion.digest)
        seen = [row for row in rows if row["run"] == rows[-1]["run"]]
        alarms = tuple(str(row["name"]) for row in seen if row["alarm"])
        return (bool(alarms) if seen else None), alarms
    found = drift(config, cohort, champion.ref, now=now, progress=progress)
    return (found.drifted if found.tested else None), tuple(found.findings)
