"""Demo: the whole way on a simulated hospital. The scans are generated; every step is the real one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmc.config import Config
from memmc.cores import cores
from memmc.errors import DataError, ModelError
from memmc.lake.tables import Lake
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.models import open_model
from memmc.pipeline.progress import Progress
from memmc.pipeline.report import report_and_evaluation
from memmc.pipeline.results import DemoResult

COHORT = "demo"
_NORMAL, _ABNORMAL, _BROKEN, _SEED = 420, 80, 7, 2026


@dataclass(frozen=True)
class Steps:
    """The three steps that are flows too; each takes what its pipeline function takes."""

    ingest: Callable[..., Any]
    train: Callable[..., Any]
    score: Callable[..., Any]


def direct_steps() -> Steps:
    """Return the pipeline functions themselves."""
    from memmc.pipeline.ingest import ingest
    from memmc.pipeline.score import score
    from memmc.pipeline.train import train

    return Steps(ingest=ingest, train=train, score=score)


def demo_overrides(minutes: float, lake: str) -> list[str]:
    """Return the settings in which the demo differs from the defaults; the caller's own come after them.

    A good third of the patients is kept for calibration and test, and the rate is 10 %: 420 normals are few.
    """
    return [
        f"lake.uri={lake}",
        f"train.max_minutes={minutes}",
        "model.decoder_depth=2",  # half the time of a step; learns more in a few minutes
        "split.train=0.64",
        "split.calibrate=0.18",
        "split.test=0.18",
        "calibrate.false_positive_rate=0.10",
    ]


def run_demo(config: Config, out: Path, home: Path, progress: Progress, steps: Steps | None = None) -> DemoResult:
    """Generate scans, ingest, train, score, evaluate, report.

    Everything is idempotent: a second call on the same folder generates, ingests, trains and scores nothing twice.

    Args:
        out: folder for the generated hospital and the report.
        steps: the flows, or None for the steps themselves.
    """
    from memmc.phantom.hospital import write_hospital

    began = time.monotonic()
    steps = steps or direct_steps()
    progress.stage("generate", _NORMAL + _ABNORMAL)
    hospital = out / "hospital"
    write_hospital(
        hospital,
        num_normal=_NORMAL,
        num_abnormal=_ABNORMAL,
        num_broken=_BROKEN,
        seed=_SEED,
        workers=cores(),
        progress=lambda done, _total: progress.advance(done),
    )
    with ray_cluster(config, home):
        steps.ingest(
            config, str(hospital / "dicom"), COHORT, labels_file=str(hospital / "labels.csv"), progress=progress
        )
        model, trained = _trained(config, home, steps, progress)
        steps.score(config, COHORT, model, progress=progress)
        page = out / "report.html"
        written, evaluation = report_and_evaluation(
            config, COHORT, model, out=str(page), masks=hospital / "masks.csv", progress=progress
        )
    if evaluation is None:
        raise DataError("the demo's cohort could not be evaluated; delete its folder and run it again")
    return DemoResult(
        ingest=account(Lake(config.lake.uri)),
        model=model,
        steps=int(trained["steps"]),
        train_seconds=float(trained["train_seconds"]),
        evaluation=evaluation.as_dict(),
        report=written.report,
        seconds=round(time.monotonic() - began, 1),
    )


def account(lake: Lake) -> dict[str, int]:
    """Return what the table holds of the demo's objects, by outcome."""
    outcomes = lake.read("instances", ["outcome"], filter={"cohort": COHORT})["outcome"].to_pylist()
    return {
        "seen": len(outcomes),
        **{name: outcomes.count(name) for name in ("stored", "duplicate", "excluded", "quarantined")},
    }


def _trained(config: Config, home: Path, steps: Steps, progress: Progress) -> tuple[str, dict[str, Any]]:
    """Return a model of this data and configuration; the one an earlier demo trained if there is one."""
    lake = Lake(config.lake.uri)
    try:
        model = open_model(config, home, f"memmc-{COHORT}")
    except ModelError:
        model = None
    if model and model.dataset_version == lake.version("instances") and model.info["config_id"] == config.config_id:
        progress.message(f"{model.ref} was trained on the same data and configuration: used again")
        return model.ref, model.info
    result = steps.train(config, COHORT, progress=progress)
    return result.model, result.as_dict()
