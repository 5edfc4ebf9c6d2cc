"""MemMC-MAE trained and judged in this process, without a lake and without Ray; for the benchmarks of quality.

Feed, loop, masks, scorers and calibration are the pipeline's own. One worker computes on all threads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from quality_figures import DEFAULT, judged
from quality_sets import Images, QualitySet
from torch import Tensor

from memmc.config import Config
from memmc.model.artifact import LoadedModel, export_model, load_model
from memmc.model.mae import MemMCMAE
from memmc.model.memory_usage import levels_ablated, memory_ablated
from memmc.pipeline.training_job import keep_back
from memmc.scoring.masks import Reconstruction, mask_ids, reconstruct
from memmc.training.augment import standardise
from memmc.training.checkpoint import STATE_FILE
from memmc.training.feed import CachedFeed
from memmc.training.looks import HeldOut
from memmc.training.loop import InputSpec, Metrics, Save, train
from memmc.training.peers import Alone

SELECTED, LAST = "selected", "last"
LOOKED = ("step", "elapsed_s", "loss", "val_error", "probe_auroc")


def fit(data: QualitySet, config: Config, folder: Path) -> dict[str, Any]:
    """Train on a set's normals as `config.train` says; go on from the checkpoint in `folder`, or find it done there."""
    checkpoint, summary, job = folder / "checkpoint", folder / "training.json", config.train
    if summary.is_file():
        return json.loads(summary.read_text())
    learnt, looked_at = _kept_back(data.train, job.validate_share)
    spec = _spec(learnt, config)
    torch.manual_seed(job.seed)
    model = MemMCMAE(config.model, config.data.image_size)
    feed = CachedFeed([learnt.table()], len(learnt), job.batch_size, job.seed, 0)
    looks: list[dict[str, float]] = []

    def on_log(metrics: Metrics) -> None:
        if "val_error" in metrics:
            looks.append({name: round(float(metrics[name]), 5) for name in LOOKED})

    def on_checkpoint(save: Save, _metrics: Metrics) -> None:
        save(checkpoint)

    outcome = train(
        model,
        feed,
        job,
        bits=spec.bits,
        pixel_mean=spec.pixel_mean,
        pixel_std=spec.pixel_std,
        resume_from=checkpoint if (checkpoint / STATE_FILE).is_file() else None,
        on_look=_held_out(looked_at, spec, model) if looked_at else None,
        on_log=on_log,
        on_checkpoint=on_checkpoint,
    )
    models = {LAST: (outcome.ema_model, outcome.steps)}
    if job.select != "last":
        models[SELECTED] = (outcome.selected, outcome.selected_step)
    for name, (chosen, steps) in models.items():
        info = _info(data, config, spec) | {"steps": steps, "train_seconds": round(outcome.train_seconds, 1)}
        export_model(folder / name, chosen, info)
    summary.write_text(json.dumps(outcome.as_dict() | {"looks": looks}) + "\n")
    shutil.rmtree(checkpoint, ignore_errors=True)
    return json.loads(summary.read_text())


def judge(data: QualitySet, folder: Path, passes: int) -> dict[str, Any]:
    """Return the scores of a trained model, whole and with parts of it shut off, as `quality_figures.judged`.

    Without memory, and hearing the last level alone, the score is fitted anew on the same normals.
    """
    loaded = load_model(folder)
    scores, rate = judged(data, _Masked(loaded, passes))
    found: dict[str, Any] = {"scores": scores, "false_positive_rate": rate, "parameters": parameters(loaded.model)}
    has_levels = len(loaded.model.decoder.level_indices) > 1
    parts = {
        "without memory": memory_ablated(loaded.model) if loaded.config.memory_slots else nullcontext(),
        "last level alone": levels_ablated(loaded.model) if has_levels else nullcontext(),
    }
    for name, shut in parts.items():
        if not isinstance(shut, nullcontext):
            with shut:
                found["scores"][name] = judged(data, _Masked(loaded, passes), (DEFAULT,))[0][DEFAULT]
    return found


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Masked:
    """The reconstruction of complementary masks, the same for an image as in the lake."""

    def __init__(self, loaded: LoadedModel, passes: int) -> None:
        self._loaded, self._passes = loaded, passes

    def __call__(self, images_BCHW: Tensor, names: Sequence[str]) -> Reconstruction:
        model, info = self._loaded.model, self._loaded.info
        ids_BPK = mask_ids(self._loaded.digest, names, model.num_patches, model.num_keep, self._passes)
        standardised_BCHW = (images_BCHW - info.pixel_mean) / info.pixel_std
        return reconstruct(model, standardised_BCHW, ids_BPK).rescale(info.pixel_mean, info.pixel_std)


def _kept_back(images: Images, share: float) -> tuple[Images, Images | None]:
    rows = pa.table({"patient_key": images.patients, "object_key": images.names, "row": range(len(images))})
    kept, held = keep_back(rows, share)
    return images.take(kept["row"].to_pylist()), images.take(held["row"].to_pylist()) if held.num_rows else None


def _spec(images: Images, config: Config) -> InputSpec:
    grey_NHW = images.grey()
    return InputSpec(config.data.bits, float(grey_NHW.mean(dtype=np.float64)), float(grey_NHW.std(dtype=np.float64)))


def _held_out(images: Images, spec: InputSpec, model: MemMCMAE) -> HeldOut:
    cpu = torch.device("cpu")
    pixels = {"bits": spec.bits, "pixel_mean": spec.pixel_mean, "pixel_std": spec.pixel_std}
    return HeldOut(standardise(images.pixels_NHWC, **pixels, device=cpu), model, Alone(), 0, 1)


def _info(data: QualitySet, config: Config, spec: InputSpec) -> dict[str, Any]:
    return {
        "image_size": config.data.image_size,
        "channels": 1,
        "pixel_mean": spec.pixel_mean,
        "pixel_std": spec.pixel_std,
        "preprocess_id": config.preprocess_id,
        "cohort": data.name,
        "dataset_version": 0,
        "config_id": config.config_id,
        "seed": config.train.seed,
    }
