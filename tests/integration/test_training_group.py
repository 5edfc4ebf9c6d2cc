"""Two workers on gloo: sharded training is plain training, and a checkpoint of one is a checkpoint of the other."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from memmc.config import ModelConfig, TrainConfig
from memmc.errors import TrainingError
from memmc.model.mae import MemMCMAE
from memmc.training.feed import Batch
from memmc.training.loop import train
from memmc.training.order import Position

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    encoder_dim=32, encoder_depth=2, encoder_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2, memory_slots=4
)
CONFIG = TrainConfig(max_steps=12, max_minutes=60.0, batch_size=4, base_lr=0.1, warmup=0.2, ema_decay=0.9, seed=3)
IMAGES = np.random.default_rng(0).integers(0, 65_535, (32, 32, 32, 1), np.uint16)


class Rounds:
    """Batches of `IMAGES` that go to the workers in turn."""

    num_images = len(IMAGES)

    def __init__(self, rank: int, poisoned: int | None = None) -> None:
        self.rank, self.poisoned = rank, poisoned

    def __call__(self, position: Position) -> Iterator[Batch]:
        start = position.images + self.rank * CONFIG.batch_size
        while True:
            rows = np.arange(start, start + CONFIG.batch_size) % len(IMAGES)
            yield Batch(IMAGES[rows], [f"2.25.{row}" for row in rows])
            start += position.cuts[-1][1] * CONFIG.batch_size


def _run(rank: int, port: int, out: Path, change: dict, resume: str | None, poison: bool) -> None:
    import torch.distributed as dist

    from memmc.training.peers import Group

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config = CONFIG.model_copy(update=change)
    torch.manual_seed(0)
    model = MemMCMAE(MODEL, 32)

    def keep(save: Callable[[Path], None], metrics: dict) -> None:
        if rank == 0:
            save(out / f"{metrics['step']}")

    def spoil(_: dict) -> None:
        if poison and rank == 1:
            with torch.no_grad():
                model.decoder.head.bias[0] = float("nan")

    try:
        outcome = train(
            model, Rounds(rank), config, bits=16, pixel_mean=0.5, pixel_std=0.3, rank=rank, world_size=2,
            sync=Group(torch.device("cpu"), config.strategy), on_checkpoint=keep, on_log=spoil,
            resume_from=out / resume if resume else None,
        )  # fmt: skip
        if rank == 0:
            torch.save((outcome.steps, outcome.loss, outcome.ema_model.state_dict()), out / "outcome.pt")
    except TrainingError as error:
        (out / f"error{rank}").write_text(str(error))
    dist.destroy_process_group()


def together(out: Path, resume: str | None = None, *, poison: bool = False, **change: object) -> tuple | None:
    out.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_run, args=(rank, port, out, change, resume, poison), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    return torch.load(out / "outcome.pt", weights_only=True) if (out / "outcome.pt").exists() else None


def close(one: dict, other: dict) -> bool:
    """Compare weights, biases of keys left out: they change no softmax, and Adam moves them by what rounding leaves."""
    names = [name for name in one if not name.endswith("key_value.bias")]
    assert len(names) > 40
    return all(torch.allclose(one[name], other[name], atol=1e-4) for name in names)


def test_sharded_training_is_plain_training_and_its_checkpoints_are_whole(tmp_path: Path) -> None:
    frequent = {"checkpoint_seconds": 1e-9}
    plain = together(tmp_path / "ddp", **frequent)
    sharded = together(tmp_path / "fsdp", strategy="fsdp", **frequent)
    assert plain[0] == sharded[0] == 12
    assert plain[1] == pytest.approx(sharded[1], rel=1e-4)
    assert close(plain[2], sharded[2])
    shapes = {name: value.shape for name, value in MemMCMAE(MODEL, 32).state_dict().items()}
    assert {name: value.shape for name, value in sharded[2].items()} == shapes
    (tmp_path / "ddp" / "8").rename(tmp_path / "fsdp" / "plain8")
    crossed = together(tmp_path / "fsdp", resume="plain8", strategy="fsdp")
    assert close(plain[2], crossed[2]), "a sharded run cannot go on from a plain one's checkpoint"


def test_all_workers_name_the_batch_of_the_one_whose_loss_broke(tmp_path: Path) -> None:
    assert together(tmp_path, poison=True) is None
    texts = [(tmp_path / f"error{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "step 8 (epoch 2): gradient norm nan; rank 1, loss nan: 2.25.4, 2.25.5, 2.25.6, 2.25.7." in texts[0]
    assert os.linesep not in texts[0]
