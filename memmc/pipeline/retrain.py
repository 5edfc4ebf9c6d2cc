"""Retrain: decide whether to, screen the new normals, train a challenger, put it through the gates.

Three steps that each leave a row in `decisions`, so that one that was killed is followed by one that goes on: a
challenger that is trained and not judged is judged, not trained again, and one that waits for a person is asked about.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from memmc.config import Config
from memmc.errors import DataError, StorageError, TrainingError
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
from memmc.pipeline.promote import PromoteResult, promote, waiting_verdict
from memmc.pipeline.quality import gate
from memmc.pipeline.results import Result, TrainResult
from memmc.pipeline.retrain_policy import Choice, Facts, choose
from memmc.pipeline.review import ScreenResult, screen
from memmc.pipeline.select import newest_reviews, normals
from memmc.pipeline.standing import standing
from memmc.registry.models import ModelVersion, registered_at
from memmc.registry.promotion import champion_of
from memmc.registry.tracking import Tracking


@dataclass(frozen=True)
class RetrainPlan(Result):
    """Whether to train, and why.

    Attributes:
        outcome: train, judge (what is trained already), waiting (a challenger, for a person) or wait.
        facts: `memmc.pipeline.retrain_policy.Facts`.
        screened: `ScreenResult` of the new normals; None where they were not screened.
        decision_id: of the row in `decisions`; None for a dry run, and where an earlier row says it already.
        challenger: to be judged or asked about; None where one is trained first, or nothing is done.
    """

    cohort: str
    outcome: str
    reason: str
    facts: dict[str, Any]
    screened: dict[str, Any] | None
    decision_id: str | None
    challenger: str | None = None


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
    challenger = trained.model if trained else str(plan.challenger)
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
    kept = not (dry_run or choice.judge or choice.ask)
    decision = Decision(
        cohort=cohort,
        action="retrain",
        outcome="train" if choice.train else "wait",
        reason=choice.reason,
        name=f"memmc-{cohort}",
        champion=facts.champion,
        dataset_version=lake.version(INSTANCES),
        facts={**facts.as_json(), "screened": screened.as_dict() if screened else None},
        rules=config.retrain.model_dump(mode="json"),
        decided_at=now,
    )
    if kept:
        record(config, lake, decision)
    progress.message(f"{outcome_of(choice)}: {choice.reason}")
    return RetrainPlan(
        cohort=cohort,
        outcome=outcome_of(choice),
        reason=choice.reason,
        facts=facts.as_json(),
        screened=screened.as_dict() if screened else None,
        decision_id=decision.decision_id if kept else None,
        challenger=facts.challenger if choice.judge or choice.ask else None,
    )


def outcome_of(choice: Choice) -> str:
    """Return train, judge, waiting or wait."""
    return "train" if choice.train else "judge" if choice.judge else "waiting" if choice.ask else "wait"


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
    """Train on what the plan was made for, from the champion's weights or from none, and keep how it ended.

    A training that failed for good is kept too, so that the cool-down holds the next one back. One that was cut short
    is not: the next call goes on with it.

    Raises:
        MemmcError: as `memmc.pipeline.train.train`.
    """
    from memmc.pipeline.train import train

    champion = plan.facts["champion"] if config.retrain.start == "champion" else None
    settings = config.train.model_copy(update={"warm_start": champion or config.train.warm_start})
    lake, name = Lake(config.lake.uri), f"memmc-{cohort}"
    fixed: dict[str, Any] = {"cohort": cohort, "action": "retrain", "name": name, "champion": plan.facts["champion"]}
    fixed["rules"] = config.retrain.model_dump(mode="json")
    try:
        trained = train(config.model_copy(update={"train": settings}), cohort, progress=progress)
    except TrainingError as error:
        facts = {"plan": plan.decision_id, "error": type(error).__name__}
        at = now or datetime.now(UTC)
        with suppress(StorageError):  # the failure is what matters: a lake that does not answer would be tried again
            record(config, lake, Decision(**fixed, outcome="failed", reason=str(error), facts=facts, decided_at=at))
        raise
    decision = Decision(
        **fixed,
        outcome="trained",
        reason=f"{trained.num_images} normal images, {trained.steps} steps"
        + (f", from the weights of {champion}" if champion else ", from random weights"),
        model=trained.model,
        dataset_version=trained.dataset_version,
        facts={"plan": plan.decision_id, "run": trained.run, "images": trained.num_images, "steps": trained.steps},
        decided_at=now or datetime.now(UTC),
    )
    record(config, lake, decision)
    return trained


def judge_challenger(
    config: Config, cohort: str, model: str, *, approve: str | None = None, progress: Progress | None = None
) -> PromoteResult:
    """Put a challenger through the gates, as `promote`; one that waits for a person is not measured again."""
    kept = waiting_verdict(config, cohort, model) if approve is None else None
    return kept or promote(config, cohort, model, approve=approve, progress=progress)


def no_normals_yet(config: Config, cohort: str) -> str | None:
    """Say that a cohort has neither a champion nor an image labelled normal, as every new one; None where it has.

    Raises:
        StorageError: the lake or the registry cannot be reached.
    """
    check_cohort(cohort)
    lake = Lake(config.lake.uri)
    normal = {"cohort": cohort, "outcome": "stored", "label": "normal"}
    if lake.exists(INSTANCES) and lake.instances_with_labels(["patient_key"], None, normal).num_rows:
        return None
    if champion_of(tracking_of(config, home_directory()), f"memmc-{cohort}") is not None:
        return None
    return f"no normals yet: cohort {cohort} has no image labelled normal; `memmc label` takes labels"


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
    undone = standing(lake, tracking, f"memmc-{cohort}", cohort, decisions, now)
    patients = _patients(lake, cohort)
    facts = Facts(
        promoted=undone.promoted,
        pending=undone.pending,
        waiting=undone.waiting,
        new_patients=len(patients),
        since_training_days=_days(undone.trained_at, now),
    )
    if champion is None:
        return facts
    opened = open_model(config, home_directory(), champion.ref)
    trained_at = next(
        (item.decided_at for item in decisions if item.outcome == "trained" and item.model == champion.ref),
        registered_at(tracking, champion),
    )
    known = {row["patient_key"] for row in training_rows(lake, opened, champion)}
    drifted, findings = _drift(config, lake, cohort, opened, now, dry_run=dry_run, progress=progress)
    times = [item for item in (trained_at, undone.trained_at) if item is not None]
    return replace(
        facts,
        champion=champion.ref,
        known_patients=len(known),
        new_patients=len(patients - known),
        age_days=_days(trained_at, now),
        since_training_days=_days(max(times, default=None), now),
        drifted=drifted,
        findings=findings,
        suspects=sum(row["state"] == "suspect" for row in newest_reviews(lake, cohort).values()),
    )


def training_rows(lake: Lake, model: OpenModel, version: ModelVersion) -> list[dict[str, Any]]:
    """Return the rows a registered model learned from, by the versions it is stamped with."""
    return normals(lake, model.cohort, "train", model.dataset_version, Pins.of_tags(version.tags))


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
