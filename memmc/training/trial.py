"""One trial of a sweep: the training loop with one worker, judged on held-out normals."""

from __future__ import annotations

from typing import Any

from memmc.training.distributed import TrainingJob
from memmc.training.source import ShardSource

NUMBER = "number"


def run_trial(
    space: dict[str, Any],
    jobs: list[TrainingJob],
    source: ShardSource,
    look_at: Any,
    threads: int,
    use_gpu: bool = False,
    weights: bytes | None = None,
) -> None:
    """Train job `space["number"]` and report every look to Ray Tune.

    Args:
        jobs: all trials, each with `train.validate_share` above 0.
        source: the training images.
        look_at: pixels_VHWC of the held-out normals.
        threads: cores of this trial.
        use_gpu: compute on the GPU that the trial holds; one that is there and not the trial's is left alone.
        weights: of a model to start from, as safetensors; random ones when absent.
    """
    import torch
    from ray import tune
    from safetensors.torch import load

    from memmc.model.mae import MemMCMAE
    from memmc.training.augment import standardise
    from memmc.training.looks import HeldOut
    from memmc.training.loop import train
    from memmc.training.peers import Alone

    job = jobs[space[NUMBER]]
    torch.set_num_threads(threads)
    torch.manual_seed(job.train.seed)
    device = torch.device("cuda" if use_gpu else "cpu")
    model = MemMCMAE(job.model, job.image_size, job.channels)
    if weights is not None:
        model.load_state_dict(load(weights))
    pixels = {"bits": job.bits, "pixel_mean": job.pixel_mean, "pixel_std": job.pixel_std}
    held_out = HeldOut(standardise(look_at, **pixels, device=torch.device("cpu")), model, Alone(), 0, 1)

    def on_log(metrics: dict[str, Any]) -> None:
        if "probe_auroc" in metrics:
            tune.report(metrics)

    train(model, source.feed(job.train, 0), job.train, **pixels, device=device, on_look=held_out, on_log=on_log)
