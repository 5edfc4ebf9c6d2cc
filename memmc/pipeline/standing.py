"""What is left undone about a name's newest model: a promotion cut short, a challenger not judged, one that waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from memmc.lake.schemas import CALIBRATIONS
from memmc.lake.tables import Lake
from memmc.pipeline.decisions import Decision
from memmc.registry.models import CHAMPION, ModelVersion, all_versions, registered_at
from memmc.registry.promotion import kept_history
from memmc.registry.tracking import Tracking

_VERDICTS = frozenset({"promote", "rollback"})


@dataclass(frozen=True)
class Standing:
    """What is left undone about a name, each "name/version", None where there is none.

    Attributes:
        promoted: a kept verdict gave it the champion's place, and the registry was not told.
        pending: trained and calibrated, and judged by no gate.
        waiting: has passed the gates and waits for a person.
        trained_at: when the last training of the name ended, well or not; None before the first.
    """

    promoted: str | None = None
    pending: str | None = None
    waiting: str | None = None
    trained_at: datetime | None = None


def standing(
    lake: Lake, tracking: Tracking, name: str, cohort: str, decisions: Sequence[Decision], now: datetime
) -> Standing:
    """Look what is left undone about a name.

    Args:
        name: registered model.
        cohort: whose images a verdict that waits was measured on; one on others is no answer here.
        decisions: on it, newest first.
        now: a version that was registered later does not count as a training.

    Raises:
        StorageError: the lake or the registry cannot be reached.
    """
    versions = [version for version in all_versions(tracking) if version.name == name]
    there = {version.ref for version in versions}
    cut_short = promotion_cut_short(tracking, decisions, versions)
    newest = next((version for version in versions if is_calibrated(lake, version)), None)
    registered = registered_at(tracking, newest) if newest else None
    ended = [item.decided_at for item in decisions if item.outcome in {"trained", "failed"}]
    told_of = {item.model for item in decisions if item.outcome == "trained"}
    if newest and registered and registered <= now and newest.ref not in told_of:
        ended.append(registered)
    found = pending(decisions)
    if found is None and newest and registered:
        found = _unjudged(decisions, newest, registered)
    return Standing(
        promoted=cut_short.model if cut_short else None,
        pending=found if found in there else None,
        waiting=_waiting(decisions, versions, cohort),
        trained_at=max(ended, default=None),
    )


def promotion_cut_short(
    tracking: Tracking, decisions: Sequence[Decision], versions: Sequence[ModelVersion]
) -> Decision | None:
    """Return the newest verdict if it gave a model the champion's place and the registry was not told.

    An alias that was moved by hand since is right, as everywhere. A version that was registered after the verdict is
    another model: its registry has begun anew.

    Args:
        decisions: on one name, newest first.
        versions: of that name.
    """
    found = next((item for item in decisions if item.action in _VERDICTS), None)
    if found is None or found.outcome != "promoted":
        return None
    version = next((item for item in versions if item.ref == found.model), None)
    registered = registered_at(tracking, version) if version else None
    if version is None or registered is None or registered > found.decided_at:
        return None
    champion = next((item for item in versions if CHAMPION in item.aliases), None)
    history = kept_history(tracking, version.name)
    if version.version in history:
        return None
    if champion is None:
        return None if history else found
    as_left = champion.ref in {found.champion, found.model} or history[-1:] == [champion.version]
    return found if as_left else None


def pending(decisions: Sequence[Decision]) -> str | None:
    """Return the newest trained challenger if no verdict was kept since, nor one on it at any time.

    A verdict may seem older than the training before it, where the clocks of two hosts differ.

    Args:
        decisions: newest first.
    """
    judged = {item.model for item in decisions if item.action in _VERDICTS}
    for item in decisions:
        if item.action in _VERDICTS:
            return None
        if item.outcome == "trained":
            return None if item.model in judged else item.model
    return None


def is_calibrated(lake: Lake, version: ModelVersion) -> bool:
    """Say whether a version's training has come to its end, which is the calibration; one cut short is gone on with."""
    if not version.digest or not lake.exists(CALIBRATIONS):
        return False
    return lake.read(CALIBRATIONS, ["calibration_id"], filter={"model_digest": version.digest}).num_rows > 0


def _unjudged(decisions: Sequence[Decision], version: ModelVersion, registered: datetime) -> str | None:
    """Return a version that was trained otherwise than by `memmc retrain`, as `pending` would."""
    verdicts = [item for item in decisions if item.action in _VERDICTS]
    if CHAMPION in version.aliases or any(item.model == version.ref for item in verdicts):
        return None
    return None if any(item.decided_at > registered for item in verdicts) else version.ref


def _waiting(decisions: Sequence[Decision], versions: Sequence[ModelVersion], cohort: str) -> str | None:
    """Return the model of the newest verdict if that waits, no training has ended since and it is no champion yet."""
    found = next((item for item in decisions if item.action in _VERDICTS or item.outcome == "trained"), None)
    if found is None or found.outcome != "waiting" or found.cohort != cohort:
        return None
    open_to_it = {version.ref for version in versions if CHAMPION not in version.aliases}
    return found.model if found.model in open_to_it else None
