"""What memory and levels of a model are worth: how much they are used, and what is lost with them shut off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memmc.config import Config, ScoreConfig
from memmc.evaluation.metrics import auroc, bootstrap_values, percentile_interval
from memmc.evaluation.report_data import Ablation, MemoryHealth, MemoryLayer, ShutOff
from memmc.lake.tables import Lake
from memmc.pipeline.images import Images, read_images
from memmc.pipeline.models import OpenModel
from memmc.pipeline.select import newest_calibration, normals

if TYPE_CHECKING:
    from memmc.model.artifact import LoadedModel
    from memmc.scoring.scorer import Features, Scorer

_MEMORY_IMAGES, _FIT_IMAGES, _BATCH = 64, 128, 32


@dataclass(frozen=True)
class Sample:
    """Images in [0, 1] and their keyed UIDs."""

    uids: Sequence[str]
    images_NHWC: Images


def memory_health(
    config: Config, lake: Lake, model: OpenModel, cohort: str, rows: Sequence[dict[str, Any]]
) -> MemoryHealth | None:
    """Return how the encoder uses its memory on held-out normals and the decoder its levels; None with neither.

    The memory of `model.bottleneck_slots` is named, not measured.

    Args:
        config: `evaluate.*`, and the scorer's settings.
        lake: of the cohorts.
        model: to look at.
        cohort: of the rows.
        rows: evaluated instances, with label and patient; without any, no loss in AUROC is measured.
    """
    import torch

    from memmc.model.artifact import load_model
    from memmc.model.memory_usage import gate_means, memory_usage
    from memmc.scoring.masks import mask_ids
    from memmc.training.looks import Fixed, ablations

    loaded = load_model(model.folder)
    uids = sorted(row["sop_instance_uid"] for row in normals(lake, model.cohort, "calibrate", model.dataset_version))
    held = Sample(uids[:_FIT_IMAGES], read_images(lake, model.cohort, uids[:_FIT_IMAGES], model.dataset_version))
    images = torch.from_numpy(held.images_NHWC[:_MEMORY_IMAGES]).permute(0, 3, 1, 2)
    ids = mask_ids(loaded.digest, held.uids[: len(images)], loaded.model.num_patches, loaded.model.num_keep, 1)[:, 0]
    standardised = (images - loaded.info.pixel_mean) / loaded.info.pixel_std
    layers, has_levels = memory_usage(loaded.model, standardised, ids), _has_levels(loaded)
    bottleneck_slots = loaded.config.bottleneck_slots
    if not layers and not has_levels:
        return MemoryHealth((), bottleneck_slots=bottleneck_slots) if bottleneck_slots else None
    lost = ablations(loaded.model, Fixed.of(standardised, loaded.model))
    return MemoryHealth(
        ablation=_ablation(config, lake, model, loaded, cohort, held, rows),
        gates=tuple(gate_means(loaded.model, standardised, ids)),
        error=lost["ablation/error"],
        error_without_memory=lost["ablation/error_without_memory"] if layers else None,
        error_last_level_only=lost["ablation/error_last_level_only"] if has_levels else None,
        bottleneck_slots=bottleneck_slots,
        layers=tuple(
            MemoryLayer(
                number, layer.mass, layer.slots_used, layer.num_slots, layer.entropy, uniform_mass=layer.uniform_mass
            )
            for number, layer in enumerate(layers, start=1)
        ),
    )


def _has_levels(loaded: LoadedModel) -> bool:
    return len(loaded.model.decoder.level_indices) > 1


def _ablation(
    config: Config,
    lake: Lake,
    model: OpenModel,
    loaded: LoadedModel,
    cohort: str,
    held: Sample,
    rows: Sequence[dict[str, Any]],
) -> Ablation | None:
    """Return the loss on a sample of the evaluated images, the same ones at every call."""
    chosen = sample(rows, config.evaluate.ablation_images)
    if not chosen:
        return None
    uids = [row["sop_instance_uid"] for row in chosen]
    calibration = newest_calibration(lake, model)
    changes = {"scorer": calibration["scorer"], "passes": calibration["passes"] or config.score.passes}
    return ablate(
        loaded,
        config.score.model_copy(update=changes),
        held,
        Sample(uids, read_images(lake, cohort, uids)),
        np.array([row["label"] == "abnormal" for row in chosen]),
        [row["patient_key"] for row in chosen],
        resamplings=config.evaluate.bootstrap,
        confidence=config.evaluate.confidence,
        seed=config.evaluate.seed,
    )


def sample(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return at most so many rows of each label, the first by keyed UID; none where a label is missing."""
    ordered = sorted(rows, key=lambda row: row["sop_instance_uid"])
    parts = [[row for row in ordered if row["label"] == label][:count] for label in ("normal", "abnormal")]
    return [*parts[0], *parts[1]] if all(parts) else []


def ablate(
    loaded: LoadedModel,
    score: ScoreConfig,
    held: Sample,
    test: Sample,
    abnormal_N: NDArray[np.bool_],
    patients: Sequence[str],
    *,
    resamplings: int,
    confidence: float,
    seed: int,
) -> Ablation:
    """Return the AUROC of a model, of it without its memory, and of it hearing its last level alone.

    The score is fitted on the same normals each time: what is lost is what no fit makes good. The masks stay the same.

    Args:
        loaded: the model; as before afterwards.
        score: scorer and passes.
        held: normals that it was not trained on.
        test: N images of patients it never met.
        abnormal_N: of the test images.
        patients: (N,) keys.
        resamplings: of the bootstrap.
        confidence: of the intervals.
        seed: of the bootstrap.
    """
    from memmc.model.memory_usage import levels_ablated, memory_ablated

    whole_N = _scores(loaded, score, held, test)
    whole = auroc(abnormal_N, whole_N)
    whole_R = bootstrap_values(abnormal_N, whole_N, patients, auroc, resamplings, seed)

    def shut_off(part: AbstractContextManager[None]) -> ShutOff:
        with part:
            rest_N = _scores(loaded, score, held, test)
        rest_R = bootstrap_values(abnormal_N, rest_N, patients, auroc, resamplings, seed)
        rest = auroc(abnormal_N, rest_N)
        return ShutOff(rest, whole - rest, percentile_interval(whole_R - rest_R, confidence))

    return Ablation(
        num_normal=int((~abnormal_N).sum()),
        num_abnormal=int(abnormal_N.sum()),
        auroc=whole,
        without_memory=shut_off(memory_ablated(loaded.model)) if loaded.config.memory_slots else None,
        last_level_only=shut_off(levels_ablated(loaded.model)) if _has_levels(loaded) else None,
    )


def _scores(loaded: LoadedModel, score: ScoreConfig, held: Sample, test: Sample) -> NDArray[np.float64]:
    from memmc.scoring.scorer import make_scorer

    scorer = make_scorer(score)
    fitted = scorer.fit(_features(loaded, score, scorer, held))
    return fitted.score_features(_features(loaded, score, scorer, test)).anomaly_score_B


def _features(loaded: LoadedModel, score: ScoreConfig, scorer: Scorer, images: Sample) -> Features:
    import torch

    from memmc.scoring.masks import predict
    from memmc.scoring.scorer import Features

    mean, std = loaded.info.pixel_mean, loaded.info.pixel_std
    parts: list[Features] = []
    for start in range(0, len(images.uids), _BATCH):
        images_BCHW = torch.from_numpy(images.images_NHWC[start : start + _BATCH]).permute(0, 3, 1, 2).contiguous()
        uids = images.uids[start : start + _BATCH]
        with torch.inference_mode():
            found = predict(score.scorer, loaded.model, loaded.digest, uids, (images_BCHW - mean) / std, score.passes)
        parts.append(scorer.features(images_BCHW, found.rescale(mean, std)))
    return Features.join(parts)
