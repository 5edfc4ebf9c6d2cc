"""What ending an image's passes early saves and costs: passes, rate, changed verdicts, AUROC.

    python infra/benchmarks/early_stop.py --lake LAKE --cohort C [--model M] [--bounds 0.02,0.05] [--device cpu|cuda]

For 4, 8 and 16 passes and each bound the rule is calibrated on the model's held-out normals (5 % false positives) and
measured on labelled images of patients it never met, in this process, without Ray: against the same images with all
passes, the share of normal and of abnormal images whose verdict changes, the paired difference in AUROC (patients
resampled), the mean number of passes and the rate. A bound that the held-out normals cannot carry is said so.
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
import pyarrow.compute as pc
from score_modes import BATCH, FIXED, pixels_of

from memmc.config import ScoreConfig, load_config
from memmc.errors import GateRefused
from memmc.evaluation.metrics import auroc, bootstrap_values, percentile_interval
from memmc.lake.tables import Lake
from memmc.pipeline.models import open_model
from memmc.pipeline.select import normals, unmet
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import join_features
from memmc.scoring.calibration import threshold_at
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.early_stop import StopRule, fit_early_stop
from memmc.scoring.scorer import make_scorer
from memmc.scoring.strata import POOLED, Judge, fit_strata

RATE = 0.05
PASSES = (4, 8, 16)


def timed(job: ScoringJob, rows: pa.Table) -> tuple[pa.Table, float]:
    """Return the score rows and the seconds they took, the first batch apart."""
    actor = Reconstructor(job)
    actor(rows.slice(0, BATCH))
    began = time.perf_counter()
    return actor(rows), time.perf_counter() - began


def jobs_of(files: dict[str, bytes], held: pa.Table, passes: int, bounds: list[float], gpu: bool) -> dict[str, Any]:
    """Return the job without a rule, and one per bound, or why there is none."""
    settings = ScoreConfig(passes=passes, batch_size=BATCH, num_actors=1)
    features = Reconstructor(ScoringJob(files, settings, gpu, each_stage=True))(held)
    fits, keys = {}, None
    for number in sorted(features["passes"].unique().to_pylist()):
        part, keys = join_features([features.filter(pc.equal(features["passes"], number))])
        fits[number] = fit_and_calibrate(make_scorer(settings), part, keys.patients, folds=20)
    assert keys is not None
    final = fits.pop(max(fits))
    limits = {POOLED: threshold_at(final.normal_scores_N, RATE)}

    def job(fitted: Any, rule: StopRule | None) -> ScoringJob:
        strata = fit_strata(fitted.normal_scores_N, keys.strata, keys.patients, (), RATE, 20)
        state, fixed = final.scorer.state_to_bytes(), {**FIXED, "run": "r"}
        return ScoringJob(files, settings, gpu, state, Judge.of(RATE, (), strata), fixed=fixed, stop=rule)

    found: dict[str, Any] = {"all": job(final, None)}
    for bound in bounds:
        try:
            rule, fitted = fit_early_stop(fits, final, keys.strata, limits, bound)
            found[f"{bound:g}"] = job(fitted, rule)
        except GateRefused as refusal:
            found[f"{bound:g}"] = str(refusal)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--cohort", required=True)
    parser.add_argument("--model")
    parser.add_argument("--bounds", default="0.02,0.05")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    config, lake = load_config(env=os.environ, overrides=[f"lake.uri={args.lake}"]), Lake(args.lake)
    model = open_model(config, Path.cwd() / ".memmc", args.model)
    held = normals(lake, model.cohort, "calibrate", model.dataset_version)
    rows = unmet(lake, model, args.cohort)
    of_uid = {row["sop_instance_uid"]: row for row in rows}
    held_pixels = pixels_of(lake, model.cohort, [row["object_key"] for row in held], model.dataset_version)
    test_pixels = pixels_of(lake, args.cohort, [row["object_key"] for row in rows])
    order = test_pixels["sop_instance_uid"].to_pylist()
    labels = np.array([of_uid[uid]["label"] == "abnormal" for uid in order])
    patients = [of_uid[uid]["patient_key"] for uid in order]
    print(f"{model.ref}: {len(held)} held-out normals, {(~labels).sum()} normal and {labels.sum()} abnormal images")
    results: list[dict[str, Any]] = []
    for passes in PASSES:
        jobs = jobs_of(
            model_files(model.folder),
            held_pixels,
            passes,
            [float(b) for b in args.bounds.split(",")],
            args.device == "cuda",
        )
        whole, whole_s = timed(jobs.pop("all"), test_pixels)
        flagged, values = np.array(whole["is_abnormal"]), np.array(whole["anomaly_score"])
        print(f"{passes:3} passes: AUROC {auroc(labels, values):.3f}, {len(order) / whole_s:.1f} images/s")
        before = bootstrap_values(labels, values, patients, auroc, config.evaluate.bootstrap, 0)
        for bound, job in jobs.items():
            if isinstance(job, str):
                print(f"    bound {bound}: refused, {job}")
                continue
            scored, seconds = timed(job, test_pixels)
            scores, changed = np.array(scored["anomaly_score"]), np.array(scored["is_abnormal"]) != flagged
            after = bootstrap_values(labels, scores, patients, auroc, config.evaluate.bootstrap, 0)
            gain, used = percentile_interval(after - before, 0.95), np.array(scored["passes_used"])
            result = {
                "passes": passes,
                "bound": float(bound),
                "mean_passes_normal": used[~labels].mean(),
                "mean_passes_abnormal": used[labels].mean(),
                "changed_normal": changed[~labels].mean(),
                "changed_abnormal": changed[labels].mean(),
                "auroc": auroc(labels, scores),
                "gain_low": gain.low,
                "gain_high": gain.high,
                "speed": whole_s / seconds,
            }
            results.append(result)
            print(
                f"    bound {bound}: {result['mean_passes_normal']:.2f} passes a normal, "
                f"{result['mean_passes_abnormal']:.2f} an abnormal; verdict changed of {result['changed_normal']:.1%} "
                f"normals, {result['changed_abnormal']:.1%} abnormals; AUROC {result['auroc']:.3f} ({gain.low:+.3f} to "
                f"{gain.high:+.3f}); {result['speed']:.2f} x the rate",
                flush=True,
            )
    print(json.dumps({"model": model.ref, "held_out": len(held), "device": args.device, "rules": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
