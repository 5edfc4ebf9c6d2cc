"""How often the highest region of a map finds a lesion that readers boxed, beside boxes placed without looking.

    python infra/benchmarks/box_hits.py --lake LAKE [--model M] [--data ../shared/data/cxr-hires] [--set ...]

Run in the working directory whose `.memmc` holds the model, one trained on normal adult chest radiographs. The folder
holds `boxes.csv` (file, label, x0, y0, x1, y1 as shares of width and height) and the images; without it the benchmark
says so and ends with 0. Images without a box count as free of lesions in the free-response figures. Nothing
is chosen on these images: level and regions are those of the calibration.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from direct_scoring import open_scorer
from PIL import Image

from memmc.dicom.geometry import Box, Geometry
from memmc.evaluation.boxes import BoxImage, box_figures


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
    images = []
    for file, (height, width), anomaly_map in zip(files, sizes, scores.anomaly_map_BHW, strict=True):
        side = anomaly_map.shape[0]
        geometry = Geometry(height, width, side, scorer.config.data.fit)
        truth = [
            geometry.to_stored(Box(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height))
            for x0, y0, x1, y1 in drawn.get(f"{file.parent.name}/{file.name}", [])
        ]
        found = scorer.judge.of_map(anomaly_map, height, width)
        images.append(
            BoxImage(
                np.array([list(vars(box).values()) for box in truth], float).reshape(-1, 4),
                np.array([[item[f"{n}_px"] for n in ("x", "y", "width", "height")] for item in found], float).reshape(
                    -1, 4
                ),
                np.array([item["peak"] for item in found], float),
                side,
            )
        )
    figures = box_figures(images)
    boxed = sum(len(image.truth_T4) > 0 for image in images)
    silent = sum(len(image.truth_T4) > 0 and not len(image.found_R4) for image in images)
    print(f"{scorer.ref}, {scorer.calibrated.scorer.name}: {len(images)} images, {figures.num_boxes} boxes on {boxed}")
    print(f"highest region finds a box   {figures.hit_rate:.1%} of boxed images ({silent} of them show no region)")
    print(f"random box of its size       {figures.hit_rate_random_box:.1%}")
    print(f"the same in the middle       {figures.hit_rate_centre_prior:.1%}")
    for rate, value in figures.froc.items():
        print(f"boxes found at {rate:>4} false regions an image  {value:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
