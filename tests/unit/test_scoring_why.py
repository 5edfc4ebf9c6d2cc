"""Explanations against what they claim: shares that make the score, slots that are attended to, patches found again."""

from __future__ import annotations

import numpy as np
import pytest
import scored_model
import torch
from torch.nn.functional import avg_pool2d

from memmc.config import ScoreConfig
from memmc.model.attention import MemoryAttention
from memmc.scoring.exported import ids_for
from memmc.scoring.masks import Reconstruction
from memmc.scoring.residuals import ResidualStatistics
from memmc.scoring.scorer import make_scorer
from memmc.scoring.why import distance_shares, patch_features, scale_shares, slot_uses


def standardised(loaded, count: int, seed: int = 0) -> torch.Tensor:
    stored = scored_model.pixels(count, seed=seed)
    images = torch.from_numpy(stored.astype(np.float32) / 65535).permute(0, 3, 1, 2)
    return (images - loaded.info.pixel_mean) / loaded.info.pixel_std


def test_shares_are_those_of_the_dense_mahalanobis_distance() -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(80, 12)) @ rng.normal(size=(12, 12))
    fitted = ResidualStatistics.fit(normals.astype(np.float32), 4)
    feature = rng.normal(size=12) * 2
    z = np.clip((feature - fitted.mean_F) / fitted.std_F, -8, 8)
    outside = np.eye(12) - fitted.basis_QF.T @ fitted.basis_QF
    covariance = fitted.basis_QF.T @ np.diag(fitted.variance_Q) @ fitted.basis_QF + fitted.noise_variance * outside
    parts = z * np.linalg.solve(covariance, z)
    np.testing.assert_allclose(distance_shares(fitted, feature), parts / parts.sum(), rtol=1e-6, atol=1e-9)
    assert fitted.distance(feature[None])[0] ** 2 * 12 == pytest.approx(parts.sum())


@pytest.mark.parametrize(
    ("scorer", "coarse", "fine"),
    [
        ("residual_statistics", "broad residual", "residual of about 0.4"),
        ("residual_peak", "of about 2.6", "detail of about 0.4"),
    ],
)
def test_the_scale_of_a_planted_change_carries_the_score(scorer: str, coarse: str, fine: str) -> None:
    """A broad change of brightness is coarse, single bright pixels are fine."""
    stored = scored_model.pixels(40)
    images = torch.from_numpy(stored.astype(np.float32) / 65535).permute(0, 3, 1, 2)
    smooth = avg_pool2d(images, 9, 1, 4, count_include_pad=False)  # expected as by a good model: all but the noise
    unfitted = make_scorer(ScoreConfig.model_validate({"scorer": scorer}))
    fitted = unfitted.fit(unfitted.features(images, Reconstruction.certain(smooth)))

    def shares(change: torch.Tensor, name: str) -> float:
        features = unfitted.features(images[:1] + change, Reconstruction.certain(smooth[:1]))
        found = scale_shares(fitted, features, 32)
        assert sum(item.share for item in found) == pytest.approx(1.0)
        return sum(item.share for item in found if name in item.part)

    broad, specks = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    broad[..., 4:24, 4:24] = 0.5
    specks[..., 3::9, 3::9] = 0.6
    assert shares(broad, coarse) > shares(specks, coarse)
    assert shares(specks, fine) > shares(broad, fine)


def test_scores_without_scales_have_no_shares() -> None:
    loaded = scored_model.model()
    judged = scored_model.calibrated(loaded, scored_model.pixels(10), "l1")
    assert scale_shares(judged.scorer, None, 32) == []  # type: ignore[arg-type]


def test_a_patch_is_its_own_nearest_and_order_does_not_matter() -> None:
    loaded = scored_model.model()
    images, ids = standardised(loaded, 6), torch.from_numpy(ids_for(loaded, scored_model.uids(6), 4))
    features = patch_features(loaded.model, images, ids)
    assert features.shape == (6, 16, 16)
    torch.testing.assert_close(features.norm(dim=2), torch.ones(6, 16))
    similarity = features.flatten(0, 1) @ features.flatten(0, 1).T
    assert (similarity.argmax(1) == torch.arange(96)).all()
    alone = patch_features(loaded.model, images[3:4], ids[3:4])
    torch.testing.assert_close(alone[0], features[3], atol=1e-5, rtol=1e-5)


def test_a_slot_made_to_answer_everything_is_named_first() -> None:
    loaded = scored_model.model()
    image, ids = standardised(loaded, 1)[0], torch.from_numpy(ids_for(loaded, scored_model.uids(1), 4))[0]
    place = torch.zeros(16, dtype=torch.bool)
    place[5:7] = True
    before = slot_uses(loaded.model, image, ids, place)
    assert len(before) == 5
    assert [use.attention for use in before] == sorted((use.attention for use in before), reverse=True)
    layer = [module for module in loaded.model.encoder.modules() if isinstance(module, MemoryAttention)][1]
    assert layer.memory_key is not None
    with torch.no_grad():  # every query of layer 2, head 1 has a large part along the slot's key
        layer.query_key_value.bias[: layer.head_dim] += 5.0
        layer.memory_key[0, 2] = 5.0
    first = slot_uses(loaded.model, image, ids, place)[0]
    assert (first.layer, first.head, first.slot) == (2, 1, 3)
    assert first.attention > 0.99
    assert first.attention_everywhere > 0.99
    assert slot_uses(scored_model.model(memory_slots=0).model, image, ids, place) == []
