"""What is lost in AUROC with memory or levels shut off, and what a report says of models without one of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import judged_lake
import numpy as np
import pytest
import scored_model
import torch

from memmc.config import Config, ScoreConfig
from memmc.evaluation.report_data import Ablation, MemoryHealth
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.model.artifact import LoadedModel
from memmc.model.mae import MemMCMAE
from memmc.pipeline.memory_health import Sample, ablate, memory_health, sample

SCORE = ScoreConfig(components=4, grid=2)
NUM = 24


def loud(**fields: object) -> LoadedModel:
    """A model whose random memory and level gates weigh as much as its tokens."""
    loaded = scored_model.model(**fields)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.rpartition(".")[2] in {"memory_key", "memory_value"}:
                parameter *= 20.0
    return loaded


def measured(loaded: LoadedModel) -> Ablation:
    pixels = scored_model.pixels(4 * NUM).astype(np.float32) / 65535
    abnormal = np.arange(2 * NUM) % 2 == 1
    test = pixels[2 * NUM :]
    test[abnormal, 8:20, 8:20] *= 0.9
    uids = scored_model.uids(4 * NUM)
    return ablate(
        loaded,
        SCORE,
        Sample(uids[: 2 * NUM], pixels[: 2 * NUM]),
        Sample(uids[2 * NUM :], test),
        abnormal,
        uids[2 * NUM :],
        resamplings=50,
        confidence=0.95,
        seed=0,
    )


def test_without_memory_is_the_model_that_has_none() -> None:
    whole = loud()
    plain = MemMCMAE(whole.config.model_copy(update={"memory_slots": 0}), 32).eval()
    plain.load_state_dict({k: v for k, v in whole.model.state_dict().items() if "memory_" not in k})
    found = measured(whole)
    none = measured(dataclasses.replace(whole, model=plain, config=plain.config))
    assert found.without_memory is not None
    assert found.without_memory.auroc == none.auroc
    assert found.without_memory.loss == found.auroc - none.auroc
    assert (
        found.without_memory.loss_interval.low <= found.without_memory.loss <= found.without_memory.loss_interval.high
    )
    assert found.auroc != none.auroc  # else the memory is not heard at all
    assert none.without_memory is None
    assert none.last_level_only is not None


def test_the_model_is_afterwards_what_it_was() -> None:
    loaded = loud()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    first = measured(loaded)
    assert measured(loaded) == first
    assert (first.num_normal, first.num_abnormal) == (NUM, NUM)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_a_single_level_cannot_be_shut_off() -> None:
    assert measured(loud(levels="last")).last_level_only is None


def test_the_sample_is_the_same_whatever_the_order_and_empty_without_both_labels() -> None:
    rows = [{"sop_instance_uid": f"{n:03d}", "label": "abnormal" if n % 3 else "normal"} for n in range(30)]
    chosen = sample(rows, 4)
    assert [row["sop_instance_uid"] for row in chosen] == ["000", "003", "006", "009", "001", "002", "004", "005"]
    assert sample(rows[::-1], 4) == chosen
    assert sample([row for row in rows if row["label"] == "normal"], 4) == []
    assert sample(rows, 0) == []


@pytest.fixture(scope="module")
def lake_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return judged_lake.stored(tmp_path_factory.mktemp("lake"))


def health_of(config: Config, folder: Path, **fields: Any) -> MemoryHealth | None:
    """What is measured of a model where nothing is labelled abnormal."""
    return memory_health(config, Lake(config.lake.uri), judged_lake.opened(config, folder, **fields), "cxr", ())


def test_levels_are_measured_without_a_memory(tmp_path: Path) -> None:
    settings = ("score.scorer=l1", "evaluate.bootstrap=50", "evaluate.ablation_images=8")
    config, model = judged_lake.judged(tmp_path, *settings, memory_slots=0)
    lake = Lake(config.lake.uri)
    where = {"cohort": "cxr", "outcome": "stored", "split": "test"}
    rows = lake.read(INSTANCES, ["sop_instance_uid", "patient_key"], filter=where).to_pylist()
    labelled = [{**row, "label": "abnormal" if number % 2 else "normal"} for number, row in enumerate(rows)]
    found = memory_health(config, lake, model, "cxr", labelled)
    assert found is not None
    assert (found.layers, found.error_without_memory, found.bottleneck_slots) == ((), None, 0)
    assert len(found.gates) == 2
    assert found.error is not None and found.error > 0
    assert found.error_last_level_only is not None
    assert found.error_last_level_only != found.error
    assert found.ablation is not None
    assert found.ablation.without_memory is None
    assert found.ablation.last_level_only is not None


def test_a_memory_is_measured_without_further_levels(lake_config: Config, tmp_path: Path) -> None:
    found = health_of(lake_config, tmp_path / "m", levels="last")
    assert found is not None
    assert (len(found.layers), found.gates, found.error_last_level_only) == (2, (), None)
    assert found.error_without_memory is not None
    whole = health_of(lake_config, tmp_path / "w")
    assert whole is not None
    assert (len(whole.layers), len(whole.gates)) == (2, 2)
    assert None not in (whole.error, whole.error_without_memory, whole.error_last_level_only)


@pytest.mark.parametrize("fields", [{"levels": "last"}, {"cross_attention": False}])
def test_nothing_is_measured_with_neither_but_another_memory_is_named(
    lake_config: Config, tmp_path: Path, fields: dict[str, Any]
) -> None:
    assert health_of(lake_config, tmp_path / "m", memory_slots=0, **fields) is None
    named = health_of(lake_config, tmp_path / "b", memory_slots=0, bottleneck_slots=6, **fields)
    assert named == MemoryHealth((), bottleneck_slots=6)
