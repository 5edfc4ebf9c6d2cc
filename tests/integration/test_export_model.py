"""A model exported as files scores what the lake's scorer scores, in torch and in ONNX Runtime; else it is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import scored_model

from memmc.config import Config
from memmc.errors import GateRefused, UsageError
from memmc.model.artifact import LoadedModel, export_model, load_model
from memmc.model.digest import model_digest
from memmc.pipeline.models import OpenModel
from memmc.pipeline.package import package, publish, write_package
from memmc.pipeline.progress import Silent
from memmc.scoring import exported
from memmc.scoring.whole import WholeScorer

pytestmark = pytest.mark.slow


def opened(loaded: LoadedModel, folder: Path) -> OpenModel:
    export_model(folder, loaded.model, loaded.info)
    info = json.loads((folder / "model.json").read_text())
    return OpenModel("unit/1", model_digest(folder), folder, info)


def calibration_row(loaded: LoadedModel, scorer: str) -> dict[str, Any]:
    judged = scored_model.calibrated(loaded, scored_model.pixels(24), scorer)
    return {
        "calibration_id": "c",
        "scorer": scorer,
        "false_positive_rate": 0.5,
        "num_normals": 24,
        "scorer_state": judged.scorer.state_to_bytes(),
        "normal_scores": list(judged.normal_scores),
        "threshold": judged.threshold,
        "map_scale": judged.map_scale,
    }


def written(tmp_path: Path, scorer: str) -> tuple[Path, OpenModel, np.ndarray]:
    loaded = scored_model.model()
    model, stored = opened(loaded, tmp_path / "model"), scored_model.pixels(64, seed=1)
    row, uids = calibration_row(loaded, scorer), scored_model.uids(64)
    result = write_package(model, row, 4, stored, uids, tmp_path / "out", ("torch", "onnx"), Silent())
    assert set(result.score_difference) == {"program.pt2", "model.onnx"}
    assert max(result.score_difference.values()) <= 1e-4
    return tmp_path / "out", model, stored


def test_both_files_score_as_the_lake_in_batches_of_any_size(tmp_path: Path) -> None:
    folder, model, stored = written(tmp_path, "residual_statistics")
    assert {file.name for file in folder.iterdir()} == {"program.pt2", "model.onnx", "export.json"}
    document = json.loads((folder / "export.json").read_text())
    assert document["model_digest"] == model.digest
    assert document["parity"]["model.onnx"]["scans"] == 64
    assert document["sha256"]["model.onnx"] == exported.sha256_of(folder / "model.onnx")
    assert document["inputs"]["pixels"] == {**document["inputs"]["pixels"], "dtype": "uint16"}
    loaded = load_model(model.folder)
    ids = exported.ids_for(loaded, scored_model.uids(64), 4)
    onnx, torch_program = exported.open_onnx(folder / "model.onnx"), exported.open_torch(folder / "program.pt2")
    whole = onnx(stored, ids)
    for count in (1, 2, 7):
        for run in (onnx, torch_program):
            part = run(stored[:count], ids[:count])
            np.testing.assert_allclose(part.anomaly_score_B, whole.anomaly_score_B[:count], rtol=1e-4)
            assert part.anomaly_map_BHW.shape == (count, 32, 32)


def test_altered_weights_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    """The file is made of other weights than those the lake scores with."""
    loaded = scored_model.model()
    judged = scored_model.calibrated(loaded, scored_model.pixels(24))
    stored, ids = scored_model.pixels(64, seed=1), exported.ids_for(loaded, scored_model.uids(64), 4)
    expected = exported.lake_scores(loaded, judged, stored, ids)

    def publish_from(source: LoadedModel, out: Path) -> None:
        whole = WholeScorer(source, judged.scorer, judged.normal_scores, judged.threshold, 16)
        publish(whole, (stored, ids), expected, judged, out, ("torch",), {}, Silent())

    publish_from(loaded, tmp_path / "good")
    with pytest.raises(GateRefused, match="nothing was exported") as refused:
        publish_from(scored_model.model(seed=1), tmp_path / "bad")
    assert refused.value.exit_code == 3
    assert [file.name for file in tmp_path.iterdir()] == ["good"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UsageError, match="new or an empty folder"):
        package(Config(), None, tmp_path, ("onnx",))
    assert [file.name for file in tmp_path.iterdir()] == ["note"]
