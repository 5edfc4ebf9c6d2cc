"""What a cohort's normals look like: a robust low-rank model of their thumbnails.

Principal components of the thumbnails, fitted without the tenth that fits
worst, so that a few turned or foreign images among the normals do not become
part of what is normal. An image has two distances: within the components
(Mahalanobis) and off them (residual). Both are compared with those that the
normals themselves have to models fitted without them.

Shapes: N images, T x T thumbnail, F = T * T, K components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memmc.config import QualityConfig
from memmc.quality.flags import OOD, ORIENTATION

FOLDS = 5
_FIRST = 0.75
_ROUNDS = 2
_TRIMMED = 0.1
_IMAGES_PER_COMPONENT = 5
_LEAST = 1e-6

Floats = NDArray[np.float64]
Thumbnails = NDArray[np.float32]

TURNS: Mapping[str, Callable[[Thumbnails], Thumbnails]] = {
    "half a turn": lambda x_NTT: x_NTT[:, ::-1, ::-1],
    "upside down": lambda x_NTT: x_NTT[:, ::-1],
    "a quarter left": lambda x_NTT: np.rot90(x_NTT, 1, (1, 2)),
    "a quarter right": lambda x_NTT: np.rot90(x_NTT, 3, (1, 2)),
    "main diagonal": lambda x_NTT: x_NTT.transpose(0, 2, 1),
    "other diagonal": lambda x_NTT: np.rot90(x_NTT, 2, (1, 2)).transpose(0, 2, 1),
    "inverted": lambda x_NTT: -x_NTT,
}
"""Ways to have got an image wrong. Left and right exchanged is none of them: too many normals look alike either way."""


@dataclass(frozen=True)
class _Model:
    """Components of one fold."""

    centre_F: Floats
    axes_FK: Floats
    variance_K: Floats
    rest: float

    def distances(self, thumbnails_NTT: Thumbnails) -> Floats:
        """Return (N, 2): squared Mahalanobis distance within the components, squared residual in units of theirs."""
        offset_NF = _flat(thumbnails_NTT) - self.centre_F
        along_NK = offset_NF @ self.axes_FK
        off_N = ((offset_NF**2).sum(1) - (along_NK**2).sum(1)).clip(0)
        return np.stack([(along_NK**2 / self.variance_K).sum(1), off_N / self.rest], axis=1) + _LEAST

    def turned(self, thumbnails_NTT: Thumbnails) -> Floats:
        """Return (N, 2): the distances of each image in that of `TURNS` in which it fits best."""
        turned_RN2 = np.stack([self.distances(turn(thumbnails_NTT)) for turn in TURNS.values()])
        return turned_RN2[turned_RN2.sum(2).argmin(0), np.arange(len(thumbnails_NTT))]


@dataclass(frozen=True)
class Reference:
    """A fitted cohort: one model per fold, and the usual distances.

    Attributes:
        models: `FOLDS` models; each was fitted without the patients of its fold.
        location: medians of the logarithms of both distances over the normals.
        spread: from the median to the 84th percentile, one standard deviation of a normal distribution.
        num_images: normals it was fitted on.
    """

    models: tuple[_Model, ...]
    location: Floats
    spread: Floats
    num_images: int

    def judge(self, thumbnails_NTT: Thumbnails, patients: Sequence[str], rules: QualityConfig) -> list[set[str]]:
        """Return the flags of each image, QC_ORIENTATION, QC_OOD or none; one turned into place is no other body part.

        Args:
            thumbnails_NTT: `look.thumbnails_from_bytes`.
            patients: patient keys, so that no image is judged by a model that has seen its patient.
            rules: `quality.orientation_ratio`, `quality.max_tail`.
        """
        flags: list[set[str]] = [set() for _ in patients]
        folds_N = np.array([fold_of(patient) for patient in patients], dtype=np.int64)
        for fold, model in enumerate(self.models):
            chosen = np.flatnonzero(folds_N == fold)
            if not chosen.size:
                continue
            own = thumbnails_NTT[chosen]
            straight = model.distances(own)
            there = model.turned(own)
            better = straight.sum(1) > rules.orientation_ratio * there.sum(1)
            wrong_way = better & (self.tail(there) <= rules.max_tail)
            far = ~wrong_way & (self.tail(straight) > rules.max_tail)
            for index, way, out in zip(chosen, wrong_way, far, strict=True):
                flags[index] |= ({ORIENTATION} if way else set()) | ({OOD} if out else set())
        return flags

    def tail(self, distances_N2: Floats) -> Floats:
        """Return how far beyond the usual both distances are together: root of the sum of squares, in spreads."""
        beyond_N2 = ((np.log(distances_N2) - self.location) / self.spread).clip(0)
        return np.sqrt((beyond_N2**2).sum(1))


def fold_of(patient: str) -> int:
    """Return the fold of a patient, by hash."""
    return hashlib.sha256(patient.encode()).digest()[0] % FOLDS


def fit_reference(thumbnails_NTT: Thumbnails, patients: Sequence[str], rules: QualityConfig) -> Reference | None:
    """Fit the look of a cohort's normals; None with too few, with all in one fold, or where half of them seem turned.

    Args:
        thumbnails_NTT: of normals.
        patients: their patient keys.
        rules: `quality.components`, `quality.min_reference`.
    """
    folds_N = np.array([fold_of(patient) for patient in patients], dtype=np.int64)
    if len(folds_N) < rules.min_reference or len(set(folds_N.tolist())) < 2:
        return None
    straight_N = np.ones(len(folds_N), dtype=bool)
    models: list[_Model] = []
    distances_N2 = np.empty((len(folds_N), 2))
    for _ in range(2):  # the second time without those that the first found turned
        models = [_fit(thumbnails_NTT[straight_N & (folds_N != fold)], rules.components) for fold in range(FOLDS)]
        turned_N = np.zeros(len(folds_N), dtype=bool)
        for fold, model in enumerate(models):
            held_out = thumbnails_NTT[folds_N == fold]
            distances_N2[folds_N == fold] = model.distances(held_out)
            better = model.distances(held_out).sum(1) > rules.orientation_ratio * model.turned(held_out).sum(1)
            turned_N[folds_N == fold] = better
        straight_N = ~turned_N
        if straight_N.mean() < 0.5:
            return None
    logs_N2 = np.log(distances_N2[straight_N])
    location = np.median(logs_N2, axis=0)
    spread = np.quantile(logs_N2, 0.8413, axis=0) - location
    return Reference(tuple(models), location, np.maximum(spread, _LEAST), len(folds_N))


def _fit(thumbnails_NTT: Thumbnails, components: int) -> _Model:
    """Fit components to the three quarters nearest to the median image, then to all but the tenth that fits worst.

    Components of all images would have one for whatever a few of them share, and fit those well.
    """
    images_NF = _flat(thumbnails_NTT)
    from_median_N = ((images_NF - np.median(images_NF, axis=0)) ** 2).sum(1)
    model = _components(thumbnails_NTT[from_median_N <= np.quantile(from_median_N, _FIRST)], components)
    for _ in range(_ROUNDS):
        total_N = model.distances(thumbnails_NTT).sum(1)
        model = _components(thumbnails_NTT[total_N <= np.quantile(total_N, 1 - _TRIMMED)], components)
    return model


def _components(thumbnails_NTT: Thumbnails, components: int) -> _Model:
    images_NF = _flat(thumbnails_NTT)
    centre_F = np.median(images_NF, axis=0)
    offset_NF = images_NF - centre_F
    variances, axes = np.linalg.eigh(offset_NF.T @ offset_NF / len(offset_NF))
    count = max(1, min(components, len(images_NF) // _IMAGES_PER_COMPONENT, len(variances) - 1))
    rest = float(variances[:-count].clip(0).mean())
    return _Model(centre_F, axes[:, -count:], variances[-count:].clip(_LEAST), max(rest, _LEAST))


def _flat(thumbnails_NTT: Thumbnails) -> Floats:
    return thumbnails_NTT.reshape(len(thumbnails_NTT), -1).astype(np.float64)
