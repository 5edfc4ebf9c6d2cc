"""How often the highest region of a map finds a lesion that readers boxed, beside boxes placed without looking.

    python infra/benchmarks/box_hits.py --lake LAKE [--model M] [--data ../shared/data/cxr-hires] [--set ...]

Run in the working directory whose `.memmc` holds the model, one trained on normal adult chest radiographs. The folder
holds `boxes.csv` (file, label, x0, y0, x1, y1 as shares of width and height) and the images; without it the benchmark
says so and ends with 0. Images without a box count as free of lesions in the free-response figures. Nothing
is chosen on these images: level and regions are those of the calibration. Since few normals reach that level, an image
may show no region; so the place around each map's peak, down to half its height, is judged as well.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from direct_scoring import open_scorer
from PIL import Image

from memmc.dicom.geometry import Box, Geometry
from memmc.evaluation.boxes import BoxImage, box_figures
from memmc.scoring.maps import regions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cxr-hires"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    if not (args.data / "boxes.csv").exists():
        print("skipped: the folder of boxed radiographs is not here (--data)")
        return 0
    scorer = open_scorer(args.lake, args.model, args.set)
    drawn: dict[str, list[list[float]]] = defaultdict(list)
    with (args.data / "boxes.csv").open(newline="") as handle:
        for row in csv.DictReader(handle):
            drawn[row["file"]].append([float(row[name]) for name in ("x0", "y0", "x1", "y1")])
    files = sorted([*args.data.glob("normal/*.jpg"), *args.data.glob("abnormal/*.jpg")])
    pixels, sizes = [], []
    for file in files:
        with Image.open(file) as image:
            grey_HW = np.asarray(image.convert("L"), dtype=np.float64) / 255
        pixels.append(scorer.stored(grey_HW))
        sizes.append(grey_HW.shape)
    scores = scorer.score(np.stack(pixels), "box-")
    images: dict[str, list[BoxImage]] = {"highest region": [], "place around the peak": []}
    for file, (height, width), anomaly_map in zip(files, sizes, scores.anomaly_map_BHW, strict=True):
        side = anomaly_map.shape[0]
        geometry = Geometry(height, width, side, scorer.config.data.fit)
        truth = [
            geometry.to_stored(Box(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height))
            for x0, y0, x1, y1 in drawn.get(f"{file.parent.name}/{file.name}", [])
        ]
        peak = regions(anomaly_map, 0.5 * float(anomaly_map.max()), max_regions=1)
        for kind, found in (
            ("highest region", scorer.judge.of_map(anomaly_map, height, width)),
            ("place around the peak", [vars(region) for region in peak]),
        ):
            images[kind].append(boxed_image([list(vars(box).values()) for box in truth], found, side))
    for kind, judged in images.items():
        print(f"{scorer.ref}, {scorer.calibrated.scorer.name}: {kind}")
        report(kind, judged)
    return 0


def boxed_image(truth: list[list[float]], found: list[dict[str, Any]], side: int) -> BoxImage:
    """Return boxes and regions, the regions with the keys of `RegionJudge.of_map`, as arrays."""
    boxes = [[item[f"{name}_px"] for name in ("x", "y", "width", "height")] for item in found]
    return BoxImage(
        np.array(truth, float).reshape(-1, 4),
        np.array(boxes, float).reshape(-1, 4),
        np.array([item["peak"] for item in found], float),
        side,
    )


def report(kind: str, images: list[BoxImage]) -> None:
    figures = box_figures(images)
    boxed = sum(len(image.truth_T4) > 0 for image in images)
    silent = sum(len(image.truth_T4) > 0 and not len(image.found_R4) for image in images)
    print(f"  {len(images)} images, {figures.num_boxes} boxes on {boxed}, {silent} of those without a region")
    print(f"  {kind} finds a box: {figures.hit_rate:.1%} of boxed images")
    print(f"  random box of its size: {figures.hit_rate_random_box:.1%}")
    print(f"  the same in the middle: {figures.hit_rate_centre_prior:.1%}")
    for rate, value in figures.froc.items():
        print(f"  boxes found at {rate:>4} false regions an image: {value:.1%}")


if __name__ == "__main__":
    raise SystemExit(main())
