"""A model's life on simulated chests: the first champion, a bad challenger, contaminated normals, and back again."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memmc.cli.main import app
from memmc.config import Config, load_config
from memmc.dicom.deidentify import keyed_uid
from memmc.lake.tables import Lake
from memmc.phantom.hospital import HospitalSummary, write_hospital
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.ingest import ingest
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.retrain import training_rows
from memmc.registry.models import resolve
from memmc.registry.promotion import champion_of, history

pytestmark = pytest.mark.slow

SETTINGS = [
    "lake.uri=lake",
    "data.image_size=32",
    "deid.text=class",
    "model.patch_size=4",
    "model.encoder_dim=96",
    "model.encoder_depth=3",
    "model.decoder_depth=2",
    "train.num_workers=1",
    "train.max_steps=80",
    "split.train=0.5",
    "split.calibrate=0.25",
    "split.test=0.25",
    "calibrate.false_positive_rate=0.1",
    "evaluate.bootstrap=200",
    "promote.confidence=0.99",  # a story is told once: no gate may say no by chance
    "promote.max_changed=0.4",
    "promote.max_slowdown=10",
    "promote.min_labelled=5",
    "promote.parity=",
    "promote.probes=40",
    "monitor.canary_scans=6",
    "retrain.min_new_patients=5",
    "retrain.cooldown_days=0",
    "retrain.screen_p_value=0.1",
]


@pytest.fixture(scope="module")
def lake_config(tmp_path_factory: pytest.TempPathFactory, hospital: HospitalSummary) -> Iterator[Config]:
    """A lake of labelled scans at 32 px in a working directory of its own."""
    root, before = tmp_path_factory.mktemp("retrain"), Path.cwd()
    os.chdir(root)
    try:
        config = load_config(overrides=SETTINGS)
        with ray_cluster(config, root / ".memmc"):
            ingest(config, str(hospital.dicom_dir), "cxr", labels_file=str(hospital.labels_csv))
            yield config
    finally:
        os.chdir(before)


def memmc(verb: str, *arguments: str) -> tuple[int, dict]:
    """Call a verb with the settings; return its exit status and its JSON."""
    chosen = [part for setting in SETTINGS for part in ("--set", setting)]
    done = CliRunner().invoke(app, [*verb.split(), "--json", *chosen, *arguments], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def lesions_of(config: Config, hospital: HospitalSummary) -> set[str]:
    """Return the pseudonyms of the images that show a lesion."""
    key = held_key(config, home_directory())
    assert key is not None
    with hospital.masks_csv.open() as file:
        return {keyed_uid(key, row["sop_instance_uid"]) for row in csv.DictReader(file)}


def test_a_model_is_promoted_refused_retrained_and_taken_back(lake_config: Config, tmp_path: Path) -> None:
    tracking, lake = tracking_of(lake_config, home_directory()), Lake("lake")

    # Nothing is the champion: absolute limits hold.
    status, plan = memmc("retrain", "--cohort", "cxr", "--dry-run")
    assert (status, plan["plan"]["outcome"], plan["plan"]["reason"]) == (0, "train", "there is no champion")
    status, first = memmc("retrain", "--cohort", "cxr", "--set", "promote.parity=torch")
    assert status == 0, first
    assert first["verdict"]["outcome"] == "promoted"
    assert {gate["name"] for gate in first["verdict"]["gates"] if gate["verdict"] == "pass"} >= {
        "auroc",
        "learned",
        "export parity",
    }

    # Two steps make no model.
    status, bad = memmc("train", "--cohort", "cxr", "--set", "train.resume=new", "--set", "train.max_steps=2")
    assert status == 0
    status, refused = memmc("promote", bad["model"], "--cohort", "cxr")
    assert (status, refused["outcome"], refused["champion"]) == (3, "refused", first["trained"]["model"])
    assert "learned" in {gate["name"] for gate in refused["gates"] if gate["verdict"] == "fail"}
    champion = champion_of(tracking, "memmc-cxr")
    assert champion is not None
    assert champion.ref == first["trained"]["model"]

    # Scans with lesions come, called normal.
    batch = write_hospital(tmp_path / "batch", num_normal=40, num_abnormal=6, num_broken=0, seed=77)
    ingest(lake_config, str(batch.dicom_dir), "cxr", label="normal")
    status, second = memmc("retrain", "--cohort", "cxr")
    screened = second["plan"]["screened"]
    assert second["plan"]["outcome"] == "train", second
    assert screened["suspects"] == screened["waiting"] > 0
    status_list, listed = memmc("review list", "--cohort", "cxr")
    assert status_list == 0
    odd, lesions = {row["sop_instance_uid"] for row in listed["instances"]}, lesions_of(lake_config, batch)
    # An eighth of the batch shows a lesion; chance would suspect an eighth.
    assert len(odd & lesions) / len(odd) > 1 / 3, (len(odd), len(odd & lesions))
    challenger = resolve(tracking, second["trained"]["model"])
    rows = training_rows(lake, open_model(lake_config, home_directory(), challenger.ref), challenger)
    assert len(rows) == second["trained"]["num_images"]
    assert not odd & {row["sop_instance_uid"] for row in rows}
    assert status == {"promoted": 0, "refused": 3}[second["verdict"]["outcome"]], second["verdict"]
    assert second["verdict"]["outcome"] == "promoted", second["verdict"]["reason"]
    assert history(tracking, "memmc-cxr") == ["1", "3"]

    # And back.
    status, back = memmc("rollback", "memmc-cxr")
    assert (status, back["left"], back["champion"]) == (0, challenger.ref, champion.ref)
    assert history(tracking, "memmc-cxr") == ["1"]
    status, kept = memmc("decisions", "--cohort", "cxr")
    told = [(item["action"], item["outcome"], item["model"]) for item in reversed(kept["decisions"])]
    assert told == [
        ("retrain", "train", None),
        ("retrain", "trained", "memmc-cxr/1"),
        ("promote", "promoted", "memmc-cxr/1"),
        ("promote", "refused", "memmc-cxr/2"),
        ("retrain", "train", None),
        ("retrain", "trained", "memmc-cxr/3"),
        ("promote", "promoted", "memmc-cxr/3"),
        ("rollback", "rolled back", "memmc-cxr/1"),
    ]
    assert all(item["reason"] for item in kept["decisions"])
