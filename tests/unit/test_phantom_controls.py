"""Trivial features may not tell the simulated abnormal radiographs from the normal ones."""

from __future__ import annotations

import numpy as np
import pytest

from memmc.evaluation.controls import control_scores
from memmc.evaluation.metrics import auroc
from memmc.phantom.lesions import LESION_KINDS, Lesion
from memmc.phantom.radiograph import simulate

NUM_TRAIN, NUM_NORMAL, NUM_ABNORMAL = 120, 60, 60


def reduced(patient: int, lesion: Lesion | None) -> np.ndarray:
    image = simulate(patient, 0, lesion, 128).image_HW / 4095.0
    return image.reshape(64, 2, 64, 2).mean(axis=(1, 3))


@pytest.mark.slow
def test_controls_without_a_model_stay_weak() -> None:
    train = np.stack([reduced(i, None) for i in range(NUM_TRAIN)])
    normal = [reduced(1000 + i, None) for i in range(NUM_NORMAL)]
    abnormal = [reduced(2000 + i, Lesion(LESION_KINDS[i % 4], i)) for i in range(NUM_ABNORMAL)]
    labels = np.repeat([0, 1], [NUM_NORMAL, NUM_ABNORMAL])
    for name, scores in control_scores(train, np.stack(normal + abnormal)).items():
        area = float(auroc(labels, scores))
        if name in {"mean_intensity", "sharpness"}:  # the 8 x 8 controls see large lesions, as they should
            assert max(area, 1 - area) < 0.80, name
