"""Whether to train anew: a pure function of facts and rules, so that it can be asked about the past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from memmc.config import RetrainConfig


@dataclass(frozen=True)
class Facts:
    """What is known when it is decided.

    Attributes:
        champion: "name/version"; None before the first.
        promoted: a challenger whose promotion was decided and cut short before the registry was told.
        pending: a trained challenger that no gate has judged yet.
        waiting: a challenger that has passed the gates and waits for a person.
        known_patients: normal patients the champion learned from.
        new_patients: normal patients of the training share that it did not, those under review left out.
        age_days: since the champion's training.
        since_training_days: since the last training of the cohort, whoever began it and whatever became of it.
        drifted: what monitoring says of the stream; None where it cannot say.
        findings: what has drifted, in words.
        suspects: normals that wait for a person.
    """

    champion: str | None = None
    pending: str | None = None
    known_patients: int = 0
    new_patients: int = 0
    age_days: float | None = None
    since_training_days: float | None = None
    drifted: bool | None = None
    findings: tuple[str, ...] = ()
    suspects: int = 0
    promoted: str | None = None
    waiting: str | None = None

    @property
    def challenger(self) -> str | None:
        """The model that is to be judged, or asked about, if any."""
        return self.promoted or self.pending or self.waiting

    def as_json(self) -> dict[str, Any]:
        """Return what a decision keeps."""
        return {**asdict(self), "findings": list(self.findings)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """Return the facts of a kept decision; fields of other versions of memmc are passed over."""
        known: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["findings"] = tuple(known.get("findings", ()))
        return cls(**known)


@dataclass(frozen=True)
class Choice:
    """To train or not.

    Attributes:
        train: begin a training run.
        judge: put the pending challenger through the gates instead, or end its promotion.
        reason: in words.
        ask: ask a person about the challenger that waits for one.
    """

    train: bool
    judge: bool
    reason: str
    ask: bool = False


def choose(facts: Facts, rules: RetrainConfig) -> Choice:
    """Return whether to train, and why or why not.

    Any one reason will do; the cool-down holds all of them back, but not the gates of what is trained already. A
    challenger that waits for a person is asked about until there is reason to train another.
    """
    if facts.promoted is not None:
        return Choice(False, True, f"the promotion of {facts.promoted} was decided and cut short")
    if facts.pending is not None:
        return Choice(False, True, f"{facts.pending} is trained and not judged yet")
    choice = _train_or_wait(facts, rules)
    if facts.waiting is not None and not choice.train:
        return Choice(False, False, f"{facts.waiting} has passed the gates and waits for a person", ask=True)
    return choice


def _train_or_wait(facts: Facts, rules: RetrainConfig) -> Choice:
    reasons = _reasons(facts, rules)
    if not reasons:
        return Choice(False, False, "nothing asks for it: " + _calm(facts, rules))
    since = facts.since_training_days
    if since is not None and since < rules.cooldown_days:
        held = f"the last training was {since:.1f} days ago, retrain.cooldown_days is {rules.cooldown_days:g}"
        return Choice(False, False, f"{'; '.join(reasons)}, but {held}")
    return Choice(True, False, "; ".join(reasons))


def _reasons(facts: Facts, rules: RetrainConfig) -> list[str]:
    if facts.champion is None:
        return ["there is no champion"]
    found: list[str] = []
    share = facts.new_patients / facts.known_patients if facts.known_patients else float(facts.new_patients > 0)
    if facts.new_patients >= rules.min_new_patients or (facts.new_patients and share >= rules.min_new_share):
        found.append(f"{facts.new_patients} new normal patients beside {facts.known_patients}")
    if facts.age_days is not None and facts.age_days >= rules.max_age_days:
        found.append(f"the champion is {facts.age_days:.0f} days old")
    if rules.on_drift and facts.drifted:
        found.append("the stream has drifted: " + (", ".join(facts.findings[:3]) or "see memmc drift"))
    return found


def _calm(facts: Facts, rules: RetrainConfig) -> str:
    needed = min(float(rules.min_new_patients), rules.min_new_share * facts.known_patients)
    drift = {None: "drift cannot be told", True: "drift does not count", False: "no drift"}[facts.drifted]
    age = "of unknown age" if facts.age_days is None else f"{facts.age_days:.0f} of {rules.max_age_days:g} days old"
    return f"{facts.new_patients} of {needed:.0f} new normal patients, champion {age}, {drift}"
