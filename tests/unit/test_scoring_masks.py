"""Complementary masks: coverage, determinism, and that visible predictions are never used."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memmc.config import ModelConfig
from memmc.errors import UsageError
from memmc.model.mae import MemMCMAE
from memmc.model.masking import num_groups
from memmc.scoring.masks import (
    complementary_groups,
    mask_ids,
    num_rounds,
    predict,
    random_mask_ids,
    reconstruct,
    reconstruct_pasted,
    round_seed,
)

SEED = b"seed"


class Output(NamedTuple):
    pred_BLP: Tensor
    mask_BL: Tensor


class StandIn(nn.Module):
    """Predicts `base + noise of the pass` where hidden and garbage where visible."""

    num_patches, num_keep, patch, side = 64, 16, 8, 64

    def __init__(self, garbage: float = float("nan")) -> None:
        super().__init__()
        self.garbage = garbage
        self.batches: list[int] = []

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        return nn.functional.unfold(images_BCHW, self.patch, stride=self.patch).transpose(1, 2)

    def unpatchify(self, patches_BLP: Tensor) -> Tensor:
        return nn.functional.fold(patches_BLP.transpose(1, 2), (self.side, self.side), self.patch, stride=self.patch)

    def forward(self, images_BCHW: Tensor, ids_keep_BK: Tensor) -> Output:
        self.batches.append(len(images_BCHW))
        patches = self.patchify(images_BCHW)
        mask = torch.ones(patches.shape[:2]).scatter(1, ids_keep_BK, 0)
        drift = ids_keep_BK.float().mean(1)[:, None, None]  # differs from pass to pass
        return Output(torch.where(mask[..., None] > 0, 2 * patches + drift, self.garbage), mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.integers(1, 3))
def test_every_patch_is_hidden_and_visible_in_every_round(sizes: tuple[int, int], rounds: int) -> None:
    num_patches, num_keep = sizes
    ids = complementary_groups(num_patches, num_keep, [bytes([r]) for r in range(rounds)])
    groups = num_groups(num_patches, num_keep)
    assert ids.shape == (rounds * groups, num_keep)
    for start in range(0, len(ids), groups):
        visible = torch.zeros(groups, num_patches).scatter(1, ids[start : start + groups], 1)
        assert (visible.sum(1) == num_keep).all()  # no patch twice in one pass
        assert (visible.sum(0) >= 1).all()
        assert (visible.sum(0) <= groups - 1).all()


def test_masks_partition_the_patches_when_the_ratio_divides() -> None:
    ids = complementary_groups(64, 16, [SEED])
    assert ids.shape == (4, 16)
    assert sorted(ids.flatten().tolist()) == list(range(64))


def test_a_round_that_cannot_exist_is_refused() -> None:
    for kept in (0, 64):
        with pytest.raises(UsageError, match="visible patches of 64"):
            complementary_groups(64, kept, [SEED])


def test_masks_do_not_change_between_versions() -> None:
    # Written down once: scores of older models stay comparable only while this holds.
    seed = round_seed("0123456789abcdef", "1.2.3", 0)
    assert seed.hex().startswith("6f71245d3d6d1bce")
    assert complementary_groups(8, 2, [b"golden"]).tolist() == GOLDEN


GOLDEN = [[3, 7], [1, 6], [0, 4], [2, 5]]


def test_masks_depend_on_model_image_and_round_only() -> None:
    uids = ["1.2.3", "1.2.4", "1.2.5"]
    ids = mask_ids("digest", uids, 64, 16, 8)
    assert ids.shape == (3, 8, 16)
    assert torch.equal(mask_ids("digest", uids[::-1], 64, 16, 8).flip(0), ids)
    assert torch.equal(mask_ids("digest", uids[1:2], 64, 16, 8)[0], ids[1])
    assert torch.equal(mask_ids("digest", uids, 64, 16, 4), ids[:, :4])
    assert not torch.equal(mask_ids("other", uids, 64, 16, 8), ids)
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[:, :4], ids[:, 4:])


def test_passes_are_rounded_up_to_whole_rounds() -> None:
    assert [num_rounds(p, 64, 16) for p in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_visible_predictions_are_never_used() -> None:
    images = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = mask_ids("d", ["a", "b", "c"], 64, 16, 8)
    result = reconstruct(StandIn(), images, ids)
    assert torch.isfinite(result.mean_BCHW).all()
    assert torch.isfinite(result.variance_BCHW).all()
    other = reconstruct(StandIn(garbage=1e30), images, ids)
    assert torch.equal(result.mean_BCHW, other.mean_BCHW)
    assert (result.count_BL == 6).all()


def test_mean_and_variance_equal_those_over_the_hidden_passes() -> None:
    model = StandIn()
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    ids = mask_ids("d", ["a", "b"], 64, 16, 8)
    result = reconstruct(model, images, ids)
    for b in range(2):
        stack = (
            torch.stack([model(images[b : b + 1], ids[b, p : p + 1]).pred_BLP[0] for p in range(8)]).double().numpy()
        )
        expected_mean = model.unpatchify(torch.from_numpy(np.nanmean(stack, 0))[None].float())[0]
        expected_variance = model.unpatchify(torch.from_numpy(np.nanvar(stack, 0, ddof=1))[None].float())[0]
        torch.testing.assert_close(result.mean_BCHW[b], expected_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.variance_BCHW[b], expected_variance, rtol=1e-4, atol=1e-4)


def test_joining_passes_changes_the_batches_and_not_the_result() -> None:
    images = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    ids = mask_ids("d", list("abcd"), 64, 16, 4)
    single, joined = StandIn(), StandIn()
    first, second = reconstruct(single, images, ids, max_batch=1), reconstruct(joined, images, ids, max_batch=16)
    assert single.batches == [4, 4, 4, 4]
    assert joined.batches == [16]
    torch.testing.assert_close(first.mean_BCHW, second.mean_BCHW)


def test_a_patch_that_is_never_hidden_is_refused() -> None:
    ids = torch.arange(16).expand(1, 3, 16)
    with pytest.raises(UsageError, match="visible in every pass"):
        reconstruct(StandIn(), torch.zeros(1, 1, 64, 64), ids)


def test_rescale_undoes_the_standardisation() -> None:
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    ids = mask_ids("d", ["a", "b"], 64, 16, 4)
    plain = reconstruct(StandIn(), images, ids)
    back = plain.rescale(0.4, 0.2)
    torch.testing.assert_close(back.mean_BCHW, plain.mean_BCHW * 0.2 + 0.4)
    torch.testing.assert_close(back.variance_BCHW, plain.variance_BCHW * 0.04)


def test_the_real_model_gives_each_image_its_own_result_in_any_batch() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        encoder_dim=32, encoder_depth=2, encoder_heads=2, decoder_dim=32, decoder_depth=1, decoder_heads=2
    )
    model = MemMCMAE(config, 32, 1).eval()
    images = torch.randn(3, 1, 32, 32)
    ids = mask_ids("d", ["a", "b", "c"], model.num_patches, model.num_keep, 8)
    together = reconstruct(model, images, ids)
    alone = reconstruct(model, images[1:2], ids[1:2], max_batch=1)
    assert together.mean_BCHW.shape == images.shape
    torch.testing.assert_close(together.mean_BCHW[1:2], alone.mean_BCHW, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.variance_BCHW[1:2], alone.variance_BCHW, rtol=1e-3, atol=1e-6)


def test_random_masks_depend_on_model_image_and_pass_alone() -> None:
    ids = random_mask_ids("model", ["a", "b"], 64, 16, 10)
    assert ids.shape == (2, 10, 16)
    assert torch.equal(ids[1:], random_mask_ids("model", ["b"], 64, 16, 10))
    assert torch.equal(ids[:, :3], random_mask_ids("model", ["a", "b"], 64, 16, 3))
    assert len({tuple(row.tolist()) for row in ids.flatten(0, 1)}) == 20
    assert not torch.equal(ids, random_mask_ids("other", ["a", "b"], 64, 16, 10))
    counts = torch.bincount(random_mask_ids("model", [str(i) for i in range(100)], 64, 16, 10).flatten())
    assert counts.min() > 0.8 * 250 and counts.max() < 1.2 * 250  # every patch is shown as often as another


def test_a_pass_is_pasted_into_the_image_where_it_was_hidden() -> None:
    model, images = StandIn(), torch.rand(2, 1, 64, 64)
    ids = random_mask_ids("model", ["a", "b"], 64, 16, 5)
    pasted = reconstruct_pasted(model, images, ids)
    assert torch.isfinite(pasted.pasted_PBCHW).all()  # the garbage at visible places is never used
    first = model.patchify(pasted.pasted_PBCHW[0])
    for image in range(2):
        visible = ids[image, 0]
        torch.testing.assert_close(first[image, visible], model.patchify(images)[image, visible])
    assert (pasted.count_BL == 5 - torch.nn.functional.one_hot(ids, 64).sum((1, 2))).all()
    torch.testing.assert_close(pasted.mean_BCHW, pasted.pasted_PBCHW.mean(0))
    scaled = pasted.rescale(0.5, 0.25)
    torch.testing.assert_close(scaled.pasted_PBCHW, pasted.pasted_PBCHW * 0.25 + 0.5)


def test_the_scorer_names_its_masks() -> None:
    model, images = StandIn(), torch.rand(1, 1, 64, 64)
    paper = predict("pasted_ms_ssim", model, "model", ["a"], images, 10)
    ours = predict("residual_statistics", model, "model", ["a"], images, 4)
    assert hasattr(paper, "pasted_PBCHW") and not hasattr(ours, "pasted_PBCHW")
    assert (ours.count_BL == 3).all() and paper.count_BL.max() <= 10


def test_an_image_stopped_early_has_the_first_of_its_passes() -> None:
    model, images = StandIn(), torch.rand(1, 1, 64, 64)
    stopped = predict("residual_statistics", model, "model", ["a"], images, 4, 2)
    ids = mask_ids("model", ["a"], 64, 16, 4)[:, :2]
    torch.testing.assert_close(stopped.mean_BCHW, reconstruct(model, images, ids).mean_BCHW)
    assert set(stopped.count_BL.flatten().tolist()) == {1, 2}
