"""How fast the exported scorer runs: ONNX Runtime and the torch.export program beside the lake's own scorer.

    memmc export --lake LAKE --out EXPORT
    python infra/benchmarks/export_rate.py --lake LAKE --export EXPORT [--threads 1] [--rounds 5]

Run in the working directory whose `.memmc` holds the model. All three score the same scans with the same number of
threads, in turns, so that other work on the machine hits them alike; the median round counts. Masks are made
beforehand for all three. Ends with 1 where the scores of the exported files are not those of the lake's scorer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from memmc.config import load_config
from memmc.lake.tables import Lake
from memmc.model.artifact import load_model
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_pixels
from memmc.pipeline.models import open_model
from memmc.pipeline.select import calibrations
from memmc.scoring import exported
from memmc.scoring.scorer import scorer_from_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--export", type=Path, required=True, help="folder of `memmc export`")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = json.loads((args.export / exported.INFO_FILE).read_text())
    config, lake = load_config(overrides=[f"lake.uri={args.lake}"]), Lake(args.lake)
    model = open_model(config, home_directory(), info["model"])
    row = next(row for row in calibrations(lake, model) if row["calibration_id"] == info["calibration_id"])
    scorer = scorer_from_bytes(row["scorer_state"])
    judged = exported.Calibrated(scorer, tuple(row["normal_scores"]), row["threshold"], row["map_scale"])
    where = {"cohort": model.cohort, "outcome": "stored"}
    uids = sorted(lake.read("instances", ["sop_instance_uid"], filter=where)["sop_instance_uid"].to_pylist())
    uids = uids[: args.images]
    pixels, loaded = read_pixels(lake, model.cohort, uids), load_model(model.folder)
    ids = exported.ids_for(loaded, uids, info["inputs"]["ids_keep"]["shape"][1])

    runs: dict[str, exported.Run] = {"lake": lambda stored, kept: exported.lake_scores(loaded, judged, stored, kept)}
    for kind, name in exported.FILES.items():
        file = args.export / name
        if file.exists():
            runs[name] = exported.open_onnx(file, args.threads) if kind == "onnx" else exported.open_torch(file)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    scores = {name: run(pixels, ids) for name, run in runs.items()}  # warm
    for _ in range(args.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run(pixels, ids)
            seconds[name].append(time.perf_counter() - began)
    base, passed = statistics.median(seconds["lake"]), True
    print(f"{info['model']}, {len(uids)} scans of {pixels.shape[1]} px, {ids.shape[1]} passes, {args.threads} threads")
    for name, times in seconds.items():
        middle = statistics.median(times)
        parity = exported.compare(scores[name], scores["lake"], judged)
        passed &= parity.score <= exported.SCORE_TOLERANCE
        print(
            f"{name:12} {len(uids) / middle:7.1f} images/s  {base / middle:5.2f} x  "
            f"(rounds {min(times):.2f} - {max(times):.2f} s; scores differ by {parity.score:.1e})"
        )
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
