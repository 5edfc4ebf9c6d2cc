"""A report's data with every section filled, of simulated scans."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from PIL import Image

from memmc.evaluation.controls import evaluate_controls
from memmc.evaluation.metrics import Interval, evaluate_scores
from memmc.evaluation.operating import RatePoint
from memmc.evaluation.report_data import (
    Ablation,
    CalibrationFacts,
    Case,
    GroupResult,
    IngestCount,
    Localisation,
    MemoryHealth,
    MemoryLayer,
    Provenance,
    ReportData,
    ShutOff,
    TrainingCurve,
    select_cases,
)

NUM_NORMAL, NUM_ABNORMAL, THRESHOLD = 200, 100, 21.6


def phantom_scan(rng: np.random.Generator, lesion: bool, side: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a chest-like image, an anomaly map and a lesion mask."""
    y, x = np.mgrid[0:side, 0:side] / side
    lungs = sum(np.exp(-((((x - cx) / 0.15) ** 2 + ((y - 0.5) / 0.28) ** 2) ** 2)) for cx in (0.3, 0.7))
    image = 0.7 - 0.5 * lungs + 0.04 * np.sin(y * 60) * lungs + 0.02 * rng.normal(size=(side, side))
    cy, cx, radius = rng.uniform(0.4, 0.65), rng.choice([0.3, 0.7]), rng.uniform(0.06, 0.11)
    blob = np.exp(-(((x - cx) ** 2 + (y - cy) ** 2) / radius**2))
    coarse = rng.random((8, 8)) * (0.4 if lesion else 0.3)
    anomaly_map = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
    if lesion:
        image, anomaly_map = image + 0.35 * blob, anomaly_map + 1.1 * blob
    return np.clip(image, 0, 1), anomaly_map, (blob > 0.4) & lesion


def make_case(rng: np.random.Generator, label: str, score: float) -> Case:
    image, anomaly_map, mask = phantom_scan(rng, label == "abnormal")
    return Case(
        case_id=rng.bytes(32).hex(),
        image=image,
        anomaly_map=anomaly_map.astype(np.float16),
        anomaly_score=score,
        p_value=float(np.clip(np.exp(-(score - 8) / 4), 0.0024, 1)),
        is_abnormal=score > THRESHOLD,
        label=label,
        mask=mask if label == "abnormal" else None,
        score_spread=0.31,
    )


def demo_report(seed: int = 0) -> ReportData:
    """Return a full report of invented scans."""
    rng = np.random.default_rng(seed)
    labels = np.arange(NUM_NORMAL + NUM_ABNORMAL) >= NUM_NORMAL
    scores = rng.gamma(18, 0.8, labels.size) + labels * rng.gamma(3, 2.4, labels.size)
    flagged, patients = scores > THRESHOLD, np.arange(labels.size) // 2
    settings = {"resamplings": 300, "confidence": 0.95, "seed": 0}
    controls = {
        "pca_8x8": rng.normal(size=labels.size) + 0.7 * labels,
        "knn_8x8": rng.normal(size=labels.size) + 0.95 * labels,
        "mean_intensity": rng.normal(size=labels.size) - 0.3 * labels,
        "sharpness": rng.normal(size=labels.size) - 0.55 * labels,
    }
    names = ["abnormal" if label else "normal" for label in labels]
    chosen = select_cases(names, scores, flagged, 6)

    def cases(rows: tuple[int, ...]) -> tuple[Case, ...]:
        return tuple(make_case(rng, names[row], float(scores[row])) for row in rows)

    steps = np.arange(0, 6000, 10)
    return ReportData(
        cohort="chest-adults",
        created_at=datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
        provenance=Provenance(
            model="memmc-chest-adults/7",
            model_digest="4f0c2a9be17d55a3",
            dataset_version=12,
            preprocess_id="9d1b6a0e3c44f821",
            config_id="77aa01c39be0d2f4",
            seeds={"train": 0, "bootstrap": 0},
            durations_s={"ingest": 41.2, "train": 1803.0, "score": 75.6},
            versions={"memmc": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
            config_text='[data]\nimage_size = 64\nbits = 8\n\n[train]\npreset = "tiny"\nmax_minutes = 30.0\nseed = 0\n',
        ),
        calibration=CalibrationFacts("cal-20260301-0930", "residual_statistics", 0.05, THRESHOLD, 412, 0.82),
        scores=scores,
        num_flagged=int(flagged.sum()),
        num_patients=150,
        evaluation=evaluate_scores(labels, scores, flagged, patients, **settings),
        controls=evaluate_controls(controls, labels, scores, patients, **settings),
        localisation=Localisation(100, 0.872, 0.641, num_left_out=7),
        rates=(RatePoint(0.05, 0.05, Interval(0.02, 0.09), NUM_NORMAL, Interval(0.015, 0.1)),),
        groups=(
            GroupResult("lesion", "consolidation", 200, 44, 0.871, Interval(0.81, 0.92), 0.61, 0.05),
            GroupResult("lesion", "nodule", 200, 31, 0.702, Interval(0.60, 0.79), 0.29, 0.05),
            GroupResult("manufacturer", "Example Medical", 120, 70, 0.84, Interval(0.77, 0.9), 0.52, 0.042),
            GroupResult("manufacturer", "Other Imaging", 80, 0, None, None, None, 0.063),
        ),
        most_abnormal=cases(chosen.most_abnormal),
        calmest_normals=cases(chosen.calmest_normals),
        typical_normals=cases(chosen.typical_normals),
        missed_abnormals=cases(chosen.missed_abnormals),
        flagged_normals=cases(chosen.flagged_normals),
        ingest=(
            IngestCount("stored", None, 3120),
            IngestCount("duplicate", None, 57),
            IngestCount("excluded", "modality_not_selected", 210),
            IngestCount("excluded", "lateral_view", 341),
            IngestCount("quarantined", "decode_failed", 12),
            IngestCount("quarantined", "burned_in_annotation", 29),
        ),
        memory=MemoryHealth(
            tuple(MemoryLayer(n, 0.08 + 0.03 * n, 16 - n, 16, 0.93 - 0.05 * n, 0.485) for n in range(1, 7)),
            Ablation(48, 48, 0.829, ShutOff(0.801, 0.028, Interval(0.004, 0.051))),
            gates=(0.41, 0.52, 0.63), error=0.211, error_without_memory=0.213, error_last_level_only=0.307,
        ),
        training=TrainingCurve(
            steps, 0.9 * np.exp(-steps / 900) + 0.18 + 0.02 * rng.normal(size=steps.size), steps[99::100],
            0.9 * np.exp(-steps[99::100] / 900) + 0.2,
        ),
    )  # fmt: skip
