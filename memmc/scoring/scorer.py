"""One interface for every anomaly score.

An image and its reconstruction become `Features`, small enough to keep for all
held-out normals; a scorer fitted on those turns features into a score and a map.
A score that needs no fit goes the same way.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memmc.config import ScoreConfig, ScorerName
from memmc.errors import DataError, IntegrityError, UsageError
from memmc.scoring import similarity
from memmc.scoring.masks import PastedReconstruction, Reconstruction
from memmc.scoring.residuals import MIN_FIT, MapStatistics, ResidualStatistics, describe, shrink_maps

STATE_FORMAT = "2"  # 1: energies of the residual by those of the image, and signed means
WHOLE_OR_PEAK: ScorerName = "residual_whole_or_peak"
RESIDUAL_SCORERS: tuple[ScorerName, ...] = (WHOLE_OR_PEAK, "residual_statistics", "residual_peak")
PEAK_SHARE = 0.005
PEAK_HANDICAP = 1.0  # standard deviations that a place must be odder than the whole before it counts [choice]
_SCALE_IMAGES, _SCALE_FOLDS = 400, 5
MIN_NORMALS = MIN_FIT * _SCALE_FOLDS // (_SCALE_FOLDS - 1)  # that the default scorer is fitted on
LOWEST = 1e-12  # of what has a logarithm
METADATA_KEY = "memmc_scorer"


@dataclass(frozen=True)
class Features:
    """What a scorer keeps of N images.

    Attributes:
        vectors_NF: float32.
        maps_NMHW: longer side at most 64 px; float32, or float16 of normals kept for a fit.
        spread_N: root mean square, over the image, of the standard deviation between passes, grey values in [0, 1].
        size: height and width of the images, px.
    """

    vectors_NF: NDArray[np.float32]
    maps_NMHW: NDArray[np.floating]
    spread_N: NDArray[np.float32]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.vectors_NF)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> Features:
        """Return the features of some of the images."""
        return Features(self.vectors_NF[index], self.maps_NMHW[index], self.spread_N[index], self.size)

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """Return the features of all parts, in order.

        Raises:
            DataError: there is no part, or parts of other sizes.
        """
        if not parts:
            raise DataError("no images to score; expected at least one")
        if len({part.size for part in parts}) > 1:
            raise DataError(f"images of different sizes {sorted({part.size for part in parts})}; expected one size")
        return Features(
            np.concatenate([part.vectors_NF for part in parts]),
            np.concatenate([part.maps_NMHW for part in parts]),
            np.concatenate([part.spread_N for part in parts]),
            parts[0].size,
        )


@dataclass(frozen=True)
class ScoreBatch:
    """Scores of B images.

    Attributes:
        anomaly_score_B: float64, higher = more abnormal.
        anomaly_map_BHW: float32 of the images' size, at least 0, higher = more abnormal.
        spread_B: float64, see `Features.spread_N`.
    """

    anomaly_score_B: NDArray[np.float64]
    anomaly_map_BHW: NDArray[np.float32]
    spread_B: NDArray[np.float64]

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> ScoreBatch:
        """Return the scores of some of the images."""
        return ScoreBatch(self.anomaly_score_B[index], self.anomaly_map_BHW[index], self.spread_B[index])


class Scorer(ABC):
    """Turns images in [0, 1] and their reconstruction, in the same unit, into scores and maps. Immutable."""

    name: ScorerName

    @abstractmethod
    def features(self, images_BCHW: Tensor, reconstruction: Reconstruction) -> Features:
        """Return what is kept of the images; `reconstruction` must be rescaled to [0, 1]."""

    @abstractmethod
    def fit(self, normals: Features) -> Scorer:
        """Return this scorer fitted on normals that the model was not trained on.

        Raises:
            DataError: too few normals.
        """

    def prepare(self, normals: Features) -> Scorer:
        """Return this scorer with what all its fits on parts of these normals should have in common; before `fit`."""
        return self

    @abstractmethod
    def score_features(self, features: Features) -> ScoreBatch:
        """Return the scores.

        Raises:
            UsageError: the scorer needs a fit and has none.
        """

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that make the fitted scorer."""

    def score(self, images_BCHW: Tensor, reconstruction: Reconstruction) -> ScoreBatch:
        """Return the scores of images in [0, 1] and their reconstruction in the same unit."""
        return self.score_features(self.features(images_BCHW, reconstruction))

    def state_to_bytes(self) -> bytes:
        """Return the fitted scorer as safetensors."""
        from safetensors.numpy import save

        # One entry only: safetensors writes several in an order of its own, and equal states should be equal bytes.
        return save(self.state(), metadata={METADATA_KEY: f"{STATE_FORMAT} {self.name}"})


@dataclass(frozen=True)
class SimilarityScorer(Scorer):
    """The mean of a dissimilarity map; needs no fit."""

    name: ScorerName
    dissimilarity: Callable[[Tensor, Tensor], Tensor]

    MEASURES: ClassVar[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "l1": similarity.l1,
        "mse": similarity.mse,
        "ssim": similarity.ssim,
        "ms_ssim": similarity.ms_ssim,
        "gms": similarity.gradient_magnitude,
    }

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor, reconstruction: Reconstruction) -> Features:
        """Return the mean and the map of the dissimilarity."""
        map_BHW = self.dissimilarity(images_BCHW.float(), reconstruction.mean_BCHW.float())
        vectors_B1 = map_BHW.mean((1, 2))[:, None].cpu().numpy().astype(np.float32)
        return Features(vectors_B1, shrink_maps(map_BHW[:, None]), _spread(reconstruction), _size(images_BCHW))

    def fit(self, normals: Features) -> SimilarityScorer:
        """Return the scorer unchanged."""
        return self

    def score_features(self, features: Features) -> ScoreBatch:
        """Return the scores."""
        return _plain(features)

    def state(self) -> dict[str, np.ndarray]:
        """Return one placeholder: there is nothing to keep."""
        return {"unfitted": np.zeros(1, np.float32)}


@dataclass(frozen=True)
class PastedScorer(Scorer):
    """The paper's score: 1 - MS-SSIM of the image and each pass pasted into it, averaged over passes; needs no fit.

    The map is the mean error of each patch.

    Source: Tian et al., arXiv:2203.11725; ten random masks at the training ratio.
    """

    name: ScorerName = "pasted_ms_ssim"

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor, reconstruction: Reconstruction) -> Features:
        """Return the mean and the map of the error over passes.

        Raises:
            UsageError: the reconstruction is not of pasted passes.
        """
        if not isinstance(reconstruction, PastedReconstruction):
            raise UsageError("pasted_ms_ssim judges the image of each pass; reconstruct with `masks.predict`")
        images_BCHW = images_BCHW.float()
        errors = [similarity.ms_ssim(images_BCHW, pasted_BCHW.float()) for pasted_BCHW in reconstruction.pasted_PBCHW]
        map_B1HW = torch.stack(errors).mean(0)[:, None]
        height, width = _size(images_BCHW)
        side = math.isqrt(height * width // reconstruction.count_BL.shape[1])
        patches_B1hw = F.avg_pool2d(map_B1HW, side)
        map_B1HW = F.interpolate(patches_B1hw, size=(height, width), mode="nearest")
        score_B1 = map_B1HW.mean((1, 2, 3))[:, None].cpu().numpy().astype(np.float32)
        return Features(score_B1, shrink_maps(map_B1HW), _spread(reconstruction), (height, width))

    def fit(self, normals: Features) -> PastedScorer:
        """Return the scorer unchanged."""
        return self

    def score_features(self, features: Features) -> ScoreBatch:
        """Return the scores."""
        return _plain(features)

    def state(self) -> dict[str, np.ndarray]:
        """Return one placeholder: there is nothing to keep."""
        return {"unfitted": np.zeros(1, np.float32)}


@dataclass(frozen=True)
class ResidualStatisticsScorer(Scorer):
    """The residual's statistics against those of held-out normals (`memmc.scoring.residuals`) [choice].

    `residual_statistics` is the distance of the whole image, and finds what changes much of it (pneumonia).
    `residual_peak` is the height of the map's peak, and finds what changes one place (a nodule).
    `residual_whole_or_peak` is the distance, or the peak on the distance's scale where that is higher.

    Attributes:
        grid, components: of `ResidualStatistics`.
        vectors, maps: once fitted.
        peak_scale: intercept and slope that bring the logarithm of a peak to that of a distance.
    """

    grid: int
    components: int
    vectors: ResidualStatistics | None = None
    maps: MapStatistics | None = None
    name: ScorerName = WHOLE_OR_PEAK
    peak_scale: tuple[float, float] | None = None

    @torch.inference_mode()
    def features(self, images_BCHW: Tensor, reconstruction: Reconstruction) -> Features:
        """Return `describe`d images."""
        vectors_BF, maps_BMHW = describe(images_BCHW.float(), reconstruction, self.grid)
        return Features(vectors_BF, maps_BMHW, _spread(reconstruction), _size(images_BCHW))

    def prepare(self, normals: Features) -> ResidualStatisticsScorer:
        """Return the scorer with the scale of its peaks: from normals that did not take part in the fit they meet.

        Distance and peak of a normal image have logarithms of some mean and deviation; the peak's are brought to the
        distance's, less `PEAK_HANDICAP` deviations.

        Raises:
            DataError: fewer than 10 normals.
        """
        if self.name != WHOLE_OR_PEAK or self.peak_scale is not None:
            return self
        if len(normals) < MIN_NORMALS:
            raise DataError(f"{len(normals)} normal images to fit the score; expected at least {MIN_NORMALS}")
        some = np.unique(np.linspace(0, len(normals) - 1, min(len(normals), _SCALE_IMAGES)).astype(int))
        fold_N = np.arange(len(some)) % _SCALE_FOLDS
        logs: list[NDArray[np.float64]] = []
        for fold in range(_SCALE_FOLDS):
            fitted, other = normals.take(some[fold_N != fold]), normals.take(some[fold_N == fold])
            vectors = ResidualStatistics.fit(fitted.vectors_NF, self.components)
            peaks = self.peak(MapStatistics.fit(fitted.maps_NMHW).anomaly(other.maps_NMHW))
            logs.append(np.log(np.maximum([vectors.distance(other.vectors_NF), peaks], LOWEST)))
        (mean, peak_mean), (std, peak_std) = (np.concatenate(logs, 1).mean(1), np.concatenate(logs, 1).std(1))
        slope = float(std / max(peak_std, LOWEST))
        return replace(self, peak_scale=(float(mean - slope * peak_mean - PEAK_HANDICAP * std), slope))

    def fit(self, normals: Features) -> ResidualStatisticsScorer:
        """Return the scorer with statistics of these normals."""
        vectors = ResidualStatistics.fit(normals.vectors_NF, self.components)
        return replace(self.prepare(normals), vectors=vectors, maps=MapStatistics.fit(normals.maps_NMHW))

    def score_features(self, features: Features) -> ScoreBatch:
        """Return the scores."""
        whole_B, peak_B, maps_BHW = self.parts(features)
        score_B = peak_B if self.name == "residual_peak" else whole_B
        if self.name == WHOLE_OR_PEAK:
            score_B = np.maximum(whole_B, peak_B)
        return ScoreBatch(score_B, _enlarge(maps_BHW, features.size), features.spread_N.astype(np.float64))

    def parts(self, features: Features) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
        """Return distances (B,), peaks (B,), these on the distances' scale where there is one, and maps (B, h, w).

        Raises:
            UsageError: not fitted.
        """
        if self.vectors is None or self.maps is None:
            raise UsageError("residual statistics are not fitted; calibrate on held-out normals first")
        maps_BHW = self.maps.anomaly(features.maps_NMHW)
        peak_B = self.peak(maps_BHW)
        if self.peak_scale is not None:
            intercept, slope = self.peak_scale
            peak_B = np.exp(intercept + slope * np.log(np.maximum(peak_B, LOWEST)))
        return self.vectors.distance(features.vectors_NF), peak_B, maps_BHW

    @staticmethod
    def peak(maps_BHW: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the mean over the highest 0.5 % of each map's pixels."""
        flat_BP = maps_BHW.reshape(len(maps_BHW), -1).astype(np.float64)
        count = max(1, round(PEAK_SHARE * flat_BP.shape[1]))
        return np.sort(flat_BP, axis=1)[:, -count:].mean(axis=1)

    def state(self) -> dict[str, np.ndarray]:
        """Return the statistics and the settings they belong to."""
        if self.vectors is None or self.maps is None:
            raise UsageError("residual statistics are not fitted; there is no state to keep")
        state = {"settings": np.array([self.grid, self.components], np.int64)}
        if self.peak_scale is not None:
            state["peak_scale"] = np.array(self.peak_scale)
        return {**state, **self.vectors.state_dict(), **self.maps.state_dict()}


def make_scorer(config: ScoreConfig) -> Scorer:
    """Return the scorer a configuration names, not fitted."""
    if config.scorer in RESIDUAL_SCORERS:
        return ResidualStatisticsScorer(config.grid, config.components, name=config.scorer)
    if config.scorer == "pasted_ms_ssim":
        return PastedScorer()
    return SimilarityScorer(config.scorer, SimilarityScorer.MEASURES[config.scorer])


def scorer_from_bytes(data: bytes) -> Scorer:
    """Return the scorer that `state_to_bytes` wrote; nothing in the bytes is executed.

    Raises:
        IntegrityError: the bytes are no scorer state of a known format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        state, (form, _, name) = load(data), _label(data).partition(" ")
        if form == STATE_FORMAT and name in {*SimilarityScorer.MEASURES, "pasted_ms_ssim"}:
            return make_scorer(ScoreConfig.model_validate({"scorer": name}))
        if form == STATE_FORMAT and name in RESIDUAL_SCORERS:
            grid, components = (int(value) for value in state["settings"])
            vectors, maps = ResidualStatistics.from_state(state), MapStatistics.from_state(state)
            kind = RESIDUAL_SCORERS[RESIDUAL_SCORERS.index(name)]
            fitted = ResidualStatisticsScorer(grid, components, vectors, maps, kind)
            if kind != WHOLE_OR_PEAK:
                return fitted
            intercept, slope = (float(value) for value in state["peak_scale"])
            return replace(fitted, peak_scale=(intercept, slope))
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"scorer state is unreadable ({type(error).__name__}); calibrate again") from None
    raise IntegrityError(f"scorer state of format {form!r} for {name!r}, expected {STATE_FORMAT!r}; calibrate again")


def _plain(features: Features) -> ScoreBatch:
    """Return scores and maps that are the features themselves."""
    maps_BHW = _enlarge(features.maps_NMHW[:, 0].astype(np.float32), features.size)
    return ScoreBatch(features.vectors_NF[:, 0].astype(np.float64), maps_BHW, features.spread_N.astype(np.float64))


def _label(data: bytes) -> str:
    """Return our entry of a safetensors header: eight bytes of length, then JSON."""
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {}).get(METADATA_KEY, "")


def _size(images_BCHW: Tensor) -> tuple[int, int]:
    return int(images_BCHW.shape[-2]), int(images_BCHW.shape[-1])


def _spread(reconstruction: Reconstruction) -> NDArray[np.float32]:
    return reconstruction.variance_BCHW.mean((1, 2, 3)).sqrt().cpu().numpy().astype(np.float32)


def _enlarge(maps_BHW: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    if maps_BHW.shape[-2:] == size:
        return maps_BHW
    tensor = torch.from_numpy(maps_BHW)[:, None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[:, 0].numpy()
