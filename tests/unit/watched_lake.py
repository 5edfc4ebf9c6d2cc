"""A lake with drawn films, a small random model in a folder, its calibration and its scores; no Ray, no registry."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.ndimage import gaussian_filter

from memmc.config import Config, ModelConfig, load_config
from memmc.lake.schemas import CALIBRATIONS, INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.model.artifact import export_model
from memmc.model.mae import MemMCMAE
from memmc.pipeline.models import OpenModel, fit_of, open_model
from memmc.pipeline.rescore import Rescorer, scoring_job
from memmc.pipeline.select import newest_calibration
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import join_features, score_columns
from memmc.scoring.calibration import threshold_at
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.regions import region_judge
from memmc.scoring.scorer import make_scorer
from memmc.scoring.strata import fit_strata

SIDE = 32
START = datetime(2026, 1, 5, tzinfo=UTC)
STRATA = ("manufacturer",)
SETTINGS = ["score.scorer=residual_peak", "calibrate.false_positive_rate=0.1", "monitor.resamplings=2999"]
SETTINGS += ["monitor.canary_scans=8", "monitor.canary_sizes=0.2"]


def films(rng: np.random.Generator, count: int, **change: float) -> np.ndarray:
    """Return (count, SIDE, SIDE) in [0, 1]: two dark lungs, noise; `gain`, `offset`, `blur` change all alike."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    found = []
    for _ in range(count):
        level = 0.65 + 0.03 * rng.normal()
        lungs = sum(np.exp(-(((columns - x) / 0.13) ** 2) - ((rows - 0.45) / 0.25) ** 2) for x in (0.3, 0.7))
        image = level - 0.4 * lungs + gaussian_filter(rng.normal(0, 0.12, (SIDE, SIDE)), 0.8)
        image = gaussian_filter(image, change.get("blur", 0.0))
        found.append(np.clip(change.get("gain", 1.0) * image + change.get("offset", 0.0), 0, 1))
    return np.stack(found)


def batch(
    seed: int,
    count: int,
    moment: datetime,
    *,
    cohort: str = "cxr",
    label: str = "normal",
    makers: tuple[str, ...] = ("A", "B"),
    split: str | None = None,
    quarantined: int = 0,
    **change: float,
) -> pa.Table:
    """Return rows of `instances`, one a patient."""
    rng = np.random.default_rng(seed)
    images = films(rng, count, **change)
    rows: list[dict[str, Any]] = []
    for number in range(count + quarantined):
        key = hashlib.sha256(f"{cohort}/{seed}/{number}".encode()).hexdigest()
        row: dict[str, Any] = {"cohort": cohort, "object_key": key, "source_ref": "sealed", "content_key": key}
        row |= {"size_bytes": 1, "label": label, "ingest_run": f"run-{seed}", "ingested_at": moment}
        row |= {"sop_instance_uid": f"2.25.{int(key[:24], 16)}", "patient_key": key, "study_uid": f"2.25.{number}"}
        if number >= count:
            rows.append({**row, "outcome": "quarantined", "split": "none", "reason": "PARSE_TRUNCATED"})
            continue
        row |= {"outcome": "stored", "split": split or ("train", "calibrate", "calibrate", "test", "test")[number % 5]}
        row |= {"pixels": (images[number] * 255).round().astype(np.uint8).tobytes(), "preprocess_id": "p"}
        row |= {"height": SIDE, "width": SIDE, "channels": 1, "bits": 8, "rows": 2000, "columns": 2000}
        row |= {"modality": "DX", "manufacturer": str(rng.choice(makers)), "view_position": "PA", "lossy": False}
        row |= {"patient_sex": str(rng.choice(["F", "M"])), "patient_age_years": int(rng.integers(20, 90))}
        row |= {"photometric_interpretation": "MONOCHROME2", "bits_stored": 12, "pixel_spacing_mm": 0.2}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMAS[INSTANCES])


def make(root: Path, count: int = 150) -> tuple[Config, str]:
    """Make a lake with a cohort `cxr` and a calibrated model of it; return configuration and model folder."""
    config = load_config(overrides=[f"lake.uri={root / 'lake'}", *SETTINGS])
    lake = Lake(config.lake.uri)
    version = lake.append(INSTANCES, batch(1, count, START))
    folder = random_model(root / "model", version)
    opened = open_model(config, root / ".memmc", folder)
    calibrate(config, lake, opened)
    score(config, opened)
    return config, folder


def random_model(folder: Path, version: int, preprocess_id: str = "p") -> str:
    """Write a small model of random weights, as if of that version of the cohort `cxr`; return its folder."""
    torch.manual_seed(0)
    sizes = {"encoder_dim": 16, "encoder_depth": 2, "encoder_heads": 2, "memory_slots": 4}
    sizes |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "patch_size": 8}
    info = {"preprocess_id": preprocess_id, "cohort": "cxr", "dataset_version": version, "steps": 1}
    info |= {"train_seconds": 1.0, "config_id": "x", "image_size": SIDE, "channels": 1, "seed": 0}
    info |= {"pixel_mean": 0.5, "pixel_std": 0.2}
    export_model(str(folder), MemMCMAE(ModelConfig(**sizes), SIDE, 1), info)
    return str(folder)


def calibrate(config: Config, lake: Lake, model: OpenModel, region_rate: float | None = None) -> None:
    """Calibrate on the cohort's calibration share, as the pipeline does, in this process."""
    where = {"cohort": "cxr", "outcome": "stored", "split": "calibrate"}
    rows = lake.read(INSTANCES, score_columns(STRATA), model.dataset_version, where)
    job = ScoringJob(model_files(model.folder), config.score.model_copy(update={"batch_size": 32}), strata=STRATA)
    features, keys = join_features([Reconstructor(job)(rows)])
    fitted = fit_and_calibrate(make_scorer(config.score), features, keys.patients, folds=20)
    rate = config.calibrate.false_positive_rate
    strata = fit_strata(fitted.normal_scores_N, keys.strata, keys.patients, [rate], rate, 1000)
    row = {"calibration_id": "c", "model": model.ref, "model_digest": model.digest, "cohort": "cxr"}
    row |= {"dataset_version": model.dataset_version, "preprocess_id": model.preprocess_id}
    row |= {"scorer": config.score.scorer}
    row |= {"false_positive_rate": rate, "threshold": threshold_at(fitted.normal_scores_N, rate)}
    row |= {"num_normals": len(keys.instances), "normal_scores": list(strata[0].normal_scores), "map_scale": 1.0}
    row |= {"scorer_state": fitted.scorer.state_to_bytes(), "created_at": START, "passes": config.score.passes}
    row |= {"strata_columns": list(STRATA), "strata": [item.as_row() for item in strata]}
    if region_rate is not None:
        row |= {"map_level": threshold_at(fitted.normal_peaks_N, region_rate)}
        row |= {"normal_peaks": sorted(fitted.normal_peaks_N.tolist())}
    lake.append(CALIBRATIONS, pa.Table.from_pylist([row], schema=SCHEMAS[CALIBRATIONS]))


def score(config: Config, model: OpenModel, moment: datetime = START) -> None:
    """Score what has no score yet."""
    lake = Lake(config.lake.uri)
    calibration = newest_calibration(lake, model)
    done = (
        set(lake.read(SCORES, ["sop_instance_uid"])["sop_instance_uid"].to_pylist()) if lake.exists(SCORES) else set()
    )
    stored = lake.read(INSTANCES, ["sop_instance_uid"], None, {"cohort": "cxr", "outcome": "stored"})
    missing = [uid for uid in stored["sop_instance_uid"].to_pylist() if uid not in done]
    fixed = {"cohort": "cxr", "model": model.ref, "model_digest": model.digest, "calibration_id": "c"}
    fixed |= {"dataset_version": lake.version(INSTANCES), "preprocess_id": model.preprocess_id}
    fixed |= {"scorer": config.score.scorer}
    fixed |= {"run": "r", "scored_at": moment}
    here = config.model_copy(update={"score": config.score.model_copy(update={"batch_size": 32})})
    job = scoring_job(here, model, calibration, use_gpu=False, fixed=fixed)
    actor = Reconstructor(replace(job, regions=region_judge(calibration, fit_of(config, model))))
    lake.append(SCORES, actor(Rescorer(config, model, calibration).read(lake, "cxr", missing)))


def later(days: float) -> datetime:
    """Return a moment after the lake's first batch."""
    return START + timedelta(days=days)
