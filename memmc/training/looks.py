"""What the averaged model is like while it trains, judged without labels.

Two things are looked at on normals that are not trained on: the masked error under fixed masks, and how well planted
lesions are told from the same images without them. On any images: what memory and levels are used for.

Shape legend: V images, C channels, H height, W width, L patches, K visible patches, G masks.

Source: [choice] all of it. The planted lesions are smooth bright or dark spots and moved patches of another image,
as in CutPaste (Li et al., CVPR 2021) and its smooth relatives; they stand for no disease.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memmc.model.mae import MemMCMAE
from memmc.model.masking import ring_places
from memmc.model.memory_usage import gate_means, has_gated_levels, levels_ablated, memory_ablated, memory_usage
from memmc.training.peers import Sync

PEAK_SHARE = 0.1
"""Share of an image's patches, the worst ones, whose mean is its quick score."""

_SEED = 20_240_229
_BATCH = 32


@dataclass(frozen=True)
class Fixed:
    """Images and masks that stay the same over a run.

    Attributes:
        images_VCHW: standardised.
        ids_keep_VGK: complementary masks: over G passes each patch is visible at least once, and hidden at least once.
    """

    images_VCHW: Tensor
    ids_keep_VGK: Tensor

    @classmethod
    def of(cls, images_VCHW: Tensor, model: MemMCMAE) -> Fixed:
        """Draw the masks, the same for the same number of images."""
        generator = torch.Generator().manual_seed(_SEED)
        order_VL = torch.rand(len(images_VCHW), model.num_patches, generator=generator).argsort(1)
        places_GK = torch.from_numpy(ring_places(model.num_patches, model.num_keep))
        return cls(images_VCHW, order_VL[:, places_GK])


def with_lesions(images_VCHW: Tensor, seed: int = _SEED) -> Tensor:
    """Return copies with one lesion each: by turns a bright spot, a dark spot and a patch of the next image.

    Spots are Gaussian, 4 to 12 % of the side wide (standard deviation), 0.5 to 1.5 image standard deviations high.
    """
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = images_VCHW.shape
    draw = torch.rand(5, count, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre_y, centre_x = (0.2 + 0.6 * draw[:2]) * torch.tensor([[height], [width]])
    sigma = (0.04 + 0.08 * draw[2]) * min(height, width)
    distance = (rows - centre_y[:, None, None]) ** 2 + (columns - centre_x[:, None, None]) ** 2
    spot = torch.exp(-distance / (2 * sigma[:, None, None] ** 2))[:, None]
    heights = (0.5 + draw[3])[:, None, None, None]
    other = images_VCHW.roll(1, 0).roll((round(height * 0.13), round(width * 0.17)), (2, 3))
    kinds = torch.stack(
        [images_VCHW + heights * spot, images_VCHW - heights * spot, images_VCHW + spot * (other - images_VCHW)]
    )
    return kinds[torch.arange(count) % 3, torch.arange(count)]


@torch.no_grad()
def patch_errors(model: MemMCMAE, images_VCHW: Tensor, ids_keep_VGK: Tensor) -> Tensor:
    """Return errors_VL: the mean absolute error of each patch over the passes in which it was hidden."""
    total = torch.zeros(len(images_VCHW), model.num_patches)
    hidden = torch.zeros_like(total)
    device = next(model.parameters()).device
    for start in range(0, len(images_VCHW), _BATCH):
        images = images_VCHW[start : start + _BATCH].to(device)
        patches = model.patchify(images)
        for mask in range(ids_keep_VGK.shape[1]):
            output = model(images, ids_keep_VGK[start : start + _BATCH, mask].to(device))
            error = (output.pred_BLP.float() - patches).abs().mean(-1) * output.mask_BL
            total[start : start + _BATCH] += error.cpu()
            hidden[start : start + _BATCH] += output.mask_BL.float().cpu()
    return total / hidden


def quick_scores(errors_NL: Tensor, normal_VL: Tensor) -> Tensor:
    """Return the mean, over an image's worst patches, of its errors standardised by those of normals at the place."""
    deviation = (errors_NL - normal_VL.mean(0)) / normal_VL.std(0).clamp_min(1e-6)
    worst = max(1, round(PEAK_SHARE * errors_NL.shape[1]))
    return deviation.topk(worst, dim=1).values.mean(1)


def auroc(normal: Tensor, abnormal: Tensor) -> float:
    """Return the share of (normal, abnormal) pairs in the right order, ties counted half."""
    difference = abnormal[:, None] - normal[None, :]
    return float((difference > 0).float().mean() + 0.5 * (difference == 0).float().mean())


class HeldOut:
    """The two criteria on normals that are not trained on.

    Args:
        images_VCHW: standardised, on every rank the same.
        model: for its sizes.
        sync: the workers, who share the work.
        rank: of this worker.
        world_size: number of workers.
    """

    def __init__(self, images_VCHW: Tensor, model: MemMCMAE, sync: Sync, rank: int, world_size: int) -> None:
        self._fixed = Fixed.of(torch.cat([images_VCHW, with_lesions(images_VCHW)]), model)
        self._half, self._sync = len(images_VCHW), sync
        self._mine = torch.arange(rank, 2 * self._half, world_size)

    def __call__(self, model: MemMCMAE) -> dict[str, float]:
        """Return `val_error` (mean absolute, image standard deviations) and `probe_auroc`; every rank must call.

        The normals that standardise a score are the other half of the images, so that no image judges itself.
        """
        errors = torch.zeros(2 * self._half, model.num_patches)
        fixed = self._fixed
        errors[self._mine] = patch_errors(model, fixed.images_VCHW[self._mine], fixed.ids_keep_VGK[self._mine])
        errors = torch.tensor(self._sync.sum(errors.flatten().tolist())).view_as(errors)
        normal, lesion = errors[: self._half], errors[self._half :]
        scores = torch.zeros(2, self._half)
        for part in range(2):
            rows = torch.arange(self._half) % 2 == part
            scores[0, rows] = quick_scores(normal[rows], normal[~rows])
            scores[1, rows] = quick_scores(lesion[rows], normal[~rows])
        return {"val_error": float(normal.mean()), "probe_auroc": auroc(scores[0], scores[1])}


def health(model: MemMCMAE, fixed: Fixed) -> dict[str, float]:
    """Return what memory and levels are used for, as flat metrics: `memory/mass/layer1`, `gate/level1`, ..."""
    device = next(model.parameters()).device
    images, ids = fixed.images_VCHW.to(device), fixed.ids_keep_VGK[:, 0].to(device)
    found: dict[str, float] = {}
    for number, layer in enumerate(memory_usage(model, images, ids), start=1):
        found[f"memory/mass/layer{number}"] = layer.mass
        found[f"memory/slots_used/layer{number}"] = layer.slots_used / max(layer.num_slots, 1)
        found[f"memory/entropy/layer{number}"] = layer.entropy
    for number, mean in enumerate(gate_means(model, images, ids), start=1):
        found[f"gate/level{number}"] = mean
    return found


def ablations(model: MemMCMAE, fixed: Fixed) -> dict[str, float]:
    """Return the masked error of the model, of it without memory, and of it hearing its last level alone.

    A model without the part has no such figure.
    """

    def error() -> float:
        value = float(patch_errors(model, fixed.images_VCHW, fixed.ids_keep_VGK).mean())
        return value if math.isfinite(value) else math.nan

    found = {"ablation/error": error()}
    if model.config.memory_slots:
        with memory_ablated(model):
            found["ablation/error_without_memory"] = error()
    if has_gated_levels(model):
        with levels_ablated(model):
            found["ablation/error_last_level_only"] = error()
    return found
