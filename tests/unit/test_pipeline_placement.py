"""GPUs are taken where there are any, and no more workers or actors are started than there are GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memmc.config import load_config
from memmc.errors import UsageError
from memmc.pipeline.placement import on_gpus, place_scoring, place_training


def cluster(gpus: int) -> Any:
    """Return what is asked of ray: a cluster of 8 CPUs."""
    return SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})})


@pytest.mark.parametrize(
    ("gpus", "overrides", "workers", "use_gpu"),
    [
        (0, (), 2, False),
        (1, (), 1, True),
        (2, (), 2, True),
        (3, (), 2, True),
        (1, ("train.use_gpu=false",), 2, False),
        (0, ("train.use_gpu=true",), 2, True),
        (1, ("train.use_gpu=true",), 2, True),
        (1, ("train.min_workers=1",), 2, True),  # the others join when there are more
    ],
)
def test_each_worker_takes_a_gpu_where_there_are_any(
    gpus: int, overrides: tuple[str, ...], workers: int, use_gpu: bool
) -> None:
    settings = load_config(overrides=overrides).train
    placed, on_gpu, words = place_training(cluster(gpus), settings)
    assert (placed.num_workers, on_gpu) == (workers, use_gpu)
    assert placed == settings.model_copy(update={"num_workers": workers})
    assert words.startswith(f"workers: {workers}, ") and ("GPU" in words) is use_gpu
    assert ("train.num_workers is 2" in words) is (workers < 2)
    assert on_gpus(cluster(gpus), settings) is use_gpu


def test_fewer_gpus_than_the_least_number_of_workers_are_refused() -> None:
    elastic = load_config(overrides=["train.num_workers=4", "train.min_workers=3"]).train
    with pytest.raises(UsageError, match=r"set train\.min_workers=2, or train\.use_gpu=false"):
        place_training(cluster(2), elastic)


@pytest.mark.parametrize(("gpus", "actors", "use_gpu"), [(0, 2, False), (1, 1, True), (2, 2, True), (8, 2, True)])
def test_there_are_no_more_actors_than_gpus(gpus: int, actors: int, use_gpu: bool) -> None:
    score = load_config(overrides=["score.num_actors=2", "score.passes=8"]).score
    found, on_gpu = place_scoring(cluster(gpus), score)
    assert (found.num_actors, found.passes, on_gpu) == (actors, 8, use_gpu)
