"""How well a lake's model finds and outlines simulated lesions, whose masks are exact.

    python infra/benchmarks/phantom_lesions.py --lake LAKE [--model M] [--each 24] [--set data.image_size=64]

Run in the working directory whose `.memmc` holds the model, one trained on simulated normals (`memmc demo`). Patients
are others than the demo's. Part one: AUPRO, Dice at the calibrated level and the share flagged, per kind of lesion and
third of its area, beside the same map values around the middle of the image and around a random place. Part two: the
share of nodules flagged, and found by a region, over size and contrast, with the expected share of false alarms
beside it. Nothing is chosen on these images.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from direct_scoring import DirectScorer, open_scorer
from numpy.typing import NDArray

from memmc.dicom.pixels import fit_mask
from memmc.evaluation.localisation import PixelFigures, pixel_figures
from memmc.phantom.lesions import LESION_KINDS, Lesion
from memmc.phantom.radiograph import BITS_STORED, simulate
from memmc.scoring.calibration import clopper_pearson
from memmc.scoring.exported import Scores

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5)
CONTRASTS = (0.25, 0.5, 1.0)
FIRST_PATIENT = 900_000_000  # far from any hospital's
THIRDS = ("small", "middle", "large")


@dataclass(frozen=True)
class Group:
    """Images of one kind, scored."""

    scores: Scores
    masks: NDArray[np.bool_]


def draw(scorer: DirectScorer, lesion: Lesion | None, count: int, name: str, first: int) -> Group:
    """Simulate `count` other patients, each with its own lesion of this description, and score them."""
    pixels, masks = [], []
    for number in range(count):
        seed = FIRST_PATIENT + first + number
        chosen = None if lesion is None else Lesion(lesion.kind, seed, lesion.scale, lesion.contrast)
        radiograph = simulate(seed, 0, chosen)
        pixels.append(scorer.stored(radiograph.image_HW / float(2**BITS_STORED - 1)))
        masks.append(fit_mask(radiograph.mask_HW, scorer.config.data))
    return Group(scorer.score(np.stack(pixels), f"{name}-"), np.stack(masks))


def share(hits: NDArray[Any]) -> str:
    """Return a share with its interval."""
    low, high = clopper_pearson(int(hits.sum()), len(hits))
    return f"{hits.mean():5.1%} ({low:4.0%} -{high:4.0%})"


def found(scorer: DirectScorer, group: Group) -> NDArray[np.bool_]:
    """Return whether some region of each image touches its lesion."""
    above = group.scores.anomaly_map_BHW.astype(np.float16).astype(np.float64) > scorer.judge.level
    return (above & group.masks).any((1, 2))


def line(title: str, figures: dict[str, PixelFigures], flagged: str) -> str:
    """Return one row of the first table."""
    cells = [f"{item.aupro:6.3f} {item.dice:6.3f}" for item in figures.values()]
    return f"{title:24} {'  |  '.join(cells)}  |  {flagged}"


def by_kind(scorer: DirectScorer, each: int) -> None:
    """Print the first table."""
    print(f"{'AUPRO and Dice of':24} {'model':13}  |  {'random box':13}  |  {'centre prior':13}  |  flagged")
    for number, kind in enumerate(LESION_KINDS):
        group = draw(scorer, Lesion(kind, 0), each, kind, 10_000 * number)
        areas = group.masks.sum((1, 2))
        order = np.argsort(areas, kind="stable")
        parts = {f"{kind}, all": order[areas[order] > 0]}
        parts |= {
            f"  {name}": index for name, index in zip(THIRDS, np.array_split(parts[f"{kind}, all"], 3), strict=True)
        }
        for title, index in parts.items():
            if not len(index):
                continue
            figures = pixel_figures(
                list(group.scores.anomaly_map_BHW[index]), list(group.masks[index]), scorer.judge.level
            )
            area = areas[index].mean()
            print(line(f"{title} ({area:.0f} px)", figures, share(group.scores.is_abnormal_B[index])), flush=True)


def over_size_and_contrast(scorer: DirectScorer, each: int) -> None:
    """Print the second table."""
    print("\nnodules                   flagged                 a region touches it")
    for contrast in CONTRASTS:
        for scale in SCALES:
            first = 100_000 + 1_000 * (CONTRASTS.index(contrast) * len(SCALES) + SCALES.index(scale))
            group = draw(scorer, Lesion("nodule", 0, scale, contrast), each, "curve", first)
            width = f"{scale * 33:4.0f} mm, contrast {contrast:4.2f}"
            print(f"{width:24}  {share(group.scores.is_abnormal_B):22}  {share(found(scorer, group))}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--model")
    parser.add_argument("--each", type=int, default=24, help="images of a kind and of a point of the curve")
    parser.add_argument("--normals", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    scorer = open_scorer(args.lake, args.model, args.set)
    print(f"{scorer.ref}, {scorer.calibrated.scorer.name}, level {scorer.judge.level:.3g}")
    normal = draw(scorer, None, args.normals, "normal", 900_000)
    calm = (normal.scores.anomaly_map_BHW.max((1, 2)).astype(np.float16) > scorer.judge.level).astype(bool)
    print(f"{args.normals} normals: flagged {share(normal.scores.is_abnormal_B)}, with a region {share(calm)}\n")
    by_kind(scorer, args.each)
    over_size_and_contrast(scorer, args.each)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
