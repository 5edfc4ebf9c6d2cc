"""Numbers from earlier versions: the loss curve of seeded runs, and models exported before."""

from __future__ import annotations

import json

import pytest
import torch
from golden_run import FILE, STEPS, VARIANTS, loss_curve

from memmc.model.artifact import load_model

TOLERANCE = 2e-4
"""Relative. One or two threads, or torch compiled for another processor, differ by about 1e-6 after 30 steps."""


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loss_curve_is_the_recorded_one(variant: str) -> None:
    recorded = json.loads(FILE.read_text())[variant]
    assert len(recorded) == STEPS
    assert recorded[-1] < 0.9 * recorded[0], "a run that does not learn shows nothing"
    assert loss_curve(**VARIANTS[variant]) == pytest.approx(recorded, rel=TOLERANCE)


def test_the_curve_notices_a_small_change() -> None:
    """Control: one slot more in every memory is seen."""
    recorded = json.loads(FILE.read_text())["head"]
    assert loss_curve(gate="head", memory_slots=9) != pytest.approx(recorded, rel=TOLERANCE)


@pytest.mark.parametrize("gate", ["channel", "head", "scalar"])
def test_a_model_exported_before_predicts_what_it_did(gate: str) -> None:
    folder = FILE.parent / "model-format-1"
    recorded = json.loads((folder / f"{gate}.json").read_text())
    model = load_model(folder / gate).model
    images = torch.linspace(-1, 1, 32 * 32).sin().mul(3).view(1, 1, 32, 32)
    output = model(images, torch.tensor([[0, 5, 9, 14]]))
    assert output.loss.item() == pytest.approx(recorded["loss"], rel=1e-5)
    assert output.pred_BLP[0, 3, :8].tolist() == pytest.approx(recorded["pred_patch_3"], abs=1e-5)
