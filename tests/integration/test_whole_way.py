"""Ingest, train, calibrate, score, evaluate, report: the real steps on a real Ray cluster."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pydicom
import pytest

from memmc.errors import DataError, PreprocessMismatch
from memmc.lake.tables import Lake
from memmc.pipeline.identity import home_directory
from memmc.pipeline.ingest import ingest
from memmc.pipeline.models import open_model
from memmc.pipeline.select import met_patients, normals

pytestmark = pytest.mark.slow


def test_ingest_accounts_for_every_file_once(workspace):
    account, lake = workspace.ingested, Lake(workspace.config.lake.uri)
    files = [path for path in workspace.hospital.dicom_dir.rglob("*") if path.is_file()]
    assert account.seen == len(files) == account.stored + account.duplicate + account.excluded + account.quarantined
    assert account.stored == workspace.hospital.num_normal + workspace.hospital.num_abnormal
    rows = lake.read("instances", ["object_key", "outcome", "reason", "sop_instance_uid"])
    assert rows.num_rows == len(set(rows["object_key"].to_pylist())) == len(files)
    assert account.duplicate == 1
    assert all((row["reason"] is None) == (row["outcome"] == "stored") for row in rows.to_pylist())


def test_a_second_ingest_adds_nothing(inside):
    again = ingest(inside.config, str(inside.hospital.dicom_dir), "cxr", labels_file=str(inside.hospital.labels_csv))
    assert (again.seen, again.stored, again.duplicate) == (inside.ingested.seen, 0, inside.ingested.seen)
    assert again.version == inside.ingested.version
    assert again.reasons == {"already_ingested": inside.ingested.seen}


def test_labels_and_splits_belong_to_patients(workspace):
    rows = (
        Lake(workspace.config.lake.uri)
        .read("instances", ["patient_key", "split", "label"], filter={"outcome": "stored"})
        .to_pylist()
    )
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["patient_key"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "calibrate", "test"}
    assert sum(row["label"] == "abnormal" for row in rows) == workspace.hospital.num_abnormal


def test_nothing_identifying_leaves_the_source(inside):
    """Names, ids, dates and UIDs of every object, searched in every file under the lake and .memmc."""
    planted: set[bytes] = set()
    for path in sorted(inside.hospital.dicom_dir.rglob("*")):
        if not path.is_file():
            continue
        planted.add(path.name.encode())
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            continue
        for keyword in ("PatientName", "PatientID", "AccessionNumber", "SOPInstanceUID", "StudyInstanceUID"):
            value = str(header.get(keyword, "") or "")
            planted |= {value.encode(), value.encode("utf-16-le")} if len(value) > 5 else set()
    assert len(planted) > 300

    def leaks(data: bytes) -> bool:
        return any(item in data for item in planted)

    places = [path for folder in ("lake", ".memmc") for path in (inside.root / folder).rglob("*") if path.is_file()]
    assert len(places) > 10
    assert [path.name for path in places if leaks(path.read_bytes())] == []
    assert all(leaks(b"..." + item + b"...") for item in planted)  # the search itself can find


def test_the_trained_model_is_registered_and_calibrated(inside):
    model = open_model(inside.config, home_directory(), None)
    assert model.ref == inside.trained.model
    assert model.digest == inside.trained.model_digest
    assert model.preprocess_id == inside.config.preprocess_id
    assert inside.trained.steps > 0
    assert inside.trained.calibration["num_normals"] == len(
        normals(Lake(inside.config.lake.uri), "cxr", "calibrate", model.dataset_version)
    )


def test_scores_are_complete_unique_and_repeatable(inside):
    from memmc.pipeline.export import COLUMNS, export_scores
    from memmc.pipeline.score import score

    first = score(inside.config, "cxr")
    assert first.instances == inside.ingested.stored
    second = score(inside.config, "cxr")
    assert (second.scored, second.already_scored) == (0, first.instances)
    table = export_scores(inside.config, "cxr", None, inside.root / "scores.parquet")
    assert tuple(table.column_names) == COLUMNS
    rows = [row for row in table.to_pylist() if row["not_scored"] is None]
    assert len({row["sop_instance_uid"] for row in rows}) == len(rows) == first.instances
    unscored = [row for row in table.to_pylist() if row["not_scored"] is not None]
    assert len(unscored) == first.not_scored > 0
    assert all(row["anomaly_score"] is None and row["p_value"] is None for row in unscored)
    assert "META_SOP_CLASS_UNSUPPORTED" in {row["not_scored"] for row in unscored}
    assert {row["stratum"] for row in rows} == {"pooled"}
    studies = export_scores(inside.config, "cxr", None, None, "study").to_pylist()
    assert sum(row["num_instances"] for row in studies) == table.num_rows
    assert all(row["p_value"] >= row["min_p_value"] / 2 for row in studies if row["num_scored"])
    assert all(0 < row["p_value"] <= 1 and np.isfinite(row["anomaly_score"]) for row in rows)
    sources = {row["source_key"] for row in rows}
    listed = {str(path.relative_to(inside.hospital.dicom_dir)) for path in inside.hospital.dicom_dir.rglob("*")}
    assert sources <= listed
    with (inside.hospital.labels_csv).open() as file:
        stated = {row["path"]: row["label"] for row in csv.DictReader(file)}
    assert all(row["label"] == stated[row["source_key"]] for row in rows)


def test_without_the_key_source_paths_stay_sealed(inside, tmp_path):
    from memmc.pipeline.export import export_scores
    from memmc.pipeline.score import score

    score(inside.config, "cxr")
    other = tmp_path / "other.key"
    other.touch(mode=0o600)
    other.write_text("not-the-key-of-this-lake-not-the-key-of-this-lake")
    deid = inside.config.deid.model_copy(update={"key_file": str(other)})
    table = export_scores(inside.config.model_copy(update={"deid": deid}), "cxr", None, None)
    assert set(table["source_key"].to_pylist()) == {None}


def test_evaluation_uses_only_patients_the_model_never_met(inside):
    from memmc.pipeline.evaluate import evaluate

    result = evaluate(inside.config, "cxr", masks=inside.hospital.masks_csv)
    lake = Lake(inside.config.lake.uri)
    model = open_model(inside.config, home_directory(), None)
    met = met_patients(lake, model)
    assert met >= {  # the gate may keep an image out, its patient is met all the same
        row["patient_key"]
        for split in ("train", "calibrate")
        for row in normals(lake, "cxr", split, model.dataset_version)
    }
    assert result.num_normal == len(normals(lake, "cxr", "test"))
    assert result.num_abnormal == inside.hospital.num_abnormal
    assert 0 <= result.auroc_low <= result.auroc <= result.auroc_high <= 1
    assert set(result.controls) == {"pca_8x8", "knn_8x8", "mean_intensity", "sharpness", "mean_image"}
    assert result.pixel_auroc is not None
    assert json.loads(json.dumps(result.as_dict()))["model"] == model.ref
    assert [item["specificity"] for item in result.sensitivity_at] == [0.9, 0.95]
    assert {item["nominal"] for item in result.rates} >= {0.05}


def test_the_report_is_one_page_that_needs_nothing_else(inside):
    from memmc.pipeline.report import report

    written = report(inside.config, "cxr", out="r.html", masks=inside.hospital.masks_csv)
    page = (inside.root / written.report).read_text()
    assert not re.search(r"(src|href)=[\"']https?:", page)
    assert "not a medical device" in page
    assert inside.trained.model in page
    assert "META_SOP_CLASS_UNSUPPORTED" in page


def test_pixels_prepared_otherwise_are_refused(inside):
    from memmc.pipeline.score import score

    config = inside.config.model_copy(update={"data": inside.config.data.model_copy(update={"bits": 8})})
    ingest(config, str(inside.hospital.dicom_dir), "eight-bits", label="normal")
    with pytest.raises(PreprocessMismatch, match=inside.config.preprocess_id):
        score(inside.config, "eight-bits")
    with pytest.raises(DataError):
        score(inside.config, "no-such-cohort")


def test_the_gate_says_the_same_on_the_cluster_as_in_this_process(inside, monkeypatch):
    from memmc.pipeline import quality

    lake = Lake(inside.config.lake.uri)
    here = quality.gate(inside.config, "cxr")
    assert (here.gated, here.flags) == (0, inside.trained.flags)  # training gated the cohort
    # A new lake's key draws which normals are compared with: more than 3 of 162 in 3 % of 600 draws, 9 of 150 once.
    assert here.flagged <= 0.1 * here.instances
    flags = quality.flags_of(lake, "cxr")
    monkeypatch.setattr(quality, "_FEW", 0)
    monkeypatch.setattr(quality, "LOOK_FORMAT", 99)  # every image is looked at again
    there = quality.gate(inside.config, "cxr")
    assert (there.gated, there.flags) == (there.instances, here.flags)
    assert quality.flags_of(lake, "cxr") == flags


def test_a_view_is_calibrated_scored_and_evaluated_as_what_it_is_made_of(inside):
    from memmc.config import load_config
    from memmc.pipeline.calibrate import calibrate
    from memmc.pipeline.cohorts import define_cohort
    from memmc.pipeline.evaluate import evaluate
    from memmc.pipeline.report import report
    from memmc.pipeline.score import score

    lake = Lake(inside.config.lake.uri)
    women = define_cohort(inside.config, "women", ["cxr"], ["patient_sex=F"])
    whole = score(inside.config, "cxr")
    assert 0 < women.instances < whole.instances
    rows = lake.version("scores")
    part = score(inside.config, "women")
    assert (part.instances, part.scored, part.version) == (women.instances, 0, rows)  # all have a score already
    assert 0 < part.abnormal + part.already_scored < whole.abnormal + whole.already_scored + whole.scored
    measured = evaluate(inside.config, "women")
    assert 0 < measured.num_abnormal < inside.hospital.num_abnormal
    page = (inside.root / report(inside.config, "women", out="women.html").report).read_text()
    assert "women" in page
    settings = [f"lake.uri={inside.config.lake.uri}", "calibrate.false_positive_rate=0.2", "calibrate.min_normals=5"]
    fitted = calibrate(load_config(overrides=settings), "women")
    assert fitted.num_normals == len(normals(lake, "women", "calibrate")) < len(normals(lake, "cxr", "calibrate"))
    scored = score(inside.config, "women")
    assert scored.scored == part.already_scored  # the newest calibration judges anew
    assert set(lake.read("scores", ["cohort"])["cohort"].to_pylist()) == {"cxr"}
    calibrate(inside.config, "cxr")  # as the other tests know it
