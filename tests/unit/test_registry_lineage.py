"""What a run says of its images, and its model of itself, in MLflow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memmc.config import TrackingConfig, load_config
from memmc.pipeline.model_card import add_evaluation, build_card, publish_card, read_card, set_calibration
from memmc.pipeline.models import OpenModel
from memmc.pipeline.results import CalibrationResult, EvaluationResult
from memmc.registry.lineage import TrainingInput, images_digest, log_input
from memmc.registry.models import register
from memmc.registry.tracking import open_tracking


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    return open_tracking(TrackingConfig(), tmp_path_factory.mktemp("lineage") / ".memmc")


def calibration() -> CalibrationResult:
    rates = [{"rate": 0.05, "threshold": 1.25, "low": 0.01, "high": 0.1, "refused": None}]
    strata = [{"stratum": "GE/PA", "refused": "7 normals, 60 are needed"}]
    return CalibrationResult("cal-1", "memmc-cxr/1", "cxr", "l1", 0.05, 1.25, 80, 70, rates, strata)


def evaluation(cohort: str, auroc: float) -> EvaluationResult:
    names = ("average_precision", "average_precision_low", "average_precision_high", "false_positive_rate")
    rest = dict.fromkeys((*names, "false_positive_rate_low", "false_positive_rate_high", "sensitivity"), 0.5)
    return EvaluationResult(
        auroc=auroc,
        auroc_low=auroc - 0.1,
        auroc_high=auroc + 0.1,
        controls={"mean": 0.5},
        num_normal=30,
        num_abnormal=12,
        model="memmc-cxr/1",
        cohort=cohort,
        calibration_id="cal-1",
        scorer="l1",
        chosen_false_positive_rate=0.05,
        **rest,
    )


def test_a_set_of_images_has_one_name_in_any_order():
    assert images_digest(["a", "b"]) == images_digest(["b", "a"]) != images_digest(["a", "c"])
    assert images_digest(["ab"]) != images_digest(["a", "b"])


def test_the_images_of_a_run_are_its_input(tracking):
    run = tracking.start_run("memmc/cxr", "train")
    digest = images_digest(["k1", "k2"])
    log_input(tracking, run, TrainingInput("cxr", 12, digest, 2, 2, {"preprocess_id": "p", "config_id": "c"}))
    (found,) = tracking.client.get_run(run).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("instances/cxr", digest)
    assert json.loads(found.dataset.source) == {"table": "instances", "version": 12, "cohort": "cxr"}
    assert json.loads(found.dataset.profile) == {"images": 2, "patients": 2}
    tags = {tag.key: tag.value for tag in found.tags}
    assert tags == {"mlflow.data.context": "training", "preprocess_id": "p", "config_id": "c"}
    assert "k1" not in json.dumps(found.dataset.to_dictionary() | tags)


def test_a_card_stands_in_the_run_and_beside_the_version_and_grows(tracking, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    info = {"cohort": "cxr", "dataset_version": 12, "preprocess_id": "p", "image_size": 64, "channels": 1}
    info |= {"steps": 100, "train_seconds": 9.5, "seed": 0}
    (folder / "model.json").write_text(json.dumps(info))
    run = tracking.start_run("memmc/cxr", "train")
    version = register(tracking, run, folder, "memmc-cxr")
    model = OpenModel(version.ref, version.digest, folder, info, run)
    assert read_card(tracking, model) is None and not add_evaluation(tracking, model, evaluation("cxr", 0.8))
    assert not set_calibration(tracking, model, calibration())

    data = {"images": 400, "patients": 390, "left_out": {"QC_BLANK": 2}}
    card = build_card(
        load_config(overrides=["lake.uri=lake"]), model, data, {"loss": 0.25, "ablation/x": 0.3}, calibration()
    )
    publish_card(tracking, model, card)
    assert tracking.flush()
    assert read_card(tracking, model) == card
    shown = tracking.client.get_model_version("memmc-cxr", version.version).description
    for text in ("not a medical device", "| images | 400 |", "QC_BLANK 2", "| loss | 0.25 |", "| 0.05 | 1.25 |"):
        assert text in shown
    for text in ("GE/PA: 7 normals, 60 are needed", version.digest, "cal-1", "Not measured on labelled images yet"):
        assert text in shown

    for cohort, auroc in (("cxr", 0.7), ("other", 0.9), ("cxr", 0.8)):
        assert add_evaluation(tracking, model, evaluation(cohort, auroc))
    grown = read_card(tracking, model)
    assert grown is not None
    assert {name: found["auroc"] for name, found in grown["evaluations"].items()} == {"cxr": 0.8, "other": 0.9}
    shown = tracking.client.get_model_version("memmc-cxr", version.version).description
    assert "cxr: AUROC 0.800 (0.700 to 0.900)" in shown and "other: AUROC 0.900" in shown
    assert "Not measured" not in shown
    later = replace(
        calibration(), calibration_id="cal-2", scorer="mse", strata=[],
        thresholds=[{"rate": 0.01, "threshold": 2.5}],
    )  # fmt: skip
    assert set_calibration(tracking, model, later)
    shown = tracking.client.get_model_version("memmc-cxr", version.version).description
    assert "cal-2" in shown and "scorer mse" in shown and "| 0.01 | 2.5 |" in shown and "AUROC 0.800" in shown
    assert "1.25" not in shown and "GE/PA" not in shown
    grown = read_card(tracking, model)
    assert grown is not None and grown["stamps"]["calibration_id"] == "cal-2"
    listed = [entry.path for entry in tracking.client.list_artifacts(run, "card")]
    assert listed == ["card/model_card.json", "card/model_card.md"]
    assert str(Path.cwd()) not in json.dumps(grown)
