"""What trains and scores: a GPU for each worker and actor where the cluster has any, else CPUs."""

from __future__ import annotations

from typing import Any

from memmc.config import ScoreConfig, TrainConfig
from memmc.errors import UsageError


def on_gpus(ray: Any, train: TrainConfig) -> bool:
    """Return whether training is on GPUs: as `train.use_gpu` says, else wherever there are any."""
    return _gpus(ray) > 0 if train.use_gpu is None else train.use_gpu


def place_training(ray: Any, train: TrainConfig) -> tuple[TrainConfig, bool, str]:
    """Return the settings of a training, whether it is on GPUs, and both in words.

    Where `train.use_gpu` is not set there are no more workers than GPUs: workers on CPUs beside an idle GPU would learn
    much less in the same time.

    Raises:
        UsageError: there are fewer GPUs than `train.min_workers`.
    """
    use_gpu, gpus, workers = on_gpus(ray, train), _gpus(ray), train.num_workers
    if train.use_gpu is None and use_gpu and gpus < workers:
        if train.min_workers is None:
            words = f"workers: {gpus}, each on a GPU (train.num_workers is {workers}, the cluster has {gpus} GPUs)"
            return train.model_copy(update={"num_workers": gpus}), True, words
        if gpus < train.min_workers:
            raise UsageError(
                f"each of train.min_workers={train.min_workers} workers takes a GPU, the cluster has {gpus}; "
                f"set train.min_workers={gpus}, or train.use_gpu=false to train on CPUs"
            )
    return train, use_gpu, f"workers: {workers}, on {'GPUs' if use_gpu else 'CPUs'}"


def place_scoring(ray: Any, score: ScoreConfig) -> tuple[ScoreConfig, bool]:
    """Return the settings of scoring and whether it is on GPUs: where there are any, with an actor on each at most."""
    gpus = _gpus(ray)
    return score.model_copy(update={"num_actors": min(score.num_actors, gpus)}) if gpus else score, gpus > 0


def _gpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("GPU", 0))
