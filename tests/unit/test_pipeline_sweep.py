"""Which trials a sweep has, what it refuses, and how it ranks them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn_normals import normal_rows
from safetensors.torch import save

from memmc.cli.sweep import summary
from memmc.config import ModelConfig, load_config
from memmc.errors import ConfigError, ModelError, UsageError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.model.mae import MemMCMAE
from memmc.pipeline.models import OpenModel
from memmc.pipeline.sweep import (
    SweepResult,
    Trial,
    _at_once,
    _chosen_look,
    _rank,
    _recorder,
    _tune,
    combinations,
    sweep,
    trial_config,
)
from memmc.training import loop
from memmc.training.distributed import TrainingJob
from memmc.training.trial import run_trial

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
        (("train.validate_share=0.1,0.2",), UsageError, "all trials share it; give one value with --set"),
        (("train.warm_start=memmc-cxr/1,memmc-cxr/2",), UsageError, "all trials share it"),
        (("train.use_gpu=true,false",), UsageError, "all trials share it"),
        (("train.cache_bytes=0,1",), UsageError, "all trials share it"),
        (("train.num_workers=1,2",), UsageError, "one worker and no checkpoints, so it would change nothing"),
        (("train.checkpoint_seconds=1,2",), UsageError, "would change nothing"),
        (("train.base_rate=0.1",), ConfigError, "train.base_lr"),
        (("train.batch_size=8,none",), ConfigError, "train.batch_size"),
        (("train.patience=0",), ConfigError, "train.patience"),
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


def test_the_selection_and_its_patience_can_be_varied() -> None:
    params = ("train.select=val_error,probe_auroc", "train.patience=none,4")
    configs = [trial_config(load_config(), settings, 1.0) for settings in combinations(params, None, 0)]
    assert {(one.train.select, one.train.patience) for one in configs} == {
        (select, patience) for select in ("val_error", "probe_auroc") for patience in (None, 4)
    }
    assert len(combinations(("train.select=last,val_error",), None, 0)) == 2
    with pytest.raises(ConfigError, match=r"trial train\.patience=4.*train\.select"):
        trial_config(load_config(), {"train.patience": "4"}, 1.0)


def test_a_trial_counts_with_the_look_that_its_selection_would_register() -> None:
    looks = [
        {"step": step, "val_error": error, "probe_auroc": auroc}
        for step, error, auroc in ((1, 0.3, 0.7), (2, 0.2, 0.6), (3, 0.2, 0.9), (4, 0.4, 0.8))
    ]
    assert [_chosen_look(looks, select)["step"] for select in ("last", "val_error", "probe_auroc")] == [4, 2, 3]


def test_the_recorder_travels_without_what_it_writes_to() -> None:
    """Tune pickles its callbacks; a lock stands for the tracking store's connections."""
    import ray.cloudpickle

    locked: Any = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        ray.cloudpickle.dumps(locked)
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(_recorder(locked, locked, 1)))


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


def test_as_many_trials_run_at_once_as_there_are_gpus_where_they_use_them() -> None:
    config = load_config(overrides=["ray.address=auto"])  # all CPUs of a cluster, however many cores are here
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0})
    assert _at_once(config, ray, 20, use_gpu=False) == 8
    assert _at_once(config, ray, 20, use_gpu=True) == 2
    assert _at_once(config, ray, 1, use_gpu=True) == 1


@pytest.mark.parametrize(("use_gpu", "asked"), [(False, {"cpu": 1}), (True, {"cpu": 1, "gpu": 1})])
def test_a_trial_asks_the_cluster_for_what_it_computes_on(
    use_gpu: bool, asked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    found: dict[str, Any] = {}

    class Tuner:
        def __init__(self, trainable: Any, **options: Any) -> None:
            found.update(options)

        def fit(self) -> list[Any]:
            return []

    monkeypatch.setattr(tune, "with_parameters", lambda trainable, **given: found.update(given=given))
    monkeypatch.setattr(tune, "with_resources", lambda trainable, resources: found.update(resources=resources))
    monkeypatch.setattr(tune, "RunConfig", lambda **_options: None)
    monkeypatch.setattr(tune, "Tuner", Tuner)
    given = {"jobs": ["one", "two"], "use_gpu": use_gpu}
    assert _tune(given, 2, "sweep-1", (None, "sweeps"), None) == {}
    assert (found["resources"], found["given"]) == (asked, given)
    assert found["tune_config"].max_concurrent_trials == 2


def test_a_trial_begins_with_the_weights_it_is_given_on_the_device_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelConfig(
        encoder_dim=16, encoder_depth=2, encoder_heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2,
        memory_slots=3,
    )  # fmt: skip
    job = TrainingJob(small, load_config(overrides=["train.validate_share=0.1"]).train, 32, 1, 16, 0.4, 0.2)
    torch.manual_seed(5)
    start = MemMCMAE(small, 32).state_dict()
    begun: list[tuple[dict[str, torch.Tensor], torch.device]] = []
    monkeypatch.setattr(
        loop, "train", lambda model, *_args, device, **_named: begun.append((model.state_dict(), device))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that another trial holds
    source = SimpleNamespace(feed=lambda config, rank: None)
    look_at = np.zeros((8, 32, 32, 1), np.uint16)
    weights = save({name: value.contiguous() for name, value in start.items()})
    run_trial({"number": 0}, [job], source, look_at, threads=1, use_gpu=False, weights=weights)
    run_trial({"number": 0}, [job], source, look_at, threads=1, use_gpu=True)
    (warm, here), (cold, there) = begun
    assert (here.type, there.type) == ("cpu", "cuda")
    assert all(torch.equal(value, start[name]) for name, value in warm.items())
    assert any(not torch.equal(value, start[name]) for name, value in cold.items())


def test_a_sweep_starts_from_a_model_streams_what_is_too_large_and_takes_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"lake.uri={tmp_path / 'lake'}", "train.warm_start=memmc-cxr/1", "train.cache_bytes=1000"]
    config = load_config(overrides=settings)
    Lake(config.lake.uri).append(INSTANCES, normal_rows(1, 300, "train"))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    info = {"model_config": config.model.model_dump(mode="json"), "image_size": 32, "channels": 1}
    info |= {"pixel_mean": 0.4, "pixel_std": 0.1, "preprocess_id": "p"}
    start = OpenModel("memmc-cxr/1", "d" * 16, tmp_path, info)
    opened: list[bool] = []
    told: dict[str, Any] = {}
    looks: list[list[dict[str, float]]] = []
    ended: list[tuple[str, str]] = []
    refused: list[Exception] = []

    @contextmanager
    def cluster(*_args: Any) -> Iterator[Any]:
        for error in refused:
            raise error
        yield SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})

    def open_source(*_args: Any, cached: bool) -> Any:
        opened.append(cached)
        return SimpleNamespace(tables=list)

    def tune(
        given: dict[str, Any], at_once: int, _name: str, _storage: Any, recorder: Any
    ) -> dict[int, dict[str, Any]]:
        told.update(given, at_once=at_once)
        for number in range(len(looks)):
            trial = SimpleNamespace(config={"number": number})
            for look in looks[number]:
                recorder.on_trial_result(0, [], trial, look)
            recorder.on_trial_complete(0, [], trial)
        return {n: {"probe_auroc": 0.5 + n / 10, "val_error": 0.1, "loss": 0.1, "step": 3} for n in range(2)}

    store = SimpleNamespace(
        start_run=lambda _experiment, name, **_named: name.rpartition("-")[2],
        end_run=lambda run, status: ended.append((run, status)),
        log_metrics=lambda *_args: None,
    )
    fakes = {
        "open_model": lambda *_args: start,
        "tracking_of": lambda *_args: store,
        "ray_cluster": cluster,
        "ShardSource": SimpleNamespace(open=open_source),
        "CachedFeed": lambda *_args: SimpleNamespace(images_NHWC="pixels"),
        "_tune": tune,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"memmc.pipeline.sweep.{name}", fake)
    result = sweep(config, "cxr", ["train.base_lr=0.1,0.2"], minutes=1.0)
    assert [trial.settings["train.base_lr"] for trial in result.trials] == ["0.2", "0.1"]
    assert (told["weights"], told["use_gpu"], told["at_once"]) == (b"weights", True, 1)
    assert [(job.pixel_mean, job.train.base_lr) for job in told["jobs"]] == [(0.4, 0.1), (0.4, 0.2)]
    assert opened == [False, True], "the training images are streamed, those to look at are not"
    with pytest.raises(ModelError, match="memory_slots is 16, needed 4"):
        sweep(config, "cxr", ["model.memory_slots=16,4"], minutes=1.0)
    assert sweep(load_config(overrides=[*settings[:1], "train.use_gpu=false"]), "cxr", ["train.base_lr=0.1,0.2"]).trials
    assert (told["weights"], told["use_gpu"], opened[2:]) == (None, False, [True, True])

    # The first trial was best half way, and would register that look; the other would register its last.
    looks += [
        [
            {"step": 1, "probe_auroc": 0.9, "val_error": 0.1, "loss": 0.1},
            {"step": 2, "probe_auroc": 0.5, "val_error": 1},
        ],
        [
            {"step": 1, "probe_auroc": 0.6, "val_error": 0.1, "loss": 0.1},
            {"step": 2, "probe_auroc": 0.7, "val_error": 1},
        ],
    ]
    selecting = load_config(overrides=[settings[0], "train.validate_share=0.1", "train.use_gpu=false"])
    ended.clear()
    ranked = sweep(selecting, "cxr", ["train.select=probe_auroc,last"], minutes=1.0).trials
    assert [(trial.settings["train.select"], trial.probe_auroc, trial.steps) for trial in ranked] == [
        ("probe_auroc", 0.9, 1),
        ("last", 0.7, 2),
    ]
    assert [status for _, status in ended] == ["FINISHED"] * 3

    # A cluster that cannot be had leaves no trial running.
    ended.clear()
    refused.append(UsageError("too few CPUs"))
    with pytest.raises(UsageError, match="too few CPUs"):
        sweep(selecting, "cxr", ["train.select=probe_auroc,last"], minutes=1.0)
    assert [run for run, _ in ended[:2]] == ["0", "1"]
    assert [status for _, status in ended] == ["FAILED"] * 3
