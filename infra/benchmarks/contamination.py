"""What the champion's screen of new normals is worth when some of them are not normal.

A champion learns clean normals. Then a batch comes that is labelled normal throughout, a share of it with a lesion.
Challengers learn from both: without the screen, with it, and with a person who rejects every lesion (the best that a
review can do). All are judged on patients none has met. Images are simulated and need no DICOM:

    python infra/benchmarks/contamination.py --out /tmp/contamination            about 10 min on two quiet cores
    python infra/benchmarks/contamination.py --out /tmp/c --patients 120 --batch 80 --test 60 --steps 60
"""

from __future__ import annotations

import argparse
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from memmc.config import Config, load_config
from memmc.lake.schemas import INSTANCES
from memmc.lake.splits import split_of
from memmc.lake.tables import Lake
from memmc.phantom.lesions import LESION_KINDS, Lesion
from memmc.phantom.radiograph import simulate
from memmc.pipeline.challenge import Case, held_out_normals
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.evaluate import evaluate
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.probing import Judged, planted, read_normals
from memmc.pipeline.review import reviews, screen, settle
from memmc.pipeline.select import normals
from memmc.pipeline.train import train
from memmc.registry.models import resolve
from memmc.registry.promotion import crown

COHORT, TEST, SIDE = "cxr", "test", 32


def settings(out: Path, steps: int, limit: float) -> Config:
    return load_config(
        overrides=[
            f"lake.uri={out / 'lake'}", f"data.image_size={SIDE}", "model.patch_size=4", "model.encoder_dim=96",
            "model.encoder_depth=3", "model.decoder_depth=2", "split.train=0.6", "split.calibrate=0.3",
            "split.test=0.1", "train.num_workers=1", "train.batch_size=16", f"train.max_steps={steps}",
            "train.max_minutes=60", "score.num_actors=1", "calibrate.false_positive_rate=0.1",
            "evaluate.bootstrap=500", f"retrain.screen_p_value={limit}",
        ]
    )  # fmt: skip


def rows(
    config: Config, cohort: str, name: str, count: int, share: float, label: str | None
) -> tuple[pa.Table, set[str]]:
    """Return rows as ingest would leave them, one image a patient, and the UIDs of those with a lesion.

    Args:
        share: with a lesion.
        label: of all; None gives each the true one.
    """
    rng, made, lesions = np.random.default_rng([7, len(name), count]), list[dict[str, Any]](), set[str]()
    for number in range(count):
        key = hashlib.sha256(f"{name}/{number}".encode()).hexdigest()
        seed = int(key[:8], 16)
        odd = rng.random() < share
        lesion = Lesion(LESION_KINDS[number % len(LESION_KINDS)], seed) if odd else None
        image = (simulate(seed, 0, lesion, SIDE).image_HW / 4095).clip(0, 1)
        uid = f"2.25.{int(key[40:60], 16)}"
        lesions |= {uid} if odd else set()
        row: dict[str, Any] = {"cohort": cohort, "object_key": key, "source_ref": "sealed", "content_key": key}
        row |= {"size_bytes": 1, "outcome": "stored", "split": split_of(key, config.split), "patient_key": key}
        row |= {"study_uid": f"2.25.{int(key[:20], 16)}", "sop_instance_uid": uid, "modality": "DX"}
        row |= {"label": label or ("abnormal" if odd else "normal"), "preprocess_id": config.preprocess_id}
        row |= {"pixels": (image * 65535).round().astype("<u2").tobytes(), "height": SIDE, "width": SIDE}
        row |= {"channels": 1, "bits": 16, "rows": 2048, "columns": 2048, "bits_stored": 12, "view_position": "PA"}
        row |= {"pixel_mean": float(image.mean()), "pixel_std": float(image.std())}
        made.append({**row, "ingest_run": name, "ingested_at": datetime.now(UTC)})
    return pa.Table.from_pylist(made), lesions


def figures(config: Config, lake: Lake, name: str, model: str, lesions: set[str]) -> str:
    """Return one line: what a model learned, and what it finds in patients it never met."""
    opened = open_model(config, home_directory(), model)
    held = held_out_normals(lake, Case(TEST, opened, None))
    judged = Judged.open(config, lake, opened)
    found = judged.flags(planted(read_normals(lake, TEST, held), config.monitor), held)
    measured = evaluate(config, TEST, model)
    learned = {row["sop_instance_uid"] for row in normals(lake, COHORT, "train")}
    return (
        f"{name:<16} {len(learned):>7} {len(learned & lesions):>7}   {measured.auroc:.3f} "
        f"({measured.auroc_low:.3f} - {measured.auroc_high:.3f})   {measured.sensitivity:>6.1%}      "
        f"{found.mean():>6.1%}   {measured.false_positive_rate:>6.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=400, help="clean, that the champion knows")
    parser.add_argument("--batch", type=int, default=300, help="new, all labelled normal")
    parser.add_argument("--share", type=float, default=0.3, help="of the batch, with a lesion")
    parser.add_argument("--test", type=int, default=300, help="patients to judge on, half with a lesion")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=float, default=0.05, help="retrain.screen_p_value")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    os.chdir(given.out)
    config = settings(given.out.absolute(), given.steps, given.limit)
    lake, tracking = Lake(config.lake.uri), tracking_of(config, home_directory())
    lake.append(INSTANCES, rows(config, COHORT, "first", given.patients, 0, "normal")[0])
    lake.append(INSTANCES, rows(config, TEST, "test", given.test, 0.5, None)[0])
    table: list[str] = []
    with ray_cluster(config, home_directory()):
        champion = train(config, COHORT).model
        crown(tracking, resolve(tracking, champion))
        table.append(figures(config, lake, "champion", champion, set()))
        new, lesions = rows(config, COHORT, "batch", given.batch, given.share, "normal")
        lake.append(INSTANCES, new)
        table.append(figures(config, lake, "without screen", train(config, COHORT).model, lesions))
        screened = screen(config, COHORT)
        odd = {item["sop_instance_uid"] for item in reviews(config, COHORT).instances}
        table.append(figures(config, lake, "with screen", train(config, COHORT).model, lesions))
        settle(config, COHORT, sorted(lesions), "rejected")
        settle(config, COHORT, sorted(odd - lesions), "accepted")
        table.append(figures(config, lake, "every one known", train(config, COHORT).model, lesions))
    true = screened.screened - len(lesions)
    print(f"screen at p <= {screened.limit:.3f}: {len(odd & lesions)} of {len(lesions)} lesions suspect, ", end="")
    print(f"{len(odd - lesions)} of {true} true normals")
    print("                  learned lesions   AUROC                   sensitivity  planted  flagged normals")
    print("\n".join(table))


if __name__ == "__main__":
    main()
