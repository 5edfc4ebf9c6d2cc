"""A real sweep of two trials: ranked, each a child run with its own figures."""

from __future__ import annotations

import pytest

from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import tracking_of
from memmc.pipeline.sweep import sweep

pytestmark = pytest.mark.slow


def test_two_trials_are_ranked_and_tracked(inside):
    config = inside.config.model_copy(
        update={"train": inside.config.train.model_copy(update={"max_steps": 16, "validate_share": 0.2})}
    )
    result = sweep(config, "cxr", ["train.base_lr=0.016,0.000001"], minutes=1.0, by="val_error")
    best, worst = result.trials
    assert best.settings == {"train.base_lr": "0.016"}
    assert best.val_error < worst.val_error
    assert best.steps == worst.steps == 16
    client = tracking_of(config, home_directory()).client
    runs = [client.get_run(trial.run) for trial in result.trials]
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    assert client.get_run(parent).info.run_name == result.sweep
    assert [run.data.metrics["val_error"] for run in runs] == pytest.approx([best.val_error, worst.val_error])
    assert runs[0].data.params["train.base_lr"] == "0.016"
