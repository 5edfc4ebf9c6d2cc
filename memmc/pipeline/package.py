"""Package: a model, its score and its calibration as files that need nothing of memmc to run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memmc.config import Config
from memmc.errors import DataError, StorageError, UsageError
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import home_directory
from memmc.pipeline.images import read_pixels
from memmc.pipeline.models import OpenModel, open_model
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import PackageResult
from memmc.pipeline.select import newest_calibration

if TYPE_CHECKING:
    from memmc.scoring.exported import Calibrated, Format, Parity, Scores
    from memmc.scoring.whole import WholeScorer

PARITY_SCANS = 64
EXPORT_FORMAT = 1


@recorded(
    "export",
    lambda done: {
        "model": done.model,
        "model_digest": done.model_digest,
        "calibration_id": done.calibration_id,
        "files": len(done.files),
    },
)
def package(
    config: Config, model: str | None, out: Path, formats: Sequence[str], *, progress: Progress | None = None
) -> PackageResult:
    """Export a calibrated model as files, after they have scored scans of its own cohort as the lake does.

    Args:
        model: the champion when absent.
        out: the folder; it must not exist, or be empty.
        formats: of "torch" and "onnx".

    Raises:
        GateRefused: a file scores otherwise than the lake; nothing is left.
        UsageError: the folder holds something, ONNX cannot be written here, or the calibration ends passes early.
        DataError: the model is not calibrated, or its cohort is gone.
    """
    progress = progress or Silent()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("--out must name a new or an empty folder; it holds something")
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model)
    calibration = newest_calibration(lake, opened)
    if calibration["early_stop"] is not None:
        raise UsageError(
            f"the newest calibration of {opened.ref} ends passes early, which an exported scorer cannot; run "
            "`memmc calibrate --set score.early_stop=0` first"
        )
    where = {"cohort": opened.cohort, "outcome": "stored", "preprocess_id": opened.preprocess_id}
    stored = lake.read("instances", ["sop_instance_uid"], filter=where)["sop_instance_uid"].to_pylist()
    if not stored:
        raise DataError(f"cohort '{opened.cohort}' of {opened.ref} has no stored images to compare scores on")
    uids = sorted(stored)[:PARITY_SCANS]  # keyed, so their order is a draw
    pixels = read_pixels(lake, opened.cohort, uids)
    passes = calibration["passes"] or config.score.passes
    return write_package(opened, calibration, passes, pixels, uids, out, formats, progress)


def write_package(
    model: OpenModel,
    calibration: dict[str, Any],
    passes: int,
    pixels_BHWC: Any,
    uids: Sequence[str],
    out: Path,
    formats: Sequence[str],
    progress: Progress,
) -> PackageResult:
    """Write, hold against the lake's scorer on these pixels, then publish the folder whole or not at all."""
    from memmc.model.artifact import load_model
    from memmc.scoring import exported
    from memmc.scoring.scorer import scorer_from_bytes
    from memmc.scoring.whole import WholeScorer

    kinds: list[Format] = [kind for kind in exported.FILES if kind in formats]
    loaded = load_model(model.folder)
    judged = exported.Calibrated(
        scorer_from_bytes(calibration["scorer_state"]),
        tuple(calibration["normal_scores"]),
        calibration["threshold"],
        calibration["map_scale"],
    )
    ids = exported.ids_for(loaded, uids, passes)
    bits = 8 * pixels_BHWC.dtype.itemsize
    whole = WholeScorer(loaded, judged.scorer, judged.normal_scores, judged.threshold, bits)
    description = {
        "model": model.ref,
        "model_digest": model.digest,
        "preprocess_id": model.preprocess_id,
        "calibration_id": calibration["calibration_id"],
        "scorer": calibration["scorer"],
        "threshold": judged.threshold,
        "false_positive_rate": calibration["false_positive_rate"],
        "num_normals": calibration["num_normals"],
        "pooled": "threshold and p_value are those of all normals; strata of the calibration are not in here",
        "map_scale": judged.map_scale,
        "num_patches": loaded.model.num_patches,
        "num_keep": loaded.model.num_keep,
    }
    expected = exported.lake_scores(loaded, judged, pixels_BHWC, ids)
    parity = publish(whole, (pixels_BHWC, ids), expected, judged, out, kinds, description, progress)
    return PackageResult(
        folder=str(out),
        model=model.ref,
        model_digest=model.digest,
        calibration_id=calibration["calibration_id"],
        files=[*parity, exported.INFO_FILE],
        scans=len(uids),
        score_difference={name: measured.score for name, measured in parity.items()},
    )


def publish(
    whole: WholeScorer,
    inputs: tuple[Any, Any],
    expected: Scores,
    judged: Calibrated,
    out: Path,
    formats: Sequence[Format],
    description: dict[str, Any],
    progress: Progress,
) -> dict[str, Parity]:
    """Write the files aside, run them as written, and let the folder appear only if they score as expected.

    Args:
        whole: what is exported.
        inputs: pixels_BHWC and ids_keep_BPK, on which the files are run.
        expected: what the lake's scorer gives for these inputs.

    Raises:
        GateRefused: a file scores otherwise.
        StorageError: the place cannot be written.
    """
    from memmc.scoring import exported

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as aside:
            folder = Path(aside, "export")
            folder.mkdir()
            progress.stage("export")
            exported.write_files(whole, *inputs, folder, formats)
            progress.stage("compare")
            names = [exported.FILES[kind] for kind in formats]
            parity: dict[str, Parity] = {}
            for kind, name in zip(formats, names, strict=True):
                parity[name] = exported.compare(exported.OPENERS[kind](folder / name)(*inputs), expected, judged)
                exported.require_parity(name, parity[name])
            document = {
                "format": EXPORT_FORMAT,
                **description,
                **exported.input_output(*inputs),
                "parity": {
                    "meaning": "differences from the scorer that fills the lake; score: largest, as a share of the "
                    "scan's score or of score_scale (the median score of held-out normals), whichever is larger; "
                    "map: share of map_scale",
                    "score_scale": judged.score_scale,
                    "score_tolerance": exported.SCORE_TOLERANCE,
                    "map_mean_tolerance": exported.MAP_TOLERANCE,
                    **{name: asdict(measured) for name, measured in parity.items()},
                },
                "sha256": {name: exported.sha256_of(folder / name) for name in names},
                "versions": exported.versions(formats),
                "exported_at": datetime.now(UTC).isoformat(),
            }
            (folder / exported.INFO_FILE).write_text(json.dumps(document, indent=2) + "\n")
            os.replace(folder, out)  # noqa: PTH105 - the atomic one; an empty folder gives way
    except OSError as error:
        raise StorageError(f"export cannot be written ({error.strerror}); check --out") from None
    return parity
