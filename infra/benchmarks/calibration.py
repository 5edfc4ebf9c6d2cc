"""Does the promised false-positive rate hold, and on each scanner?

    python infra/benchmarks/calibration.py --lake LAKE --cohort C [--model M] [--resamplings 200] [--gain 0.5]

Held-out normals of a real model are scored twice, as they are (scanner A) and with a planted shift of grey values
(scanner B: gain and offset, as another window or detector would give). Each resampling deals the patients to A and B
and to calibration and test, fits the scorer and the thresholds on the one part and counts flagged normals in the other.
`inside` is the share of resamplings whose observed rate lies in its 95 % interval (`observed_rate_interval`): at least
0.95 is promised where the threshold fits the images; `without shift` is that case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.config import ScoreConfig, load_config
from memmc.lake.stream import read_rows
from memmc.lake.tables import Lake
from memmc.pipeline.models import open_model
from memmc.pipeline.select import normals
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import join_features, score_columns
from memmc.scoring.calibration import observed_rate_interval
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.scorer import Features, make_scorer
from memmc.scoring.strata import Judge, fit_strata

RATES = (0.01, 0.05, 0.10)
SPLITS = ("calibrate", "test")
FOLDS = 5


def held_out(lake: Lake, cohort: str, version: int) -> pa.Table:
    """Return the pixels of normals that the model was not trained on."""
    keys = pa.array([row["object_key"] for split in SPLITS for row in normals(lake, cohort, split, version)])
    files = lake.files("instances", version, {"outcome": "stored", "cohort": cohort, "split": SPLITS})
    return pa.concat_tables(
        [part for file in files for part in read_rows(lake.storage, "instances", file, score_columns(), None, keys)]
    )


def shifted(rows: pa.Table, gain: float, offset: float) -> pa.Table:
    """Return the rows with their grey values, as shares of the range, changed to gain x + offset."""
    bits = rows["bits"][0].as_py()
    kind, white = ("u1", 255) if bits == 8 else ("<u2", 65535)
    pixels: list[bytes] = []
    for item in rows["pixels"].to_pylist():
        values = np.frombuffer(item, kind).astype(np.float64) / white
        pixels.append((np.clip(gain * values + offset, 0, 1) * white).round().astype(kind).tobytes())
    return rows.set_column(rows.column_names.index("pixels"), "pixels", pa.array(pixels, pa.binary()))


def choose(a: Features, b: Features, is_b_N: np.ndarray, index: np.ndarray) -> Features:
    """Return the features of chosen images, each as its scanner gives it."""
    mine = is_b_N[index]
    return Features(
        np.where(mine[:, None], b.vectors_NF[index], a.vectors_NF[index]),
        np.where(mine[:, None, None, None], b.maps_NMHW[index], a.maps_NMHW[index]),
        np.where(mine, b.spread_N[index], a.spread_N[index]),
        a.size,
    )


def resample(
    a: Features, b: Features, patients: list[str], score: ScoreConfig, share: float, seed: int
) -> dict[str, Any]:
    """Return the observed rates, and their intervals, of one deal."""
    rng, keys = np.random.default_rng(seed), np.array(patients)
    order = rng.permutation(sorted(set(patients)))
    calibrate_N = np.isin(keys, order[: len(order) // 2])
    is_b_N = np.isin(keys, rng.permutation(order)[: round(share * len(order))])
    names = np.where(is_b_N, "scanner=B", "scanner=A")
    inside, outside = np.flatnonzero(calibrate_N), np.flatnonzero(~calibrate_N)
    mine = [patients[i] for i in inside]
    fitted = fit_and_calibrate(make_scorer(score), choose(a, b, is_b_N, inside), mine, FOLDS, seed)
    scores = fitted.scorer.score_features(choose(a, b, is_b_N, outside)).anomaly_score_B
    found: dict[str, Any] = {}
    for rate in RATES:
        needed = int(np.ceil(1 / rate - 1 - 1e-9))
        if min((names[inside] == name).sum() for name in ("scanner=A", "scanner=B")) < needed:
            continue
        strata = fit_strata(fitted.normal_scores_N, names[inside].tolist(), mine, (), rate, needed)
        for how, kept in (("pooled", strata[:1]), ("per stratum", strata)):
            flagged = Judge.of(rate, ["scanner"], kept).judge(scores, names[outside].tolist()).is_abnormal_B
            for name in ("scanner=A", "scanner=B"):
                there = names[outside] == name
                judge = next((item for item in kept if item.stratum == name), kept[0])
                low, high = observed_rate_interval(judge.num_normals, rate, int(there.sum()))
                observed = float(flagged[there].mean())
                found[f"{rate} {how} {name[-1]}"] = (observed, low <= observed <= high)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lake", required=True)
    parser.add_argument("--cohort")
    parser.add_argument("--model")
    parser.add_argument("--scorer", default=ScoreConfig().scorer)
    parser.add_argument("--resamplings", type=int, default=200)
    parser.add_argument("--gain", type=float, default=0.5)
    parser.add_argument("--offset", type=float, default=0.0)
    parser.add_argument("--share", type=float, default=0.3, help="Of the patients, on scanner B.")
    args = parser.parse_args()
    config, lake = load_config(env=os.environ, overrides=[f"lake.uri={args.lake}"]), Lake(args.lake)
    model = open_model(config, Path.cwd() / ".memmc", args.model)
    rows = held_out(lake, args.cohort or model.cohort, model.dataset_version)
    score = ScoreConfig.model_validate({"scorer": args.scorer, "num_actors": 1, "batch_size": 64})
    actor = Reconstructor(ScoringJob(model_files(model.folder), score))
    a, keys = join_features([actor(rows)])
    b, _ = join_features([actor(shifted(rows, args.gain, args.offset))])
    result: dict[str, Any] = {"model": model.ref, "normals": rows.num_rows, "resamplings": args.resamplings}
    for title, other in (("without shift", a), ("with shift", b)):
        deals = [resample(a, other, keys.patients, score, args.share, seed) for seed in range(args.resamplings)]
        cases = sorted({case for deal in deals for case in deal})
        print(f"{title}: gain {args.gain}, offset {args.offset}" if other is b else title)
        for case in cases:
            rates, good = zip(*(deal[case] for deal in deals if case in deal), strict=True)
            figures = {"observed": float(np.mean(rates)), "inside": float(np.mean(good)), "deals": len(good)}
            result[f"{title} {case}"] = figures
            print(f"  {case:<22} observed {figures['observed']:6.1%}  inside its interval {figures['inside']:.1%}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
