"""Which version of a model is the champion, and which were before it.

The alias `champion` says who it is: the registry moves an alias in one step. The champions in their order stand in a
tag of the registered model, written after the alias; where the two disagree, because a process died between them or
somebody moved the alias by hand, the alias is right and the history follows it.
"""

from __future__ import annotations

import json

from memmc.errors import ModelError
from memmc.registry.models import CHAMPION, ModelVersion, all_versions
from memmc.registry.tracking import Tracking

HISTORY_TAG = "memmc.champions"
AUTHOR_TAG = "memmc.author"
"""Tag of a training run: who began it."""
_KEPT = 200  # numbers in the tag; MLflow takes 5000 characters


def champion_of(tracking: Tracking, name: str) -> ModelVersion | None:
    """Return the champion of a registered model, None before the first.

    Raises:
        StorageError: the registry cannot be reached.
    """
    found = [item for item in all_versions(tracking) if item.name == name and CHAMPION in item.aliases]
    return found[0] if found else None


def history(tracking: Tracking, name: str) -> list[str]:
    """Return the version numbers of the champions, the present one last.

    Raises:
        StorageError: the registry cannot be reached.
    """
    champion = champion_of(tracking, name)
    return [] if champion is None else reconcile(kept_history(tracking, name), champion.version)


def kept_history(tracking: Tracking, name: str) -> list[str]:
    """Return the version numbers of the champions as they were written down, which may lag behind the alias.

    Raises:
        StorageError: the registry cannot be reached, or knows no such name.
    """
    with tracking.reaching("read"):
        return json.loads(tracking.client.get_registered_model(name).tags.get(HISTORY_TAG, "[]"))


def reconcile(kept: list[str], champion: str) -> list[str]:
    """Return the history that ends with the champion: cut after its last place, or with it added.

    >>> reconcile(["1", "2", "3"], "2"), reconcile(["1", "2"], "3")
    (['1', '2'], ['1', '2', '3'])
    """
    if champion not in kept:
        return [*kept, champion]
    return kept[: len(kept) - kept[::-1].index(champion)]


def crown(tracking: Tracking, version: ModelVersion) -> list[str]:
    """Make a version the champion of its name; return the history with it.

    Raises:
        StorageError: the registry cannot be reached; the alias stands on the one or on the other, never on neither.
    """
    before = history(tracking, version.name)
    after = before if before[-1:] == [version.version] else [*before, version.version]
    return _move(tracking, version.name, after)


def step_back(tracking: Tracking, name: str, *, dry_run: bool = False) -> tuple[str, str]:
    """Give the alias back to the champion before; return both version numbers, the one that leaves first.

    Args:
        dry_run: return them, and move nothing.

    Raises:
        ModelError: there is no champion, or none before it that still exists.
        StorageError: as for `crown`.
    """
    known = {item.version for item in all_versions(tracking) if item.name == name}
    before = history(tracking, name)
    if not before:
        raise ModelError(f"'{name}' has no champion in the registry {tracking.place}; run `memmc promote`")
    left = [number for number in before[:-1] if number in known and number != before[-1]]
    if not left:
        raise ModelError(f"{name}/{before[-1]} is the first champion of its name; there is none to go back to")
    if not dry_run:
        _move(tracking, name, left)
    return before[-1], left[-1]


def author_of(tracking: Tracking, version: ModelVersion) -> str | None:
    """Return who began the training run of a version, None where the run does not say.

    Raises:
        StorageError: the registry cannot be reached.
    """
    if version.run_id is None:
        return None
    with tracking.reaching("read"):
        return tracking.client.get_run(version.run_id).data.tags.get(AUTHOR_TAG)


def _move(tracking: Tracking, name: str, champions: list[str]) -> list[str]:
    with tracking.reaching("written"):
        tracking.client.set_registered_model_alias(name, CHAMPION, champions[-1])
        tracking.client.set_registered_model_tag(name, HISTORY_TAG, json.dumps(champions[-_KEPT:]))
    return champions
