"""The gates as measured on a lake: what a model of the paper's score can and cannot be asked."""

from __future__ import annotations

import judged_lake

from memmc.config import PromoteConfig, ScoreConfig
from memmc.evaluation.gates import Gate
from memmc.lake.tables import Lake
from memmc.model.artifact import load_model
from memmc.pipeline import challenge, probing
from memmc.pipeline.challenge import Case, measure
from memmc.pipeline.progress import Silent
from memmc.pipeline.promote import verdict
from memmc.pipeline.select import one_a_patient
from memmc.scoring.scorer import make_scorer
from memmc.scoring.strata import Judge


def test_a_score_without_an_exportable_form_is_not_asked_for_parity_and_the_verdict_says_why(tmp_path, monkeypatch):
    config, model = judged_lake.judged(tmp_path, "score.scorer=pasted_ms_ssim", "score.passes=10")
    monkeypatch.setattr(
        challenge, "score_all", lambda *_given, **_named: None
    )  # all is scored; it would start a cluster
    found = {gate.name: gate for gate in measure(config, Lake(config.lake.uri), Case("cxr", model, None), Silent())}
    parity = found["export parity"]
    assert (parity.verdict, parity.measured) == ("not applicable", None)
    assert "pasted_ms_ssim has no exportable form" in parity.why
    assert "torch" in parity.why
    asked = {"planted lesions", "false positives", "learned", "memory"}
    assert all(found[name].verdict in ("pass", "fail") for name in asked)

    # It neither passes nor holds up: what says that the model finds something still decides.
    finds = Gate("planted lesions", 0.9, 0.1, "pass", "90% found")
    assert verdict(PromoteConfig(), [finds, parity], None) == ("promoted", "passes planted lesions")
    assert verdict(PromoteConfig(), [parity], None)[0] == "refused"


def test_images_of_one_patient_are_one_draw():
    rows = [{"sop_instance_uid": uid, "patient_key": key} for uid, key in (("1", "p"), ("2", "p"), ("3", None))]
    assert [row["sop_instance_uid"] for row in one_a_patient(rows)] == ["1", "3"]


def test_a_calibration_that_ends_passes_early_is_not_asked_for_parity_either(tmp_path):
    config = judged_lake.stored(tmp_path)
    model, scorer = judged_lake.opened(config, tmp_path / "model"), make_scorer(ScoreConfig(scorer="l1"))
    calibration = {"early_stop": {"stages": []}}
    judged = probing.Judged(model, load_model(model.folder), calibration, scorer, Judge(0.1, (), {}), 4)
    gate = challenge._parity(config, Lake(config.lake.uri), Case("cxr", model, None), judged, [], Silent())
    assert gate.verdict == "not applicable"
    assert "score.early_stop" in gate.why
