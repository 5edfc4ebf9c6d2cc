"""What a run may start from and needs besides, and how one that failed near its end is ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from drawn_normals import normal_rows

from memmc.config import Config, ModelConfig, load_config
from memmc.errors import ConfigError, GateRefused, ModelError, PreprocessMismatch, StorageError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.pipeline.models import OpenModel, tracking_of
from memmc.pipeline.progress import Silent
from memmc.pipeline.results import CalibrationResult
from memmc.pipeline.runs import RunRecord, driving, unfinished
from memmc.pipeline.train import _plan, train
from memmc.pipeline.training_job import training_job
from memmc.registry.models import all_versions
from memmc.training.distributed import Fitted

GOLDEN = Path(__file__).parents[1] / "golden" / "model-format-1"

ROW = {"preprocess_id": "p" * 16, "height": 64, "width": 64, "channels": 1, "bits": 16}
ROWS = pa.Table.from_pylist(
    [{**ROW, "pixel_mean": 0.2, "pixel_std": 0.1}, {**ROW, "pixel_mean": 0.4, "pixel_std": 0.1}]
)


def model(config: Config, **changes: object) -> OpenModel:
    info = {
        "model_config": config.model.model_dump(mode="json"), "image_size": 64, "channels": 1,
        "pixel_mean": 0.5, "pixel_std": 0.25, "preprocess_id": "p" * 16, "cohort": "c", "dataset_version": 0,
    }  # fmt: skip
    return OpenModel("memmc-c/1", "d" * 16, Path(), {**info, **changes})


def test_statistics_are_pooled_or_those_of_the_model_started_from() -> None:
    config = load_config()
    cold = training_job(config, "c", 0, ROWS)
    assert cold.pixel_mean == pytest.approx(0.3)
    assert cold.pixel_std == pytest.approx((0.1**2 + 0.1**2) ** 0.5)
    warm = training_job(config, "c", 0, ROWS, model(config))
    assert (warm.pixel_mean, warm.pixel_std) == (0.5, 0.25)


def test_a_model_of_another_shape_or_preparation_is_refused() -> None:
    config = load_config()
    wider = load_config(overrides=["model.encoder_dim=384", "model.memory_slots=4"])
    with pytest.raises(ModelError, match=r"memmc-c/1 cannot be started from: encoder_dim is 384, needed 192"):
        training_job(config, "c", 0, ROWS, model(wider))
    with pytest.raises(ModelError, match="image_size is 128, needed 64"):
        training_job(config, "c", 0, ROWS, model(config, image_size=128))
    with pytest.raises(PreprocessMismatch, match="memmc-c/1"):
        training_job(config, "c", 0, ROWS, model(config, preprocess_id="q" * 16))


def test_a_model_made_before_a_setting_existed_is_started_from() -> None:
    info = json.loads((GOLDEN / "head" / "model.json").read_text())
    config = load_config()
    model = ModelConfig(**info["model_config"], recompute=True)
    assert {"bottleneck_slots", "recompute"} <= model.model_dump().keys() - info["model_config"].keys()
    row = {**ROW, "preprocess_id": info["preprocess_id"], "height": 32, "width": 32}
    rows = pa.Table.from_pylist([{**row, "pixel_mean": 0.2, "pixel_std": 0.1}])
    start = OpenModel("memmc-c1/1", "d" * 16, Path(), info)
    job = training_job(config.model_copy(update={"model": model}), "c1", 0, rows, start)
    assert (job.pixel_mean, job.pixel_std, job.model.recompute) == (0.5, 0.25, True)
    other = config.model_copy(update={"model": model.model_copy(update={"bottleneck_slots": 2})})
    with pytest.raises(ModelError, match="from: bottleneck_slots is 0, needed 2; set"):
        training_job(other, "c1", 0, rows, start)
    later = OpenModel(
        "memmc-c1/2", "d" * 16, Path(), {**info, "model_config": {**info["model_config"], "of_a_later_version": 1}}
    )
    with pytest.raises(ModelError, match="memmc-c1/2 cannot be started from: this version of memmc does not know"):
        training_job(other, "c1", 0, rows, later)


def resources(gpus: int) -> Any:
    """Return what is asked of ray: a cluster of 8 CPUs."""
    return SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})})


def test_images_are_kept_in_memory_up_to_the_size_that_is_set() -> None:
    job = training_job(load_config(overrides=[f"train.cache_bytes={64 * 64 * 2 * 10}"]), "c", 0, ROWS)
    assert job.keeps(10)
    assert not job.keeps(11)


def normals_lake(root: Path, held_out: int, *overrides: str) -> tuple[Config, Lake]:
    """Make a lake of 30 normals to train on and some to calibrate on."""
    config = load_config(overrides=[f"lake.uri={root / 'lake'}", *overrides])
    lake = Lake(config.lake.uri)
    lake.append(INSTANCES, pa.concat_tables([normal_rows(1, 30, "train"), normal_rows(2, held_out, "calibrate")]))
    return config, lake


def test_too_few_held_out_normals_are_refused_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, lake = normals_lake(tmp_path, 10)
    begun: list[Any] = []
    store = SimpleNamespace(replay=lambda: 0, start_run=lambda *_args, **_named: begun.append("run"))
    monkeypatch.setattr("memmc.pipeline.train.gate", lambda *_args, **_named: SimpleNamespace(flags={}))
    monkeypatch.setattr("memmc.pipeline.train.tracking_of", lambda *_args: store)
    with pytest.raises(
        GateRefused, match=r"^10 held-out normal images, at least 20 are needed; ingest more normals, or"
    ):
        train(config, "cxr")
    assert (begun, unfinished(lake.storage, "cxr")) == ([], [])
    fewer = ("calibrate.min_normals=10", "calibrate.false_positive_rate=0.1")
    config = load_config(overrides=[f"lake.uri={config.lake.uri}", *fewer])
    assert _plan(config, tmp_path, lake, "cxr")[0].rows.num_rows == 30
    stopping = load_config(overrides=[f"lake.uri={config.lake.uri}", *fewer, "score.early_stop=0.1"])
    with pytest.raises(GateRefused, match=r"at least 19 are needed; .* or set score\.early_stop=0$"):
        _plan(stopping, tmp_path, lake, "cxr")


def test_all_images_kept_back_are_counted_and_some_are_looked_at(tmp_path: Path) -> None:
    config, lake = normals_lake(tmp_path, 20, "train.validate_share=0.5")
    lake.append(INSTANCES, normal_rows(4, 300, "train"))
    plan, _ = _plan(config, tmp_path, lake, "cxr")
    assert plan.held_out.num_rows == 64
    assert plan.kept_back == 330 - plan.rows.num_rows > 64


def test_a_run_pinned_to_too_few_held_out_normals_is_left_for_another(tmp_path: Path) -> None:
    config, lake = normals_lake(tmp_path, 10, "calibrate.min_normals=10", "calibrate.false_positive_rate=0.1")
    plan, _ = _plan(config, tmp_path, lake, "cxr")
    record = RunRecord("train-cxr-1", "cxr", plan.version, plan.task)
    with pytest.raises(StorageError), driving(lake.storage, record, taking_over=False):
        raise StorageError("no answer")
    newest = lake.append(INSTANCES, normal_rows(3, 10, "calibrate"))
    plan, taking_over = _plan(config, tmp_path, lake, "cxr")
    assert (plan.version, taking_over) == (record.dataset_version, True)
    strict = [f"lake.uri={config.lake.uri}", "calibrate.false_positive_rate=0.1"]
    with pytest.raises(GateRefused, match=rf"^10 held-out .*--resume new: train-cxr-1 .* {plan.version}\), or lower"):
        _plan(load_config(overrides=strict), tmp_path, lake, "cxr")
    plan, taking_over = _plan(load_config(overrides=[*strict, "train.resume=new"]), tmp_path, lake, "cxr")
    assert (plan.version, taking_over) == (newest, False)


class Told(Silent):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_a_training_that_failed_before_its_calibration_is_ended_by_the_next_try_as_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights come back, their description counts a little more time."""
    monkeypatch.chdir(tmp_path)
    config, lake = normals_lake(tmp_path, 30)
    tries: list[str] = []

    @contextmanager
    def cluster(*_args: Any) -> Iterator[Any]:
        yield resources(0)

    def fit(
        _ray: Any, _lake: Any, _plan: Any, _job: Any, record: RunRecord, _watcher: Any, folder: str, *, use_gpu: bool
    ) -> Fitted:
        assert not use_gpu
        tries.append(record.run)
        model = Path(folder) / "model"
        model.mkdir()
        (model / "model.safetensors").write_bytes(b"weights")
        (model / "model.json").write_text(json.dumps({"preprocess_id": "p", "train_seconds": len(tries)}))
        return Fitted({"steps": 3, "loss": 0.5, "train_seconds": 1.0})

    def calibrate(_config: Any, _ray: Any, _lake: Any, model: OpenModel, cohort: str, _progress: Any) -> Any:
        if len(tries) == 1:
            raise StorageError("no answer")
        return CalibrationResult("c" * 16, model.ref, cohort, "l1", 0.05, 1.0, 30, 30)

    fakes = {
        "gate": lambda *_args, **_named: SimpleNamespace(flags={}),
        "ray_cluster": cluster,
        "_fit": fit,
        "calibrate_model": calibrate,
        "build_card": lambda *_args: {},
        "publish_card": lambda *_args: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"memmc.pipeline.train.{name}", fake)
    with pytest.raises(StorageError):
        train(config, "cxr")
    told = Told()
    done = train(config, "cxr", progress=told)
    assert tries == [done.run, done.run]
    assert any("30 normal images" in text and text.endswith("workers: 2, on CPUs") for text in told.messages)
    tracking = tracking_of(config, tmp_path / ".memmc")
    (version,) = all_versions(tracking)
    assert (done.model, done.model_digest) == (version.ref, version.digest) == ("memmc-cxr/1", version.digest)
    assert tracking.client.get_run(str(version.run_id)).info.status == "FINISHED"
    assert unfinished(lake.storage, "cxr") == []


def test_selection_and_patience_need_figures() -> None:
    for setting in ("train.select=val_error", "train.patience=3"):
        with pytest.raises(ConfigError, match="validate_share"):
            load_config(overrides=[setting])
    with pytest.raises(ConfigError, match=r"train\.select"):
        load_config(overrides=["train.patience=3", "train.validate_share=0.1"])
    with pytest.raises(ConfigError, match="min_workers"):
        load_config(overrides=["train.min_workers=3"])
    assert load_config(overrides=["train.min_workers=1"]).train.num_workers == 2
