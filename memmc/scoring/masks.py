"""Deterministic complementary masks, and the reconstruction they give.

Tensors carry their shape in their name: B images, P passes per image, R rounds,
G groups (passes of one round), L patches, K visible patches, D pixels of a
patch, C channels, H and W pixels.

A round shows every patch at least once and hides every patch at least once, so
that each patch is predicted from others and none is judged on the prediction of
a pass in which the model could see it: those predictions are not trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from memmc.errors import UsageError
from memmc.model.masking import num_groups, ring_places


class MaskedAutoencoder(Protocol):
    """What scoring needs of a model."""

    @property
    def num_patches(self) -> int: ...  # noqa: D102

    @property
    def num_keep(self) -> int: ...  # noqa: D102

    def patchify(self, images_BCHW: Tensor, /) -> Tensor: ...  # noqa: D102

    def unpatchify(self, patches_BLD: Tensor, /) -> Tensor: ...  # noqa: D102

    def __call__(self, images_BCHW: Tensor, ids_keep: Tensor, /) -> Any:
        """Return an object whose `pred_BLP` holds the predicted patches (B, L, D)."""
        ...


@dataclass(frozen=True)
class Reconstruction:
    """What the passes predicted where they could not see.

    Attributes:
        mean_BCHW: mean over the passes that hid the patch, in the unit of the model's input.
        variance_BCHW: unbiased variance over those passes (0 where there was one), unit squared.
        count_BL: number of those passes per patch, at least 1.
    """

    mean_BCHW: Tensor
    variance_BCHW: Tensor
    count_BL: Tensor

    @classmethod
    def certain(cls, expected_BCHW: Tensor) -> Reconstruction:
        """Return a reconstruction made in one go, without passes."""
        count_BL = torch.ones(len(expected_BCHW), 1, dtype=torch.long, device=expected_BCHW.device)
        return cls(expected_BCHW, torch.zeros_like(expected_BCHW), count_BL)

    def rescale(self, mean: float | Tensor, std: float | Tensor) -> Reconstruction:
        """Undo the standardisation ``(x - mean) / std``; tensors must broadcast over (B, C, H, W)."""
        return Reconstruction(self.mean_BCHW * std + mean, self.variance_BCHW * std**2, self.count_BL)


def num_rounds(passes: int, num_patches: int, num_keep: int) -> int:
    """Return the whole rounds that make at least `passes` passes."""
    return max(1, -(-passes // num_groups(num_patches, num_keep)))


def round_seed(model_digest: str, sop_instance_uid: str, round_index: int) -> bytes:
    """Return 32 bytes that depend on the model, the image and the round, and on nothing else.

    An image is therefore masked the same way in whatever batch, order or worker it is scored.
    """
    return hashlib.sha256(f"{model_digest}\0{sop_instance_uid}\0{round_index}".encode()).digest()


def complementary_groups(num_patches: int, num_keep: int, seeds: Sequence[bytes]) -> Tensor:
    """Return the visible patches of each pass, one round per seed: (R * G, K), int64.

    The patches are permuted and laid on a ring; pass g shows the K patches that
    start at place floor(g L / G). Where K divides L this is a partition: each patch
    is visible once and hidden G - 1 times a round. Elsewhere the windows overlap, so
    that K stays constant, each patch is still visible at least once and hidden at
    least once, and the counts of any two patches differ by few passes.

    The permutation is the stable order of SHAKE-256 output, not of a library's
    random generator, so that it cannot change with a version.

    Raises:
        UsageError: no round exists for these sizes.
    """
    places_GK = ring_places(num_patches, num_keep)
    rounds: list[np.ndarray] = []
    for seed in seeds:
        keys_L = np.frombuffer(hashlib.shake_256(seed).digest(8 * num_patches), dtype="<u8")
        rounds.append(np.sort(np.argsort(keys_L, kind="stable")[places_GK], axis=1))
    return torch.from_numpy(np.concatenate(rounds).astype(np.int64))


def mask_ids(
    model_digest: str, sop_instance_uids: Sequence[str], num_patches: int, num_keep: int, passes: int
) -> Tensor:
    """Return the visible patches of a batch: (B, P, K), int64; P is `passes` rounded up to whole rounds."""
    rounds = num_rounds(passes, num_patches, num_keep)
    return torch.stack(
        [
            complementary_groups(num_patches, num_keep, [round_seed(model_digest, uid, r) for r in range(rounds)])
            for uid in sop_instance_uids
        ]
    )


def random_mask_ids(
    model_digest: str, sop_instance_uids: Sequence[str], num_patches: int, num_keep: int, passes: int
) -> Tensor:
    """Return visible patches drawn anew in every pass, as in training: (B, P, K), int64.

    They depend on the model, the image and the pass alone. A patch may be visible in all passes, or hidden in all.

    Raises:
        UsageError: `num_keep` is not in 1 .. num_patches - 1.
    """
    num_groups(num_patches, num_keep)
    return torch.stack(
        [
            torch.stack(
                [_drawn(f"{model_digest}\0{uid}\0random {index}", num_patches, num_keep) for index in range(passes)]
            )
            for uid in sop_instance_uids
        ]
    )


def _drawn(seed: str, num_patches: int, num_keep: int) -> Tensor:
    keys_L = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * num_patches), dtype="<u8")
    return torch.from_numpy(np.sort(np.argsort(keys_L, kind="stable")[:num_keep]).astype(np.int64))


@dataclass(frozen=True)
class PastedReconstruction(Reconstruction):
    """The image of each pass: predictions where the pass hid the patch, the image itself elsewhere.

    Mean and variance are over all passes; a patch that none of them hid has the count 0.

    Attributes:
        pasted_PBCHW: in the unit of the model's input.
    """

    pasted_PBCHW: Tensor

    def rescale(self, mean: float | Tensor, std: float | Tensor) -> PastedReconstruction:
        """Undo the standardisation, as `Reconstruction.rescale`."""
        plain = Reconstruction.rescale(self, mean, std)
        return PastedReconstruction(
            plain.mean_BCHW, plain.variance_BCHW, plain.count_BL, self.pasted_PBCHW * std + mean
        )


@torch.inference_mode()
def reconstruct_pasted(model: MaskedAutoencoder, images_BCHW: Tensor, ids_keep_BPK: Tensor) -> PastedReconstruction:
    """Return the pasted image of each pass, their mean and their variance.

    Args:
        model: in evaluation mode.
        images_BCHW: standardised as in training.
        ids_keep_BPK: visible patches of each pass, any.
    """
    passes = ids_keep_BPK.shape[1]
    ids_keep_BPK = ids_keep_BPK.to(images_BCHW.device)
    hidden_BPL = hidden_patches(ids_keep_BPK, model.num_patches)
    patches_BLD = model.patchify(images_BCHW)
    pasted: list[Tensor] = []
    for index in range(passes):
        pred_BLD = cast(Tensor, model(images_BCHW, ids_keep_BPK[:, index]).pred_BLP).float()
        pasted.append(model.unpatchify(torch.where(hidden_BPL[:, index, :, None], pred_BLD, patches_BLD)))
    pasted_PBCHW = torch.stack(pasted)
    variance_BCHW = pasted_PBCHW.var(0, unbiased=passes > 1)
    return PastedReconstruction(pasted_PBCHW.mean(0), variance_BCHW, hidden_BPL.sum(1), pasted_PBCHW)


def predict(
    scorer: str,
    model: MaskedAutoencoder,
    model_digest: str,
    uids: Sequence[str],
    images_BCHW: Tensor,
    passes: int,
    passes_used: int | None = None,
) -> Reconstruction:
    """Return the reconstruction that a scorer of this name judges.

    Args:
        scorer: `ScoreConfig.scorer`.
        model: in evaluation mode.
        model_digest: seeds the masks, with the instance.
        uids: SOP Instance UIDs, one per image.
        images_BCHW: standardised as in training.
        passes: per image; whole rounds of complementary masks.
        passes_used: after so many of them the images were stopped; all when absent.
    """
    pasted = scorer == "pasted_ms_ssim"
    draw = random_mask_ids if pasted else mask_ids
    ids_BPK = draw(model_digest, uids, model.num_patches, model.num_keep, passes)[:, :passes_used]
    return reconstruct_pasted(model, images_BCHW, ids_BPK) if pasted else reconstruct(model, images_BCHW, ids_BPK)


class RunningReconstruction:
    """Mean and variance, per pixel, of the predictions made where the patch was hidden; passes are added as they come.

    Predictions of visible patches are discarded whatever they hold, not-a-number included.
    """

    def __init__(self, model: MaskedAutoencoder, images_BCHW: Tensor, *, max_batch: int = 128) -> None:
        """Begin without a pass.

        Args:
            model: in evaluation mode.
            images_BCHW: standardised as in training.
            max_batch: passes are joined while a forward pass has no more images than this.
        """
        self._model, self._images_BCHW, self._max_batch = model, images_BCHW, max_batch
        self._mean_BLD = torch.zeros_like(model.patchify(images_BCHW), dtype=torch.float32)
        self._square_BLD = torch.zeros_like(self._mean_BLD)
        self._seen_BL1 = torch.zeros(len(images_BCHW), model.num_patches, 1, device=images_BCHW.device)

    @torch.inference_mode()
    def add(self, ids_keep_BPK: Tensor) -> None:
        """Run passes with these visible patches, on any device."""
        batch, passes, _ = ids_keep_BPK.shape
        ids_keep_BPK = ids_keep_BPK.to(self._images_BCHW.device)
        hidden_BPL = hidden_patches(ids_keep_BPK, self._model.num_patches)
        together = max(1, self._max_batch // max(batch, 1))
        for first in range(0, passes, together):
            ids_BQK = ids_keep_BPK[:, first : first + together]
            width = ids_BQK.shape[1]
            output = self._model(self._images_BCHW.repeat_interleave(width, 0), ids_BQK.flatten(0, 1))
            pred_BQLD = cast(Tensor, output.pred_BLP).float().unflatten(0, (batch, width))
            for q in range(width):  # Welford's update, only where the patch was hidden
                hidden_BL1 = hidden_BPL[:, first + q, :, None]
                self._seen_BL1 += hidden_BL1
                step_BLD = torch.where(hidden_BL1, pred_BQLD[:, q] - self._mean_BLD, 0.0)
                self._mean_BLD += step_BLD / self._seen_BL1.clamp(min=1)
                self._square_BLD += torch.where(hidden_BL1, step_BLD * (pred_BQLD[:, q] - self._mean_BLD), 0.0)

    def keep(self, index_B: Tensor) -> None:
        """Go on with some of the images."""
        for name in ("_images_BCHW", "_mean_BLD", "_square_BLD", "_seen_BL1"):
            setattr(self, name, getattr(self, name)[index_B])

    @torch.inference_mode()
    def result(self) -> Reconstruction:
        """Return what the passes so far give.

        Raises:
            UsageError: a patch was visible in every pass, so nothing was predicted for it.
        """
        count_BL = self._seen_BL1[..., 0].long()
        if not bool((count_BL > 0).all()):
            raise UsageError("a patch is visible in every pass; take the passes from `complementary_groups`")
        variance_BLD = self._square_BLD / (self._seen_BL1 - 1).clamp(min=1)
        unpatchify = self._model.unpatchify
        return Reconstruction(unpatchify(self._mean_BLD), unpatchify(variance_BLD), count_BL)


def hidden_patches(ids_keep_BPK: Tensor, num_patches: int) -> Tensor:
    """Return where each pass hides a patch: (B, P, L), bool."""
    batch, passes, _ = ids_keep_BPK.shape
    hidden_BPL = torch.ones(batch, passes, num_patches, dtype=torch.bool, device=ids_keep_BPK.device)
    return hidden_BPL.scatter_(2, ids_keep_BPK, False)


def reconstruct(
    model: MaskedAutoencoder, images_BCHW: Tensor, ids_keep_BPK: Tensor, *, max_batch: int = 128
) -> Reconstruction:
    """Return the `RunningReconstruction` of all passes.

    Args:
        model: in evaluation mode.
        images_BCHW: standardised as in training.
        ids_keep_BPK: visible patches of each pass, on any device.
        max_batch: passes are joined while a forward pass has no more images than this.

    Raises:
        UsageError: a patch is visible in every pass, so nothing was predicted for it.
    """
    if not bool(hidden_patches(ids_keep_BPK, model.num_patches).any(1).all()):
        raise UsageError("a patch is visible in every pass; take the passes from `complementary_groups`")
    running = RunningReconstruction(model, images_BCHW, max_batch=max_batch)
    running.add(ids_keep_BPK)
    return running.result()
