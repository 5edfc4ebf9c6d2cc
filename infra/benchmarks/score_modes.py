"""What a pass buys: AUROC and images/s over passes, complementary masks beside the paper's mode, one checkpoint.

    python infra/benchmarks/score_modes.py --lake LAKE --cohort C [--model M] [--limit N] [--modes 4,10] [--device cuda]

Every mode is calibrated on the model's held-out normals and measured on labelled images of patients it never met, in
this process, without Ray. `forward` is the rate of the masked forward passes alone; `whole` that of pixels to scores
and maps; their ratio says what feeding, features and maps cost. Differences in AUROC are paired, patients resampled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.config import ScoreConfig, load_config
from memmc.evaluation.metrics import auroc, bootstrap_values, percentile_interval
from memmc.lake.stream import read_rows
from memmc.lake.tables import Lake
from memmc.pipeline.models import open_model
from memmc.pipeline.select import normals, unmet
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import join_features, score_columns
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.scorer import make_scorer
from memmc.scoring.strata import Judge, fit_strata

DEFAULT = ScoreConfig().scorer
MODES = (
    ("complementary 4", DEFAULT, 4),
    ("complementary 8", DEFAULT, 8),
    ("complementary 16", DEFAULT, 16),
    ("complementary 4, MS-SSIM", "ms_ssim", 4),
    ("paper 10", "pasted_ms_ssim", 10),
)
BATCH = 64
FIXED = {"cohort": "c", "model": "m", "model_digest": "d", "dataset_version": 0, "preprocess_id": "p", "scorer": "s"}


def pixels_of(lake: Lake, cohort: str, keys: list[str], version: int | None = None) -> pa.Table:
    """Return the rows of these object keys with what scoring reads."""
    files = lake.files("instances", version, {"outcome": "stored", "cohort": cohort})
    columns, wanted = score_columns(), pa.array(keys)
    return pa.concat_tables(
        [part for file in files for part in read_rows(lake.storage, "instances", file, columns, None, wanted)]
    )


def forward_seconds(actor: Reconstructor, rows: pa.Table, scorer: str, passes: int) -> float:
    """Return the time of the masked forward passes alone, pixels already on the device."""
    import torch

    from memmc.scoring.masks import mask_ids, random_mask_ids

    model, side = actor.loaded.model, rows["height"][0].as_py()
    draw = random_mask_ids if scorer == "pasted_ms_ssim" else mask_ids
    seconds = 0.0
    for start in range(0, rows.num_rows, BATCH):
        uids = rows["sop_instance_uid"].slice(start, BATCH).to_pylist()
        ids = draw("d", uids, model.num_patches, model.num_keep, passes).to(actor.device)
        images = torch.zeros(len(uids), rows["channels"][0].as_py(), side, side, device=actor.device)
        with torch.inference_mode():
            _wait(actor)
            began = time.perf_counter()
            for index in range(ids.shape[1]):
                model(images, ids[:, index])
            _wait(actor)
            seconds += time.perf_counter() - began
    return seconds


def _wait(actor: Reconstructor) -> None:
    import torch

    if actor.device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    files: dict[str, bytes], held: pa.Table, test: pa.Table, scorer: str, passes: int, use_gpu: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return scores by UID and the rates of one mode."""
    settings = ScoreConfig.model_validate({"scorer": scorer, "passes": passes, "batch_size": BATCH, "num_actors": 1})
    features, keys = join_features([Reconstructor(ScoringJob(files, settings, use_gpu))(held)])
    fitted = fit_and_calibrate(make_scorer(settings), features, keys.patients, folds=20)
    strata = fit_strata(fitted.normal_scores_N, keys.strata, keys.patients, (), 0.1, 20)
    state = fitted.scorer.state_to_bytes()
    actor = Reconstructor(
        ScoringJob(files, settings, use_gpu, state, Judge.of(0.1, (), strata), fixed={**FIXED, "run": "r"})
    )
    actor(test.slice(0, BATCH))  # what is set up once
    began = time.perf_counter()
    scored = actor(test)
    whole = time.perf_counter() - began
    forward = forward_seconds(actor, test, scorer, passes)
    scores = dict(zip(scored["sop_instance_uid"].to_pylist(), scored["anomaly_score"].to_pylist(), strict=True))
    rates = {"images_per_s": test.num_rows / whole, "forward_images_per_s": test.num_rows / forward}
    return scores, {**rates, "whole_of_forward": forward / whole}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=1000, help="Test images at most.")
    parser.add_argument("--modes", default="", help="Numbers of passes to keep, as 4,10; all when absent.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    config, lake = load_config(env=os.environ, overrides=[f"lake.uri={args.lake}"]), Lake(args.lake)
    model = open_model(config, Path.cwd() / ".memmc", args.model)
    held = normals(lake, model.cohort, "calibrate", model.dataset_version)
    rows = unmet(lake, model, args.cohort)
    rows = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))[: args.limit]]
    of_uid = {row["sop_instance_uid"]: row for row in rows}
    held_pixels = pixels_of(lake, model.cohort, [row["object_key"] for row in held], model.dataset_version)
    test_pixels = pixels_of(lake, args.cohort, [row["object_key"] for row in rows])
    labels = np.array([row["label"] == "abnormal" for row in rows])
    patients = [row["patient_key"] for row in rows]
    files, results, resampled = model_files(model.folder), list[dict[str, Any]](), dict[str, Any]()
    kept = {int(text) for text in args.modes.split(",") if text} or {passes for _, _, passes in MODES}
    for name, scorer, passes in MODES:
        if passes not in kept:
            continue
        scores, rates = measure(files, held_pixels, test_pixels, scorer, passes, args.device == "cuda")
        values = np.array([scores[uid] for uid in of_uid])
        resampled[name] = bootstrap_values(labels, values, patients, auroc, config.evaluate.bootstrap, 0)
        interval = percentile_interval(resampled[name], 0.95)
        results.append(
            {"mode": name, "auroc": auroc(labels, values), "low": interval.low, "high": interval.high, **rates}
        )
    paper = results[-1]
    for result in results:
        gain = percentile_interval(resampled[result["mode"]] - resampled[paper["mode"]], 0.95)
        speed = result["images_per_s"] / paper["images_per_s"]
        result |= {
            "gain": result["auroc"] - paper["auroc"],
            "gain_low": gain.low,
            "gain_high": gain.high,
            "speed": speed,
        }
        print(
            f"{result['mode']:<26} AUROC {result['auroc']:.3f} ({result['low']:.3f} - {result['high']:.3f})  "
            f"over paper {result['gain']:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})  "
            f"{result['images_per_s']:7.1f} images/s ({speed:.2f} x paper; "
            f"{result['whole_of_forward']:.2f} of the forward passes)"
        )
    counts = {"held_out": held_pixels.num_rows, "normal": int((~labels).sum()), "abnormal": int(labels.sum())}
    print(json.dumps({"model": model.ref, **counts, "device": args.device, "modes": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
