"""How rarely does drift alarm where nothing has changed, and how soon where something has?

    python infra/benchmarks/drift_power.py [--quiet 52] [--repeats 6] [--window 40] [--train-seconds 60]

Simulated radiographs of three makers, 64 px, some with a lesion; a small model trained on others of them. Quiet weekly
windows are new patients. Changed ones are two windows in a row with one thing changed: `within 1` and `within 2` are
the shares of repeats in which the first, or one of both, has drifted. Prints a table; ends with 1 where more than one
quiet window in 26 has alarmed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.ndimage import gaussian_filter

from memmc.config import ModelConfig, MonitorConfig, ScoreConfig
from memmc.model.artifact import export_model, load_model
from memmc.model.mae import MemMCMAE
from memmc.monitoring.drift import Conformal, Sample, compare
from memmc.monitoring.pixels import pixel_statistics
from memmc.phantom.lesions import LESION_KINDS, Lesion
from memmc.phantom.radiograph import simulate
from memmc.pipeline.rescore import grey_images
from memmc.scoring.actor import Reconstructor, ScoringJob, model_files
from memmc.scoring.bulk import join_features
from memmc.scoring.calibration import p_values, threshold_at
from memmc.scoring.cross_fit import fit_and_calibrate
from memmc.scoring.embedding import embeddings
from memmc.scoring.scorer import make_scorer

Patient = tuple[np.ndarray, np.ndarray, float]  # normal, abnormal, the draw that decides which

SIDE, RATE = 64, 0.05
MAKERS = {"A": 0.4, "B": 0.35, "C": 0.25}
LESIONS = 0.05  # share of the stream in quiet times


@dataclass(frozen=True)
class Stream:
    """What a week's scans are drawn from: shares of makers and of lesions, and what is done to every image."""

    makers: tuple[tuple[str, float], ...] = tuple(MAKERS.items())
    lesions: float = LESIONS
    gain: float = 1.0
    offset: float = 0.0
    blur: float = 0.0


CHANGES: dict[str, Stream] = {
    **{f"gain {gain:+.0%}": Stream(gain=1 + gain) for gain in (-0.05, 0.05, -0.10, 0.10, -0.15, 0.15, -0.20, 0.20)},
    "window level +5 %": Stream(offset=0.05),
    "window level +10 %": Stream(offset=0.10),
    "a new maker replaces C": Stream(makers=(("A", 0.4), ("B", 0.35), ("D", 0.25))),
    "C stops, A takes over": Stream(makers=(("A", 0.65), ("B", 0.35))),
    "detector blur 0.5 px": Stream(blur=0.5),
    "detector blur 0.8 px": Stream(blur=0.8),
    "lesions 5 % -> 20 %": Stream(lesions=0.20),
    "lesions 5 % -> 40 %": Stream(lesions=0.40),
}
# What each maker's processing does: gain, blur.
_LOOK = {"A": (1.0, 0.0), "B": (0.94, 0.0), "C": (1.0, 0.35), "D": (0.9, 0.5)}


def luck(seed: int) -> float:
    """Return a patient's draw: where a stream's share of lesions is above it, the patient has one."""
    return float(np.random.default_rng([seed, 9]).random())


def expose(seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a patient without and, if some stream asks for it, with a lesion, float32 in [0, 1]."""
    normal = simulate(seed, 0, None, SIDE).image_HW.astype(np.float32) / 4095
    if luck(seed) >= max(stream.lesions for stream in CHANGES.values()):
        return normal, None
    lesion = Lesion(LESION_KINDS[seed % len(LESION_KINDS)], seed)
    return normal, simulate(seed, 0, lesion, SIDE).image_HW.astype(np.float32) / 4095


def patients_of(total: int, file: Path | None) -> list[Patient]:
    """Return simulated patients, from a file where one holds them."""
    if file is not None and file.exists():
        with np.load(file) as kept:
            return [(kept["normal"][seed], kept["abnormal"][seed], luck(seed)) for seed in range(total)]
    found = [expose(seed) for seed in range(total)]
    pairs = [(normal, normal if abnormal is None else abnormal) for normal, abnormal in found]
    if file is not None:
        normal, abnormal = (np.stack(images) for images in zip(*pairs, strict=True))
        np.savez(file, normal=normal, abnormal=abnormal)
    return [(*pair, luck(seed)) for seed, pair in enumerate(pairs)]


def week(patients: list[Patient], stream: Stream, rng: np.random.Generator) -> dict[str, Any]:
    """Return images and headers of one window."""
    names, shares = zip(*stream.makers, strict=True)
    makers = [str(name) for name in rng.choice(names, len(patients), p=np.array(shares) / sum(shares))]
    images = []
    for (normal, abnormal, drawn), maker in zip(patients, makers, strict=True):
        gain, blur = _LOOK[maker]
        image = abnormal if drawn < stream.lesions else normal
        image = gaussian_filter(gain * stream.gain * image + stream.offset, float(np.hypot(blur, stream.blur)))
        images.append(np.clip(image, 0, 1))
    return {
        "images": np.stack(images).astype(np.float32),
        "makers": makers,
        "sex": [str(sex) for sex in rng.choice(["F", "M"], len(patients))],
        "age": rng.integers(18, 90, len(patients)).astype(np.float64),
    }


class Model:
    """A small model, trained here, calibrated on held-out normals."""

    def __init__(self, train: np.ndarray, seconds: float) -> None:
        torch.manual_seed(0)
        config = ModelConfig(encoder_dim=64, encoder_depth=4, encoder_heads=4, memory_slots=16, decoder_dim=64,
                             decoder_depth=2, decoder_heads=4, patch_size=8)  # fmt: skip
        mean, std = float(train.mean()), float(train.std())
        model, images = MemMCMAE(config, SIDE, 1), torch.from_numpy((train - mean) / std)[:, None]
        optimiser, end, steps = torch.optim.AdamW(model.parameters(), 1e-3), time.process_time() + seconds, 0
        while time.process_time() < end:
            loss = model(images[torch.randint(len(images), (16,))]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1
        print(f"trained {steps} steps, loss {float(loss.detach()):.3f}", flush=True)
        info = {"preprocess_id": "p", "cohort": "c", "dataset_version": 0, "steps": steps, "train_seconds": seconds}
        info |= {"config_id": "x", "image_size": SIDE, "channels": 1, "pixel_mean": mean, "pixel_std": std, "seed": 0}
        self.folder = tempfile.TemporaryDirectory()
        export_model(self.folder.name, model, info)
        self.loaded = load_model(self.folder.name)
        self.settings = ScoreConfig(scorer="residual_peak", batch_size=32, num_actors=1)
        self.actor: Reconstructor | None = None

    def features(self, images: np.ndarray, start: int) -> Any:
        if self.actor is None:
            self.actor = Reconstructor(ScoringJob(model_files(Path(self.folder.name)), self.settings))
        count = len(images)
        stored = (images * 65535).round().astype("<u2")
        rows = pa.table(
            {
                "sop_instance_uid": [f"2.25.{start + number:09d}" for number in range(count)],
                "patient_key": [str(number) for number in range(count)],
                "study_uid": [None] * count,
                "pixels": pa.array([image.tobytes() for image in stored], pa.binary()),
                **{name: pa.array([value] * count, pa.int32()) for name, value in
                   (("height", SIDE), ("width", SIDE), ("channels", 1), ("bits", 16))},
            }
        )  # fmt: skip
        assert np.allclose(grey_images(rows)[..., 0], images, atol=1e-4)
        return join_features([self.actor(rows)])[0]

    def calibrate(self, images: np.ndarray) -> None:
        found = self.features(images, 10**8)
        keys = [str(number) for number in range(len(images))]
        fitted = fit_and_calibrate(make_scorer(self.settings), found, keys, folds=20)
        self.scorer, self.normal_scores = fitted.scorer, fitted.normal_scores_N
        self.threshold = threshold_at(self.normal_scores, RATE)

    def scores(self, images: np.ndarray, start: int) -> np.ndarray:
        return self.scorer.score_features(self.features(images, start)).anomaly_score_B


def sample(model: Model, seen: dict[str, Any], scores: np.ndarray) -> Sample:
    makers = np.array(seen["makers"])
    return Sample(
        headers={"manufacturer": seen["makers"], "patient_sex": seen["sex"]},
        numbers={"patient_age_years": seen["age"]},
        pixels=pixel_statistics(seen["images"]),
        embeddings_ND=embeddings(model.loaded, seen["images"][..., None]),
        strata=seen["makers"],
        scores={name: scores[makers == name] for name in sorted(set(seen["makers"]))},
        flagged=(int((scores > model.threshold).sum()), len(scores)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", type=int, default=52)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--window", type=int, default=40)
    parser.add_argument("--train-seconds", type=float, default=60.0)
    parser.add_argument("--resamplings", type=int, default=4999)
    parser.add_argument("--patients", type=Path, help="File that keeps the simulated patients for another run.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rules, rng = MonitorConfig(resamplings=arguments.resamplings), np.random.default_rng(0)
    total = 450 + max(arguments.quiet, 2 * arguments.repeats) * arguments.window
    patients = patients_of(total, arguments.patients)
    print(f"{total} patients simulated", flush=True)
    usual = Stream()
    train, held, rest = patients[:150], patients[150:450], patients[450:]
    model = Model(week(train, replace(usual, lesions=0), rng)["images"], arguments.train_seconds)
    model.calibrate(week(held[:150], replace(usual, lesions=0), rng)["images"])
    # Half of the baseline's scores are the calibration's own, out of fold, as in `memmc drift`.
    seen = week(held[150:], usual, rng)
    baseline = sample(model, seen, model.scores(seen["images"], 0))

    def drifted(number: int, stream: Stream) -> set[str]:
        begin = number * arguments.window
        new = week(rest[begin : begin + arguments.window], stream, rng)
        scores = model.scores(new["images"], 10**6 + begin)
        conformal = Conformal({"pooled": p_values(scores, model.normal_scores)}, {"pooled": len(model.normal_scores)})
        shifts = compare(baseline, sample(model, new, scores), conformal, replace_seed(rules, number))
        return {shift.group for shift in shifts if shift.drifted}

    quiet = [drifted(number, usual) for number in range(arguments.quiet)]
    alarms = sum(bool(found) for found in quiet)
    print(f"quiet windows of {arguments.window}: {alarms} of {arguments.quiet} alarmed", flush=True)
    print(f"{'change':28} {'within 1':>9} {'within 2':>9}  by", flush=True)
    for name, stream in CHANGES.items():
        pairs = [[drifted(2 * repeat + second, stream) for second in (0, 1)] for repeat in range(arguments.repeats)]
        first = np.mean([bool(pair[0]) for pair in pairs])
        either = np.mean([bool(pair[0] or pair[1]) for pair in pairs])
        groups = sorted(set().union(*(found for pair in pairs for found in pair)))
        print(f"{name:28} {first:9.0%} {either:9.0%}  {', '.join(groups)}", flush=True)
    return int(alarms > max(1, arguments.quiet / 26))


def replace_seed(rules: MonitorConfig, seed: int) -> MonitorConfig:
    return rules.model_copy(update={"seed": seed})


if __name__ == "__main__":
    sys.exit(main())
