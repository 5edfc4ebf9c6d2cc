"""Open a registered model: its folder on this machine and what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.dicom.geometry import Fit
from memmc.errors import ModelError, PreprocessMismatch
from memmc.model.digest import model_digest
from memmc.registry.models import all_versions, download, resolve
from memmc.registry.tracking import Tracking, open_tracking

ANCESTORS_TAG = "ancestors"


@dataclass(frozen=True)
class OpenModel:
    """A model at hand.

    Attributes:
        ref: "name/version".
        digest: 16 hex digits over weights and description.
        folder: holds model.safetensors and model.json.
        info: the content of model.json.
        run_id: the tracked run that trained it, if it is in the registry.
        ancestors: what the models it began from had learned from: cohort -> newest version of `instances`.
    """

    ref: str
    digest: str
    folder: Path
    info: dict[str, Any]
    run_id: str | None = None
    ancestors: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def cohort(self) -> str:
        """The cohort it was trained on."""
        return str(self.info["cohort"])

    @property
    def dataset_version(self) -> int:
        """The version of `instances` it was trained on."""
        return int(self.info["dataset_version"])

    @property
    def learned_from(self) -> dict[str, int]:
        """What it and its ancestors learned from, as `ancestors`."""
        before = self.ancestors.get(self.cohort, self.dataset_version)
        return {**self.ancestors, self.cohort: max(before, self.dataset_version)}

    @property
    def preprocess_id(self) -> str:
        """How the pixels it knows were prepared."""
        return str(self.info["preprocess_id"])

    def require(self, preprocess_ids: set[str]) -> None:
        """Refuse pixels prepared in another way.

        Raises:
            PreprocessMismatch: naming both ids.
        """
        others = preprocess_ids - {self.preprocess_id}
        if others:
            raise PreprocessMismatch(
                f"model {self.ref} knows pixels prepared as {self.preprocess_id}, the cohort holds {sorted(others)}; "
                "ingest with the data.* settings of the model, or train on this cohort"
            )


def fit_of(config: Config, model: OpenModel) -> Fit | None:
    """Return how a model's images were fitted to the square; None where `data.*` is not what they were made with."""
    return config.data.fit if config.preprocess_id == model.preprocess_id else None


def tracking_of(config: Config, home: Path) -> Tracking:
    """Return the tracking store the configuration names."""
    return open_tracking(config.tracking, home)


def no_model_yet(config: Config, home: Path) -> str | None:
    """Say that the registry holds no model at all, as on a new site; None where it does.

    Raises:
        StorageError: the registry cannot be reached.
    """
    if all_versions(tracking_of(config, home)):
        return None
    return "no model yet: nothing is scored before `memmc train` has made one"


def open_model(config: Config, home: Path, reference: str | None, cohort: str | None = None) -> OpenModel:
    """Resolve, fetch and check a model.

    Args:
        reference: name, name/version, name@alias, models:/ URI, a model folder, or None for the champion.
        cohort: whose champion None means; see `resolve`.

    Raises:
        ModelError: there is none, None may mean several, or its description is unreadable.
    """
    tracking = tracking_of(config, home)
    version = resolve(tracking, reference, cohort)
    folder = download(tracking, version)
    try:
        info = json.loads((folder / "model.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise ModelError(
            f"model {version.ref}: model.json is missing or unreadable; train or register it again"
        ) from None
    return OpenModel(
        ref=version.ref,
        digest=model_digest(folder),
        folder=folder,
        info=info,
        run_id=version.run_id,
        ancestors=ancestors_of(version.tags),
    )


def ancestors_of(tags: Mapping[str, str]) -> dict[str, int]:
    """Return `OpenModel.ancestors` of a registered version; none where it began with random weights.

    Raises:
        ModelError: the tag is damaged.
    """
    try:
        return {str(cohort): int(version) for cohort, version in json.loads(tags.get(ANCESTORS_TAG, "{}")).items()}
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"the tag '{ANCESTORS_TAG}' of a model version is damaged; train it anew") from None
