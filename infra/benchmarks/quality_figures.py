"""Scores to AUROC, paired differences and tables, and runs kept as JSON; for the benchmarks of quality.

Whatever reconstructs images is judged alike: the scorers of `memmc.scoring`, fitted on the same held-out normals as
`memmc calibrate` fits them, then the test images.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from quality_sets import Images, QualitySet
from torch import Tensor

from memmc.config import ScoreConfig
from memmc.evaluation.controls import control_scores
from memmc.evaluation.metrics import auroc, bootstrap_values, percentile_interval
from memmc.scoring.calibration import threshold_at
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.masks import Reconstruction
from memmc.scoring.scorer import Features, make_scorer

DEFAULT = ScoreConfig().scorer
SCORERS = (DEFAULT, "residual_statistics", "ssim", "l1")
FOLDS = 20
RATE = 0.05
_BATCH, _RESAMPLINGS, _CONFIDENCE = 32, 1000, 0.95

Reconstruct = Callable[[Tensor, Sequence[str]], Reconstruction]
Scores = dict[str, list[float]]


def batches(images: Images) -> Iterable[tuple[Tensor, list[str]]]:
    """Yield images_BCHW in [0, 1] and their names."""
    grey_NHW = images.grey()
    for start in range(0, len(images), _BATCH):
        yield torch.from_numpy(grey_NHW[start : start + _BATCH])[:, None], images.names[start : start + _BATCH]


def judged(data: QualitySet, reconstruct: Reconstruct, scorers: Sequence[str] = SCORERS) -> tuple[Scores, float]:
    """Return the scores of the test images by scorer, and the share of normals that the first one flags at 5 %.

    Args:
        reconstruct: images_BCHW in [0, 1] and their names to a reconstruction in the same unit; run once per image.
    """
    made = [make_scorer(ScoreConfig.model_validate({"scorer": name})) for name in scorers]
    parts: dict[str, list[list[Features]]] = {"held": [[] for _ in made], "test": [[] for _ in made]}
    for split in parts:
        for images_BCHW, names in batches(getattr(data, split)):
            reconstruction = reconstruct(images_BCHW, names)
            for scorer, found in zip(made, parts[split], strict=True):
                found.append(scorer.features(images_BCHW, reconstruction))
    scores: Scores = {}
    rates: list[float] = []
    for name, scorer, held, test in zip(scorers, made, parts["held"], parts["test"], strict=True):
        fitted = fit_and_calibrate(scorer, Features.join(held), data.held.patients, folds=FOLDS)
        values_N = fitted.scorer.score_features(Features.join(test)).anomaly_score_B
        scores[name] = [float(value) for value in values_N]
        if len(data.held) >= 1 / RATE - 1:
            threshold = threshold_at(fitted.normal_scores_N, RATE)
            rates.append(float((values_N[~data.abnormal_N] > threshold).mean()))
    return scores, rates[0] if rates else float("nan")


def control_lines(data: QualitySet) -> dict[str, float]:
    """Return the AUROC of what needs no model, either way round, best first."""
    found = {
        name: auroc(data.abnormal_N, raw) for name, raw in control_scores(data.train.grey(), data.test.grey()).items()
    }
    return dict(sorted(((name, max(area, 1 - area)) for name, area in found.items()), key=lambda item: -item[1]))


def resampled(data: QualitySet, scores: ArrayLike) -> NDArray[np.float64]:
    """Return the AUROC of each resampling of patients; the same resamplings for all scores of a set."""
    return bootstrap_values(data.abnormal_N, scores, data.test.patients, auroc, _RESAMPLINGS, 0)


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Return Spearman's correlation of scores without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(scores))) for scores in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@dataclass(frozen=True)
class Row:
    """One method on one set over seeds.

    Attributes:
        areas: one AUROC per seed.
        low, high: patient bootstrap of their mean.
        resamplings_R: of the mean.
    """

    areas: tuple[float, ...]
    low: float
    high: float
    resamplings_R: NDArray[np.float64]

    @classmethod
    def of(cls, data: QualitySet, scores: Sequence[ArrayLike]) -> Row:
        resamplings_R = np.mean([resampled(data, one) for one in scores], axis=0)
        interval = percentile_interval(resamplings_R, _CONFIDENCE)
        return cls(tuple(auroc(data.abnormal_N, one) for one in scores), interval.low, interval.high, resamplings_R)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.areas)

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.areas):.3f}" if len(self.areas) > 1 else ""
        return f"{self.mean:.3f}{spread} ({self.low:.3f}–{self.high:.3f})"

    def ahead_of(self, other: Row) -> str:
        """Return the paired difference: per patient within a resampling, per seed where both have as many."""
        interval = percentile_interval(self.resamplings_R - other.resamplings_R, _CONFIDENCE)
        text = f"{self.mean - other.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
        if len(self.areas) == len(other.areas) > 1:
            gains = [mine - its for mine, its in zip(self.areas, other.areas, strict=True)]
            text += f", sd over seeds {statistics.stdev(gains):.3f}"
        return text


class Store:
    """Finished runs, one JSON file each, in a folder.

    A run that is there is not repeated, unless it was made with other settings: then nothing is overwritten.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, key: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return a run, None where it is still to be made.

        Raises:
            SystemExit: it was made, or begun, with other settings.
        """
        paths = [path for path in (self._path(key), self._path(key, "begun")) if path.is_file()]
        if not paths:
            return None
        found = json.loads(paths[0].read_text())
        if found["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{paths[0]} was made with {found['settings']}, not {settings}; choose another --out")
        return found if paths[0] == self._path(key) else None

    def begin(self, key: str, settings: dict[str, Any]) -> None:
        """Note what a run is made with, so that it is not gone on with otherwise."""
        self._write(self._path(key, "begun"), {"settings": settings})

    def put(self, key: str, settings: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """Keep a run."""
        self._write(
            self._path(key),
            {"settings": settings, "load": os.getloadavg()[0], "threads": torch.get_num_threads(), **run},
        )
        self._path(key, "begun").unlink(missing_ok=True)
        return json.loads(self._path(key).read_text())

    def _path(self, key: str, state: str = "run") -> Path:
        return self.folder / f"{key}.{state}.json"

    @staticmethod
    def _write(path: Path, content: dict[str, Any]) -> None:
        aside = path.with_suffix(".writing")
        aside.write_text(json.dumps(content) + "\n")
        aside.replace(path)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
