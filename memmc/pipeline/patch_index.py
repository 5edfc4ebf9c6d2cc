"""The index of patches of a model's training normals, in the lake's table `patches`, and the search in it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memmc.errors import DataError
from memmc.lake.schemas import PATCHES, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline.images import read_images
from memmc.pipeline.models import OpenModel
from memmc.pipeline.progress import Progress
from memmc.pipeline.select import normals

INDEX_NORMALS = 200  # training normals whose patches are searched [choice]
NEAREST = 5
_AT_ONCE = 32


@dataclass(frozen=True)
class PatchIndex:
    """Features of unit length of N normals' patches.

    Attributes:
        uids: pseudonymous SOP Instance UIDs.
        features_NLD: float16.
    """

    uids: tuple[str, ...]
    features_NLD: NDArray[np.float16]

    def nearest(self, feature_D: NDArray[np.floating], count: int = NEAREST) -> list[dict[str, Any]]:
        """Return the most similar patch of each of the most similar normals: UID, row, column, similarity.

        Similarity is the cosine after the mean of all patches is taken off both: the part that all tokens share would
        make everything alike.
        """
        kept_NLD = self.features_NLD.astype(np.float32)
        mean_D = kept_NLD.mean((0, 1))
        similarity_NL = _unit(kept_NLD - mean_D) @ _unit(feature_D.astype(np.float32) - mean_D)
        best_N = similarity_NL.argmax(1)
        height_N = similarity_NL[np.arange(len(best_N)), best_N]
        order = np.argsort(-height_N, kind="stable")[:count]
        return [
            {
                "sop_instance_uid": self.uids[index],
                **position(int(best_N[index]), similarity_NL.shape[1]),
                "similarity": float(height_N[index]),
            }
            for index in order
        ]


def patch_index(lake: Lake, model: OpenModel, progress: Progress) -> PatchIndex:
    """Return the model's index; what is missing of it is made and kept.

    Up to `INDEX_NORMALS` training normals, drawn by their keyed UIDs. Rows name their patient, so that an erasure
    finds them.

    Raises:
        DataError: the training normals are gone from the lake.
    """
    rows = normals(lake, model.cohort, "train", model.dataset_version)
    patients = {row["sop_instance_uid"]: row["patient_key"] for row in rows}
    chosen = sorted(patients)[:INDEX_NORMALS]
    kept = _read(lake, model)
    missing = [uid for uid in chosen if uid not in kept]
    if missing:
        progress.stage("index of normal patches", len(missing))
        parts: list[pa.Table] = []
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            for uid, features_LD in zip(some, _features(lake, model, some), strict=True):
                kept[uid] = features_LD
                parts.append(_row(model, uid, patients[uid], features_LD))
            progress.advance(start + len(some))
        lake.append(PATCHES, pa.concat_tables(parts))
    if not chosen:
        raise DataError(f"the training normals of {model.ref} are gone; there is nothing to compare with")
    return PatchIndex(tuple(chosen), np.stack([kept[uid] for uid in chosen]))


def position(patch: int, num_patches: int) -> dict[str, int]:
    """Return row and column of a patch, from 0."""
    side = round(num_patches**0.5)
    return {"row": patch // side, "column": patch % side}


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _features(lake: Lake, model: OpenModel, uids: list[str]) -> NDArray[np.float16]:
    import torch

    from memmc.model.artifact import load_model
    from memmc.scoring.exported import ids_for
    from memmc.scoring.why import patch_features

    loaded = load_model(model.folder)
    images = torch.from_numpy(read_images(lake, model.cohort, uids, model.dataset_version)).permute(0, 3, 1, 2)
    standardised = (images - loaded.info.pixel_mean) / loaded.info.pixel_std
    ids = torch.from_numpy(ids_for(loaded, uids, 1))
    return patch_features(loaded.model, standardised, ids).numpy().astype(np.float16)


def _row(model: OpenModel, uid: str, patient_key: str, features_LD: NDArray[np.float16]) -> pa.Table:
    row = {
        "cohort": model.cohort,
        "sop_instance_uid": uid,
        "patient_key": patient_key,
        "model_digest": model.digest,
        "features": features_LD.astype("<f2").tobytes(),
        "num_patches": features_LD.shape[0],
        "width": features_LD.shape[1],
        "made_at": datetime.now(UTC),
    }
    return pa.Table.from_pylist([row], schema=SCHEMAS[PATCHES])


def _read(lake: Lake, model: OpenModel) -> dict[str, NDArray[np.float16]]:
    if not lake.exists(PATCHES):
        return {}
    columns = ["sop_instance_uid", "features", "num_patches", "width"]
    rows = lake.read(PATCHES, columns, filter={"model_digest": model.digest, "cohort": model.cohort}).to_pylist()
    return {
        row["sop_instance_uid"]: np.frombuffer(row["features"], "<f2").reshape(row["num_patches"], row["width"])
        for row in rows
    }
