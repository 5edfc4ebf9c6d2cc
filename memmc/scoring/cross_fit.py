"""A scorer fitted on all normals, and what each of them scores under a fit that has not seen its patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memmc.errors import DataError
from memmc.scoring.maps import map_scale
from memmc.scoring.scorer import Features, Scorer


@dataclass(frozen=True)
class CrossFit:
    """A scorer fitted on all normals, and what each normal scored under a fit without its patient.

    Attributes:
        scorer: fitted on all normals.
        normal_scores_N: out-of-fold, in the order of the features.
        map_scale: 99.5 % pixel quantile of the out-of-fold maps.
        normal_peaks_N: highest pixel of each out-of-fold map, as stored (float16).
    """

    scorer: Scorer
    normal_scores_N: NDArray[np.float64]
    map_scale: float
    normal_peaks_N: NDArray[np.float64]


def fit_and_calibrate(
    scorer: Scorer, normals: Features, patient_keys: Sequence[str], folds: int = 5, seed: int = 0
) -> CrossFit:
    """Fit a scorer on normals and score the same normals out of fold, whole patients at a time.

    A fit has seen its own normals and calls them too normal, so calibrating on them would flag new normals more
    often than promised. Each patient is therefore scored by a fit on the other folds. The approximation: those fits
    have (folds - 1) / folds of the data and the final scorer has all, so new normals score slightly lower than the
    out-of-fold ones and the false-positive rate errs on the low side (cross-conformal prediction; the exact
    guarantee is that of a split into one part to fit and one to calibrate).

    Raises:
        DataError: keys and features differ in number, or there are fewer than two patients.

    Source: Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial Intelligence 2015.
    """
    if len(patient_keys) != len(normals):
        raise DataError(f"{len(patient_keys)} patient keys for {len(normals)} images")
    patients = sorted(set(patient_keys))
    if len(patients) < 2:
        raise DataError(f"{len(patients)} normal patients to calibrate on; expected at least 2")
    folds = min(folds, len(patients))
    order = np.random.default_rng(seed).permutation(len(patients))
    fold_of = {patients[place]: position % folds for position, place in enumerate(order)}
    fold_N = np.array([fold_of[key] for key in patient_keys])
    scorer = scorer.prepare(normals)
    scores_N, peaks_N = np.empty(len(normals)), np.empty(len(normals))
    maps: list[NDArray[np.floating]] = []
    for fold in range(folds):
        batch = scorer.fit(normals.take(fold_N != fold)).score_features(normals.take(fold_N == fold))
        scores_N[fold_N == fold] = batch.anomaly_score_B
        maps.append(batch.anomaly_map_BHW.astype(np.float16))
        peaks_N[fold_N == fold] = maps[-1].max((1, 2))
    return CrossFit(scorer.fit(normals), scores_N, map_scale(np.concatenate(maps)), peaks_N)
