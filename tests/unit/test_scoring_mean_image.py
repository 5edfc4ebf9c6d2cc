"""The score without a model: it finds what is unlike the normals, and equals the scorer fed with the mean image."""

import numpy as np
import pytest
import torch

from memmc.config import ScoreConfig
from memmc.errors import DataError
from memmc.evaluation.metrics import auroc
from memmc.scoring.mean_image import FittedMeanImage, MeanImage
from memmc.scoring.scorer import Features, make_scorer

SCORE = ScoreConfig(grid=4, components=8)


def normals(rng: np.random.Generator, num: int) -> np.ndarray:
    """(N, 32, 32): one shape at varying brightness, and noise."""
    shape = np.outer(np.hanning(32), np.hanning(32))
    images = 0.3 + shape * rng.uniform(0.3, 0.5, (num, 1, 1)) + rng.normal(0, 0.02, (num, 32, 32))
    return np.clip(images, 0, 1).astype(np.float32)


def test_a_lesion_is_found_without_a_model():
    rng = np.random.default_rng(0)
    test = normals(rng, 60)
    test[:30, 6:12, 6:12] += 0.15
    scores = FittedMeanImage.fit(SCORE, normals(rng, 100), normals(rng, 120)).scores(test)
    assert auroc(np.arange(60) < 30, scores) > 0.95


def test_it_is_the_default_score_around_the_mean_image():
    rng = np.random.default_rng(1)
    train, held, test = normals(rng, 90), normals(rng, 70), normals(rng, 70)

    scorer = make_scorer(SCORE)

    def features(images: np.ndarray) -> Features:
        images_BCHW = torch.from_numpy(images)[:, None]
        return scorer.features(images_BCHW, MeanImage(train)(images_BCHW))

    expected = scorer.fit(features(held)).score_features(features(test)).anomaly_score_B
    # Whichever scorer the model uses: the control is the same.
    for scorer in ("residual_statistics", "pasted_ms_ssim"):
        config = SCORE.model_copy(update={"scorer": scorer})
        fitted = FittedMeanImage.fit(config, train, held)
        np.testing.assert_allclose(fitted.scores(test), expected, rtol=1e-6)
        parts = [fitted.scores(test[start : start + 9]) for start in range(0, len(test), 9)]
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-4)


def test_too_few_held_out_normals_are_refused():
    images = normals(np.random.default_rng(2), 9)
    with pytest.raises(DataError, match="expected at least 10"):
        FittedMeanImage.fit(SCORE, images, images)
