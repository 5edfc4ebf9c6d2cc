"""What a run learned from, as MLflow's inputs: the images of one table version, and how they were prepared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memmc.registry.tracking import Tracking

_CONTEXT = "mlflow.data.context"  # the tag by which MLflow says what an input was for
_DIGEST_LENGTH = 36  # longest that MLflow takes


@dataclass(frozen=True)
class TrainingInput:
    """The images of a run.

    Attributes:
        cohort: their cohort.
        version: of the `instances` table; with the cohort it names every row.
        digest: of the images themselves, `images_digest`.
        images: how many.
        patients: whose.
        stamps: `preprocess_id`, `config_id`.
    """

    cohort: str
    version: int
    digest: str
    images: int
    patients: int
    stamps: Mapping[str, str]


def images_digest(keys: Iterable[str]) -> str:
    """Return 32 hex digits naming a set of images by their keys, in whatever order."""
    digest = hashlib.sha256()
    for key in sorted(keys):
        digest.update(key.encode() + b"\n")
    return digest.hexdigest()[:32]


def log_input(tracking: Tracking, run_id: str, used: TrainingInput, context: str = "training") -> None:
    """Write a run's images among its inputs; no place and no key of an image is written.

    Raises:
        StorageError: the store cannot be reached.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = {"table": "instances", "version": used.version, "cohort": used.cohort}
    dataset = Dataset(
        name=f"instances/{used.cohort}",
        digest=used.digest[:_DIGEST_LENGTH],
        source_type="memmc_lake",
        source=json.dumps(source),
        profile=json.dumps({"images": used.images, "patients": used.patients}),
    )
    tags = [InputTag(_CONTEXT, context), *(InputTag(name, value) for name, value in used.stamps.items())]
    with tracking.reaching("written"):
        tracking.client.log_inputs(run_id, [DatasetInput(dataset, tags)])
