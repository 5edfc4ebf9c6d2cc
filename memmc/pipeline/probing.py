"""What a calibrated model does on held-out normals, and on the same images with a lesion planted in each.

Nothing is written: the images are changed in memory, and scored in this process.

Shape legend: N images, C channels, H height, W width, L patches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memmc.config import Config, MonitorConfig
from memmc.lake.tables import Lake
from memmc.model.artifact import LoadedModel, load_model
from memmc.monitoring.canary import Planted, plant
from memmc.pipeline.images import read_images
from memmc.pipeline.models import OpenModel
from memmc.pipeline.select import newest_calibration
from memmc.scoring.masks import predict
from memmc.scoring.scorer import Scorer, scorer_from_bytes
from memmc.scoring.strata import Judge, judge_of, stratum_names
from memmc.training.looks import Fixed, health, patch_errors

_BATCH = 16
_ROUNDS = 5
_LOOK_IMAGES = 64


@dataclass(frozen=True)
class Judged:
    """A model with its newest calibration, ready to judge images in this process.

    Attributes:
        model: as registered.
        loaded: its weights.
        calibration: row of `calibrations`.
        judge: of the calibration, at the rate asked for.
        passes: per image; all of them, also where the calibration lets images stop early (`score.early_stop`).
    """

    model: OpenModel
    loaded: LoadedModel
    calibration: Mapping[str, Any]
    scorer: Scorer
    judge: Judge
    passes: int

    @classmethod
    def open(cls, config: Config, lake: Lake, model: OpenModel, rate: float | None = None) -> Judged:
        """Load a model and its newest calibration.

        Args:
            rate: false-positive rate to judge by; the calibration's own when absent.

        Raises:
            DataError: the model is not calibrated.
            GateRefused: its normals, all strata together, cannot carry the rate.
        """
        calibration = newest_calibration(lake, model)
        judge = judge_of(calibration)
        return cls(
            model,
            load_model(model.folder, "cuda" if torch.cuda.is_available() else "cpu"),
            calibration,
            scorer_from_bytes(calibration["scorer_state"]),
            judge if rate is None else judge.at(rate),
            calibration["passes"] or config.score.passes,
        )

    def standardised(self, images_NCHW: Tensor) -> Tensor:
        """Return images as the model was trained on them."""
        return (images_NCHW - self.loaded.info.pixel_mean) / self.loaded.info.pixel_std

    def scores(self, images_NCHW: Tensor, uids: Sequence[str]) -> NDArray[np.float64]:
        """Return the score (N,) of each image after all passes, as the lake holds it where no image stops early."""
        info, found = self.loaded.info, list[NDArray[np.float64]]()
        device = next(self.loaded.model.parameters()).device
        for start in range(0, len(images_NCHW), _BATCH):
            images = images_NCHW[start : start + _BATCH].to(device)
            names = uids[start : start + _BATCH]
            with torch.inference_mode():
                predicted = predict(
                    self.calibration["scorer"],
                    self.loaded.model,
                    self.loaded.digest,
                    names,
                    self.standardised(images),
                    self.passes,
                )
            rescaled = predicted.rescale(info.pixel_mean, info.pixel_std)
            found.append(self.scorer.score(images, rescaled).anomaly_score_B)
        return np.concatenate(found)

    def flags(self, images_NCHW: Tensor, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
        """Return which images (N,) lie above the threshold of their stratum.

        Args:
            rows: `sop_instance_uid` and the columns that name a stratum, of each image.
        """
        columns = {name: [row[name] for row in rows] for name in self.judge.columns}
        scores = self.scores(images_NCHW, [row["sop_instance_uid"] for row in rows])
        return self.judge.judge(scores, stratum_names(columns, len(rows))).is_abnormal_B


def read_normals(lake: Lake, cohort: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return images_NCHW in [0, 1] of the rows."""
    images_NHWC = read_images(lake, cohort, [row["sop_instance_uid"] for row in rows])
    return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous()


def planted(images_NCHW: Tensor, rules: MonitorConfig) -> Tensor:
    """Return copies in [0, 1] with one lesion each, the same for every model: sizes and contrasts of the canaries."""
    grid = [(size, contrast) for size in rules.canary_sizes for contrast in rules.canary_contrasts]
    copies = images_NCHW.numpy().copy()
    for number, image_CHW in enumerate(copies):
        lesion = Planted(*grid[number % len(grid)], rules.seed + number)
        for channel_HW in image_CHW:
            channel_HW[...] = plant(channel_HW, lesion)
    return torch.from_numpy(copies)


def hidden_errors(judged: Judged, images_NCHW: Tensor) -> tuple[float, float]:
    """Return the mean absolute error on hidden patches, and that of guessing the mean grey of all images everywhere.

    In the model's units (standard deviations of its training pixels), the same for both. The mean image would be the
    better guess, and too good a one: where patients stand alike, a model that finds lesions may know less than it.
    """
    model, images = judged.loaded.model, judged.standardised(images_NCHW[:_LOOK_IMAGES])
    fixed = Fixed.of(images, model)
    error = float(patch_errors(model, fixed.images_VCHW, fixed.ids_keep_VGK).mean())
    return error, float((images - images.mean()).abs().mean())


def slots_used(judged: Judged, images_NCHW: Tensor) -> list[float]:
    """Return the share of memory slots in use by encoder layer; empty without a memory."""
    images = judged.standardised(images_NCHW[:_LOOK_IMAGES])
    found = health(judged.loaded.model, Fixed.of(images, judged.loaded.model))
    names = sorted(name for name in found if name.startswith("memory/slots_used/"))
    return [found[name] for name in sorted(names, key=lambda name: int(name.rpartition("layer")[2]))]


def timed(images_NCHW: Tensor) -> int:
    """Return how many of the images `seconds_in_turns` scores."""
    return min(_BATCH, len(images_NCHW))


def seconds_in_turns(models: Sequence[Judged], images_NCHW: Tensor, uids: Sequence[str]) -> list[float]:
    """Return the time each model takes to score the images, s: the shortest of some rounds, in which they take turns.

    What else the machine does can only add to it.
    """
    batch, names = images_NCHW[:_BATCH], uids[:_BATCH]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(_ROUNDS + 1):
        for judged, taken in zip(models, times, strict=True):
            begun = time.perf_counter()
            judged.scores(batch, names)
            if turn:  # the first round warms up
                taken.append(time.perf_counter() - begun)
    return [min(taken) for taken in times]
