"""The model and one training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from memmc.config.section import Fraction, Positive, Section

Preset = Literal["tiny", "small", "base"]


class ModelConfig(Section):
    """MemMC-MAE.

    Marks: [abstract] Tian et al. 2023, [MAE] He et al. 2022, [M2] Cornia et al. 2020, [MemAE] Gong et al. 2019,
    [recalled] from the first one's body and not read again, [choice] ours. A plain MAE is `memory_slots = 0,
    cross_attention = false`; one whose latent is MemAE's reading of a memory has `bottleneck_slots` besides.
    """

    patch_size: Positive = Field(default=8, description="Side of a patch, px [choice].")
    mask_ratio: Fraction = Field(default=0.75, description="Share of patches removed [MAE].")
    encoder_dim: Positive = Field(default=192, description="Width D of the encoder, a multiple of 4 [choice].")
    encoder_depth: Positive = Field(default=6, description="Encoder blocks S [choice].")
    encoder_heads: Positive = Field(default=3, description="Heads of the encoder; divide its width [choice].")
    decoder_dim: Positive = Field(default=128, description="Width E of the decoder, a multiple of 4 [choice].")
    decoder_depth: Positive = Field(default=4, description="Decoder blocks [choice].")
    decoder_heads: Positive = Field(default=4, description="Heads of the decoder; divide its width [choice].")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of an MLP over the block's width [MAE].")
    memory_slots: int = Field(
        default=16,
        ge=0,
        description="Learned key/value slots per encoder layer and head [abstract, M2]; 0 = none; their number is "
        "[recalled] for `base`, [choice] elsewhere.",
    )
    bottleneck_slots: int = Field(
        default=0,
        ge=0,
        description="The last level is replaced by what it reads from so many slots, the memory of [MemAE]; 0 = off, "
        "as in [abstract].",
    )
    levels: str = Field(
        default="all",
        pattern=r"^(all|last|every_[1-9][0-9]{0,2})$",
        description="Encoder levels the decoder attends to: all [abstract, M2], last, or every_K: the last, and every "
        "K-th before it [choice].",
    )
    cross_attention: bool = Field(
        default=True, description="Multi-level cross-attention [abstract]; off gives the decoder of [MAE]."
    )
    decoder_self_attention: bool = Field(
        default=True, description="Self-attention in the decoder's blocks [M2, MAE]; off is cheaper [choice]."
    )
    gate: Literal["channel", "head", "scalar"] = Field(
        default="head",
        description="Granularity of the level gates: channel [M2]; head and scalar are cheaper [choice].",
    )
    norm_pix_loss: bool = Field(
        default=False,
        description="Standardise target patches [MAE]; off, since the score needs intensities [recalled]: with it, "
        "brightness and contrast of a patch are taken from the image and judged by nothing.",
    )
    recompute: bool = Field(
        default=False,
        description="While training a block keeps its input alone and computes the rest anew for the backward pass: a "
        "fraction of the memory for a second forward pass, the same numbers [choice].",
    )

    @model_validator(mode="after")
    def _decoder_mixes(self) -> ModelConfig:
        if not (self.cross_attention or self.decoder_self_attention):
            raise ValueError(
                "model.cross_attention and model.decoder_self_attention are both off: no removed patch would see "
                "anything; turn one on"
            )
        return self


PRESETS: Mapping[Preset, Mapping[str, Mapping[str, Any]]] = {
    # A few thousand small steps on a CPU: little batches and a high rate learn most in a few minutes.
    "tiny": {
        "train": {"batch_size": 8, "base_lr": 0.016, "ema_decay": 0.99},
    },
    "small": {
        "model": {
            "encoder_dim": 384,
            "encoder_depth": 8,
            "encoder_heads": 6,
            "decoder_dim": 256,
            "decoder_depth": 4,
            "decoder_heads": 8,
            "memory_slots": 40,
        },
    },
    "base": {
        "model": {
            "patch_size": 16,
            "encoder_dim": 768,
            "encoder_depth": 12,
            "encoder_heads": 12,
            "decoder_dim": 512,
            "decoder_depth": 8,
            "decoder_heads": 16,
            "memory_slots": 40,
        },
    },
}
"""Fields, by section, that a preset sets where no other source does."""

PRESET_SIDES: Mapping[Preset, int] = {"tiny": 64, "small": 128, "base": 224}
"""The image size that a preset is meant for, px; `data.image_size` of the ingest decides."""


class TrainConfig(Section):
    """One training run."""

    preset: Preset = Field(default="tiny", description="Model size; `model.*` fields override it.")
    max_minutes: float = Field(
        default=10.0, gt=0, description="Wall time of the training loop; the schedule ends with it, min."
    )
    max_steps: Positive = Field(
        default=20_000, description="Optimiser steps; whichever of the two bounds comes first ends the run."
    )
    num_workers: Positive = Field(default=2, description="Data-parallel workers.")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Go on with as few workers when nodes are lost, and with more when they come back; no fewer than "
        "num_workers when absent.",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Each worker holds the whole model, or a share of it (for a model too large for one).",
    )
    accumulate: Positive = Field(default=1, description="Batches per optimiser step.")
    use_gpu: bool | None = Field(default=None, description="One GPU per worker; found out when absent.")
    batch_size: Positive = Field(default=32, description="Images per worker and step.")
    base_lr: float = Field(default=1.5e-3, gt=0, description="Learning rate per 256 images of global batch.")
    weight_decay: float = Field(default=0.05, ge=0, description="[MAE]")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="Share of the run spent on linear warm-up.")
    clip_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="Decay per step; scored weights are the average.")
    crop_scale: float = Field(
        default=0.8, gt=0, le=1, description="Smallest area share of the random resized crop; 1 = the whole image."
    )
    rotate_degrees: float = Field(default=5.0, ge=0, le=45, description="Bound of the random rotation, degrees.")
    cache_bytes: int = Field(
        default=2 << 30, ge=0, description="Each worker keeps all images in memory up to this size, bytes."
    )
    checkpoint_seconds: float = Field(default=60.0, gt=0, description="Time between checkpoints, s.")
    look_seconds: float = Field(
        default=60.0, gt=0, description="Time between two looks at what memory and levels are used for, s."
    )
    validate_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the training patients kept back; looks then measure the masked error on their images, "
        "and how well planted lesions are found in them.",
    )
    select: Literal["last", "val_error", "probe_auroc"] = Field(
        default="last", description="Which averaged weights are registered: the last, or the best by a look's figure."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Looks without a better figure that end the run; none do when absent."
    )
    max_failures: int = Field(
        default=3, ge=0, description="Worker failures survived by restarting from the last checkpoint."
    )
    resume: str = Field(
        default="auto",
        description="Go on with an unfinished run of the same images and settings if there is one (auto), with the one "
        "of this name, or with none (new).",
    )
    warm_start: str | None = Field(
        default=None, description="Model whose averaged weights to start from; random weights when absent."
    )
    hung_seconds: float = Field(
        default=120.0, gt=0, description="A worker without a step for so long is ended and counts as failed, s."
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _elastic_range(self) -> TrainConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("train.min_workers must not be above train.num_workers")
        return self

    @model_validator(mode="after")
    def _selection_has_figures(self) -> TrainConfig:
        if (self.select != "last" or self.patience is not None) and not self.validate_share:
            raise ValueError("train.select and train.patience need train.validate_share above 0")
        if self.patience is not None and self.select == "last":
            raise ValueError("train.patience needs train.select = val_error or probe_auroc")
        return self
