"""MemMC-MAE as a whole: reductions, gradients, sizes."""

from __future__ import annotations

import pytest
import torch
from reference_mae import reference_mae

from memmc.config import PRESETS, ModelConfig, load_config
from memmc.errors import ConfigError
from memmc.model.mae import MemMCMAE
from memmc.model.masking import random_ids_keep

SMALL = {"encoder_dim": 32, "encoder_depth": 3, "encoder_heads": 4, "decoder_dim": 16, "decoder_depth": 2}


def build(image_size: int = 32, channels: int = 1, **changes: object) -> MemMCMAE:
    torch.manual_seed(0)
    return MemMCMAE(ModelConfig(**{**SMALL, "memory_slots": 5, **changes}), image_size, channels)


def images_of(model: MemMCMAE, batch: int = 3) -> torch.Tensor:
    shape = (batch, model.channels, model.image_size, model.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_without_memory_and_cross_attention_it_is_a_plain_mae(channels: int) -> None:
    model = build(channels=channels, memory_slots=0, cross_attention=False)
    images = images_of(model)
    ids = random_ids_keep(3, model.num_patches, model.num_keep, torch.Generator().manual_seed(2))
    output = model(images, ids)
    loss, pred = reference_mae(model, images, ids)
    torch.testing.assert_close(output.pred_BLP, pred, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (output.loss, loss))
    for name, mine, expected in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "changes",
    [{"gate": gate} for gate in ("channel", "head", "scalar")]
    + [{"levels": "last"}, {"levels": "every_2"}, {"cross_attention": False}, {"memory_slots": 0}]
    + [{"norm_pix_loss": True}, {"decoder_self_attention": False}, {"bottleneck_slots": 4, "levels": "last"}],
)
def test_gradient_reaches_every_parameter(changes: dict[str, object]) -> None:
    model = build(**changes)
    model(images_of(model), generator=torch.Generator().manual_seed(0)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        rows = parameter.grad.flatten(1).abs().sum(1) if parameter.ndim > 1 else parameter.grad.abs()
        dead = "positions" in name or rows.max() <= 1e-9
        assert not dead, name
        if "memory" in name or "gate" in name:
            assert (rows > 0).all(), name


@pytest.mark.parametrize(
    ("preset", "image_size", "patch", "patches", "kept", "encoder", "decoder", "slots"),
    [
        ("tiny", 64, 8, 64, 16, (192, 6, 3), (128, 4, 4), 16),
        ("small", 128, 8, 256, 64, (384, 8, 6), (256, 4, 8), 40),
        ("base", 224, 16, 196, 49, (768, 12, 12), (512, 8, 16), 40),
    ],
)
def test_presets_are_the_table_of_the_design(
    preset: str, image_size: int, patch: int, patches: int, kept: int,
    encoder: tuple[int, ...], decoder: tuple[int, ...], slots: int,
) -> None:  # fmt: skip
    assert preset in PRESETS
    config = load_config(overrides=[f"train.preset={preset}"]).model
    with torch.device("meta"):
        model = MemMCMAE(config, image_size)
    assert (config.patch_size, model.num_patches, model.num_keep) == (patch, patches, kept)
    assert (config.encoder_dim, config.encoder_depth, config.encoder_heads) == encoder
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == decoder
    assert (config.memory_slots, config.mask_ratio, config.levels) == (slots, 0.75, "all")
    assert config.decoder_self_attention and config.cross_attention and not config.norm_pix_loss
    slots = sum(p.numel() for n, p in model.named_parameters() if "memory" in n)
    assert slots == 2 * config.encoder_depth * config.memory_slots * config.encoder_dim


@pytest.mark.parametrize(("size", "patch", "channels", "batch"), [(16, 4, 1, 1), (48, 8, 2, 3), (40, 5, 4, 2)])
def test_any_size_and_number_of_channels(size: int, patch: int, channels: int, batch: int) -> None:
    model = build(size, channels, patch_size=patch)
    output = model(images_of(model, batch))
    patches = (size // patch) ** 2
    assert output.pred_BLP.shape == (batch, patches, patch * patch * channels)
    assert output.mask_BL.sum() == batch * (patches - model.num_keep)
    assert model.unpatchify(output.pred_BLP).shape == (batch, channels, size, size)


def test_loss_counts_removed_patches_only() -> None:
    model = build()
    patches, pred = torch.zeros(2, 16, 64), torch.zeros(2, 16, 64)
    mask = torch.zeros(2, 16)
    mask[:, 3], pred[:, 3] = 1.0, 2.0
    pred[:, 7] = 100.0
    assert model.loss(patches, pred, mask) == 4.0


def test_a_removed_patch_does_not_influence_the_prediction() -> None:
    model = build().eval()
    images = images_of(model, 1)
    ids = torch.tensor([[0, 5, 9]])
    changed = model.patchify(images).clone()
    changed[:, 6] += 10.0
    before, after = model(images, ids), model(model.unpatchify(changed), ids)
    torch.testing.assert_close(before.pred_BLP, after.pred_BLP)
    assert after.loss > before.loss
    changed[:, 5] += 10.0
    assert (model(model.unpatchify(changed), ids).pred_BLP - before.pred_BLP).abs().max() > 1e-3


def test_the_order_of_the_visible_patches_does_not_matter() -> None:
    model = build().eval()
    images = images_of(model, 1)
    one, other = model(images, torch.tensor([[1, 4, 11]])), model(images, torch.tensor([[11, 1, 4]]))
    torch.testing.assert_close(one.pred_BLP, other.pred_BLP, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_predict_equals_one_pass_per_mask(norm_pix_loss: bool) -> None:
    model = build(norm_pix_loss=norm_pix_loss).eval()
    images = images_of(model, 2)
    ids = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(n)) for n in range(2)]).view(2, 4, 4)
    together = model.predict(images, ids)
    assert together.shape == (2, 4, 16, 64)
    for mask in range(4):
        torch.testing.assert_close(together[:, mask], model(images, ids[:, mask]).pred_BLP, atol=1e-5, rtol=1e-5)


def test_predictions_of_standardised_patches_come_in_the_unit_of_the_image() -> None:
    model = build(norm_pix_loss=True).eval()
    images = images_of(model, 2)
    ids = torch.arange(4).expand(2, -1)
    output = model(images, ids)
    removed = output.mask_BL.bool()
    patches = model.patchify(images)
    torch.testing.assert_close(
        output.pred_BLP[removed].mean(-1) - patches[removed].mean(-1),
        patches[removed].std(-1) * model.decode(model.encode(patches, ids), ids)[removed].mean(-1),
        atol=1e-4,
        rtol=1e-4,
    )
    assert output.loss.item() == pytest.approx(
        ((output.pred_BLP - patches)[removed] / patches[removed].std(-1, keepdim=True)).square().mean().item(), rel=1e-3
    )


def test_masks_follow_the_generator() -> None:
    model = build()
    draws = [model(images_of(model), generator=torch.Generator().manual_seed(seed)).ids_keep_BK for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_weight_decay_for_memory_tokens_biases_and_norms() -> None:
    model = build(gate="head", bottleneck_slots=4)
    decayed, free = model.parameter_groups(0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free_names = {names[id(parameter)] for parameter in free["params"]}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert free_names | decayed_names == set(names.values())
    assert not free_names & decayed_names
    assert all(("weight" in name) and ("norm" not in name) for name in decayed_names)
    for word in ("memory_key", "memory_value", "memory_slots", "class_token", "mask_token", "bias", "norm"):
        assert any(word in name for name in free_names), word
        assert not any(word in name for name in decayed_names), word


@pytest.mark.parametrize(
    ("changes", "size", "text"),
    [
        ({"patch_size": 7}, 32, "not a multiple of the patch side 7"),
        ({"encoder_heads": 5}, 32, "not a multiple of 5 heads"),
        ({"mask_ratio": 0.99}, 32, "keeps 0 of 16"),
        ({"encoder_dim": 30, "encoder_heads": 3}, 32, "not a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], size: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(size, **changes)


def test_a_decoder_without_any_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no removed patch would see\s+anything"):
        load_config(overrides=["model.cross_attention=false", "model.decoder_self_attention=false"])


@pytest.mark.parametrize("levels", ["every_0", "every_", "first", "every_-1"])
def test_unknown_levels_are_refused(levels: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.levels"):
        load_config(overrides=[f"model.levels={levels}"])


@pytest.mark.parametrize("gate", ["channel", "head", "scalar"])
def test_bf16_autocast_stays_near_float32(gate: str) -> None:
    model = build(gate=gate, bottleneck_slots=0)
    images, generator = images_of(model, 8), torch.Generator
    exact = model(images, generator=generator().manual_seed(0))
    seen: list[torch.dtype] = []
    model.decoder.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images, generator=generator().manual_seed(0))
    assert seen == [torch.float32]  # what blocks add to is not rounded
    assert rounded.loss.dtype == torch.float32
    assert 0 < (rounded.pred_BLP - exact.pred_BLP).abs().mean() / exact.pred_BLP.abs().mean() < 0.02
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (rounded.loss, exact.loss))
    mine, other = (torch.cat([part.flatten() for part in parts]) for parts in (ours, theirs))
    assert all(part.dtype == torch.float32 for part in ours), names
    assert (mine - other).norm() / other.norm() < 0.05


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes \(batch, \*\(1, 32, 32\)\)"):
        build()(torch.zeros(1, 3, 32, 32))
