"""Which trials a sweep has, what it refuses, and how it ranks them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from memmc.cli.sweep import summary
from memmc.config import load_config
from memmc.errors import ConfigError, UsageError
from memmc.pipeline.sweep import SweepResult, Trial, _rank, _recorder, combinations, trial_config

PARAMS = ("model.patch_size=8,16", "train.base_lr=0.001, 0.01 ,0.1")


def test_every_combination_or_a_seeded_draw_without_repeats() -> None:
    every = combinations(PARAMS, None, 0)
    assert len(every) == 6
    assert {"model.patch_size": "16", "train.base_lr": "0.01"} in every
    drawn = combinations(PARAMS, 4, 0)
    assert drawn == combinations(PARAMS, 4, 0) != combinations(PARAMS, 4, 1)
    assert len({tuple(settings.items()) for settings in drawn}) == 4
    assert combinations(PARAMS, 99, 0) == every


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ((), UsageError, "nothing to vary"),
        (("model.patch_size",), UsageError, "expected section.key"),
        (("model.patch_size=8", "model.patch_size=16"), UsageError, "once for each key"),
        (("data.image_size=64,128",), UsageError, "not the preset or the data"),
        (("train.preset=tiny,small",), UsageError, "not the preset or the data"),
        (("train.base_rate=0.1",), ConfigError, "train.base_lr"),
        (("train.batch_size=8,none",), ConfigError, "train.batch_size"),
    ],
)
def test_what_cannot_be_varied_is_said_before_anything_starts(params, error, text) -> None:
    with pytest.raises(error, match=text):
        combinations(params, None, 0)


def test_a_trial_has_its_settings_and_time_and_keeps_normals_back() -> None:
    config = load_config(overrides=["train.seed=7", "model.memory_slots=3"])
    trial = trial_config(config, {"model.patch_size": "16", "train.base_lr": "0.5"}, 2.5)
    assert (trial.model.patch_size, trial.train.base_lr, trial.train.max_minutes) == (16, 0.5, 2.5)
    assert (trial.train.seed, trial.model.memory_slots, trial.train.validate_share) == (7, 3, 0.1)
    kept = load_config(overrides=["train.validate_share=0.3"])
    assert trial_config(kept, {"train.base_lr": "0.5"}, 1.0).train.validate_share == 0.3
    with pytest.raises(ConfigError, match=r"trial train\.num_workers=1"):
        trial_config(load_config(overrides=["train.min_workers=2"]), {"train.num_workers": "1"}, 1.0)


def test_the_recorder_travels_without_what_it_writes_to() -> None:
    """Tune pickles its callbacks; a lock stands for the tracking store's connections."""
    import ray.cloudpickle

    locked: Any = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        ray.cloudpickle.dumps(locked)
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(_recorder(locked, [], locked, 1)))


def test_trials_are_ranked_by_the_figure_and_failures_come_last() -> None:
    good = Trial({"train.base_lr": "0.1"}, "a", 0.9, 0.30, 0.4, 50)
    other = Trial({"train.base_lr": "0.2"}, "b", 0.8, 0.20, 0.3, 60)
    failed = Trial({"train.base_lr": "9"}, "c", None, None, None, 3, "TrainingError")
    assert sorted([failed, other, good], key=lambda t: _rank(t, "probe_auroc")) == [good, other, failed]
    assert sorted([failed, good, other], key=lambda t: _rank(t, "val_error")) == [other, good, failed]
    text = summary(SweepResult("s", "cxr", "probe_auroc", [good, other, failed])).splitlines()
    assert "0.900" in text[1]
    assert "failed" in text[3]
    assert "TrainingError" in text[3]
    assert text[-1] == "memmc train --cohort cxr --set train.base_lr=0.1"
