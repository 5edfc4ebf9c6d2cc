"""The loop: it learns, repeats itself bit by bit, resumes, and stops for the right reasons."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from memmc.config import ModelConfig, TrainConfig
from memmc.errors import DivergedError, TrainingError
from memmc.model.mae import MAEOutput, MemMCMAE
from memmc.training import loop, pace
from memmc.training.checkpoint import RunState
from memmc.training.feed import Batch, Feed
from memmc.training.loop import TrainOutcome, step_seed, train
from memmc.training.order import Position
from memmc.training.peers import Alone

MODEL = ModelConfig(
    encoder_dim=32, encoder_depth=2, encoder_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2, memory_slots=4,
    gate="channel",
)  # fmt: skip
CONFIG = TrainConfig(max_steps=20, max_minutes=60.0, batch_size=16, base_lr=0.1, warmup=0.2, ema_decay=0.9, seed=3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(number: int = 64, seed: int = 0) -> np.ndarray:
    """Smooth 16-bit images: one bright blob each, so that hidden patches follow from visible ones."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:32, 0:32] / 32.0
    centre = rng.uniform(0.3, 0.7, (number, 2, 1, 1))
    width = rng.uniform(0.2, 0.4, (number, 1, 1))
    image = np.exp(-((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2) / width**2)
    return (image * 65_535).astype(np.uint16)[..., None]


IMAGES = blobs()
GOLDEN_FIRST, GOLDEN_LAST = 1.5044, 0.8503
"""Loss on all images under one mask, before the first and after the twentieth step."""

STATS = {"bits": 16, "pixel_mean": 0.45, "pixel_std": 0.3}


class Images:
    """Batches of `IMAGES`, epoch by epoch."""

    num_images = len(IMAGES)

    def __call__(self, position: Position) -> Iterator[Batch]:
        start = position.images
        while True:
            order = np.random.default_rng(start // len(IMAGES)).permutation(len(IMAGES))
            rows = order[start % len(IMAGES) :][:16]
            yield Batch(IMAGES[rows], [f"2.25.{row}" for row in rows])
            start += 16


class Given(Images):
    """The given batches."""

    def __init__(self, *pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __call__(self, position: Position) -> Iterator[Batch]:
        return (Batch(pixels) for pixels in self.pixels)


def run(config: TrainConfig = CONFIG, source: Feed | None = None, **options: object) -> tuple[MemMCMAE, TrainOutcome]:
    torch.manual_seed(0)
    model = MemMCMAE(MODEL, 32)
    return model, train(model, source or Images(), config, **STATS, **options)


def test_golden_loss_curve() -> None:
    curves = []
    for _ in range(2):
        logged: list[dict] = []
        model, outcome = run(on_log=logged.append)
        curves.append(([entry["loss"] for entry in logged], [p.detach().clone() for p in model.parameters()], outcome))
    assert curves[0][0] == curves[1][0]
    assert all(torch.equal(one, other) for one, other in zip(curves[0][1], curves[1][1], strict=True))
    assert curves[0][2].loss == curves[1][2].loss
    images = torch.from_numpy(IMAGES.astype(np.float32))[..., 0].div(65_535).sub(0.45).div(0.3)[:, None]
    torch.manual_seed(0)
    fresh = MemMCMAE(MODEL, 32)
    with torch.no_grad():
        first, last = (
            net(images, generator=torch.Generator().manual_seed(1)).loss.item()
            for net in (fresh, curves[0][2].ema_model)
        )
    assert first == pytest.approx(GOLDEN_FIRST, abs=0.02)
    assert last == pytest.approx(GOLDEN_LAST, abs=0.02)


@pytest.mark.parametrize(("bound", "scaled"), [(1e-3, 20), (1e3, 0)])
def test_gradients_are_bounded_as_torch_bounds_them(monkeypatch: pytest.MonkeyPatch, bound: float, scaled: int) -> None:
    """Bit by bit, whether all steps are beyond the bound or none is; those within it are not multiplied by 1."""
    config, calls = CONFIG.model_copy(update={"clip_grad_norm": bound}), []
    original = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *args: (calls.append(1), original(*args)))
    model, outcome = run(config)
    assert len(calls) == scaled
    plain = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(loop._Run, "_clip", lambda self: plain(self.model.parameters(), bound))
    expected, by_torch = run(config)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    assert outcome.loss == by_torch.loss


def test_metrics_and_outcome() -> None:
    logged: list[dict] = []
    _, outcome = run(on_log=logged.append)
    assert [entry["step"] for entry in logged] == [8, 16]
    assert {*logged[0]} == {
        "step", "epoch", "progress", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "elapsed_s"
    }  # fmt: skip
    assert all(math.isfinite(value) for entry in logged for value in entry.values())
    assert all(0.0 <= entry["data_wait"] <= 1.0 for entry in logged)
    assert logged[1]["epoch"] == 3
    assert outcome.as_dict() == {
        "steps": 20, "selected_step": 20, "epochs": 5, "images": 320,
        "train_seconds": outcome.train_seconds, "loss": outcome.loss,
    }  # fmt: skip


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, outcome = run()

    class Interrupted(Exception):
        pass

    def interrupt(save: Callable[[Path], None], metrics: dict) -> None:
        if metrics["step"] == 8:
            save(tmp_path)
            raise Interrupted

    with pytest.raises(Interrupted):
        run(CONFIG.model_copy(update={"checkpoint_seconds": 1e-9}), on_checkpoint=interrupt)
    torch.manual_seed(99)
    resumed = MemMCMAE(MODEL, 32)
    seen: list[int] = []

    class Watched(Images):
        def __call__(self, position: Position) -> Iterator[Batch]:
            seen.append(position.images)
            return super().__call__(position)

    second = train(resumed, Watched(), CONFIG, **STATS, resume_from=tmp_path)
    assert seen == [8 * 16]
    assert (second.steps, second.images) == (outcome.steps, outcome.images)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(outcome.ema_model.parameters(), second.ema_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_two_batches_accumulated_are_one_of_twice_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same draws for every image, which those of a run are not."""
    monkeypatch.setattr(loop, "augment", lambda images, *_: images)
    monkeypatch.setattr(loop, "random_ids_keep", lambda batch, *_: torch.tensor([[0, 5, 10, 15]] * batch))

    class Halves(Images):
        def __call__(self, position: Position) -> Iterator[Batch]:
            for batch in super().__call__(position):
                yield from (Batch(batch.pixels[:8]), Batch(batch.pixels[8:]))

    _, outcome = run()
    _, other = run(CONFIG.model_copy(update={"batch_size": 8, "accumulate": 2}), Halves())
    assert (other.steps, other.images) == (outcome.steps, outcome.images)
    # Parameters are not compared: where the gradient is zero, as of a key's bias, Adam follows its rounding.
    assert other.loss == pytest.approx(outcome.loss, rel=1e-4)
    _, single = run(CONFIG.model_copy(update={"batch_size": 8}), Halves())
    assert single.loss != pytest.approx(outcome.loss, rel=1e-2)


def test_a_finished_run_resumes_into_its_end(tmp_path: Path) -> None:
    _, outcome = run(on_checkpoint=lambda save, _: save(tmp_path))
    _, again = run(resume_from=tmp_path, source=Given())
    assert again.steps == outcome.steps
    assert again.loss == outcome.loss
    assert again.train_seconds >= outcome.train_seconds


def test_time_ends_the_run_and_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Time:
        now = 0.0

        @classmethod
        def monotonic(cls) -> float:
            return cls.now

    class Slow(Images):
        def __call__(self, position: Position) -> Iterator[Batch]:
            for batch in super().__call__(position):
                Time.now += 0.5
                yield batch

    monkeypatch.setattr(pace, "time", Time)
    logged: list[dict] = []
    config = CONFIG.model_copy(update={"max_minutes": 0.5, "max_steps": 10_000})
    _, outcome = run(config, Slow(), on_log=logged.append)
    assert 59 <= outcome.steps <= 61
    assert outcome.train_seconds == pytest.approx(30.0, abs=1.0)
    assert logged[-1]["lr"] < 0.05 * max(entry["lr"] for entry in logged)
    assert logged[0]["data_wait"] == pytest.approx(1.0)
    assert logged[0]["images_per_s"] == pytest.approx(32.0)


def test_ranks_with_other_clocks_follow_rank_zero() -> None:
    class Told(Alone):
        """Rank 1: hears what rank 0's clock says, one step a second."""

        calls = 0

        def broadcast_float(self, value: float) -> float:
            self.calls += 1
            return [1.0, 2.0, 4.0, *range(8, 100, 8)][self.calls - 1]

    config = CONFIG.model_copy(update={"max_minutes": 1.0, "max_steps": 10_000})
    logged: list[dict] = []
    _, outcome = run(config, sync=Told(), rank=1, world_size=2, on_log=logged.append)
    assert outcome.steps == 60
    assert [entry["elapsed_s"] for entry in logged] == [8.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0]
    assert outcome.images == 60 * 32


def test_draws_differ_by_rank_step_and_seed() -> None:
    seeds = {step_seed(seed, rank, step) for seed in range(3) for rank in range(3) for step in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step() -> None:
    torch.manual_seed(0)
    model = MemMCMAE(MODEL, 32)

    def poison(entry: dict) -> None:
        with torch.no_grad():
            model.decoder.head.bias[0] = float("nan")

    with pytest.raises(
        DivergedError, match=r"step 8 \(epoch 2\): gradient norm nan; rank 0, loss nan: 2\.25\."
    ) as raised:
        train(model, Images(), CONFIG, **STATS, on_log=poison)
    order = np.random.default_rng(2).permutation(len(IMAGES))[:16]
    assert ", ".join(f"2.25.{row}" for row in order) in str(raised.value)


def test_of_several_batches_of_a_step_the_one_that_broke_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third batch of four; the images of the others are not to blame."""
    forward, calls = MemMCMAE.forward, []

    def third_is_nan(self: MemMCMAE, *inputs: torch.Tensor) -> MAEOutput:
        calls.append(1)
        output = forward(self, *inputs)
        return output._replace(loss=output.loss * math.nan) if len(calls) == 3 else output

    monkeypatch.setattr(MemMCMAE, "forward", third_is_nan)
    with pytest.raises(DivergedError, match=r"step 0 \(epoch 0\)") as raised:
        run(CONFIG.model_copy(update={"accumulate": 4}))
    order = np.random.default_rng(0).permutation(len(IMAGES))
    assert ", ".join(f"2.25.{row}" for row in order[32:48]) + "." in str(raised.value)
    assert not any(f"2.25.{row}," in str(raised.value) for row in order[:32])


def test_time_spent_on_a_checkpoint_is_not_read_as_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes one second, a checkpoint ten, in a run of 60 s; the rate follows the time that is left."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    saved: list[dict] = []
    progress: list[float] = []

    def step() -> None:
        now[0] += 1.0

    def save(write: loop.Save, metrics: loop.Metrics) -> None:
        saved.append({"at": now[0], **metrics})
        now[0] += 10.0
        write(tmp_path / "checkpoint")

    rate = loop.learning_rate
    monkeypatch.setattr(
        loop, "learning_rate", lambda share, *rest: (progress.append(share * 60.0), rate(share, *rest))[1]
    )
    config = CONFIG.model_copy(update={"max_minutes": 1.0, "max_steps": 10_000, "checkpoint_seconds": 20.0})
    run(config, on_step=step, on_checkpoint=save)
    assert len(saved) >= 2
    steps = np.diff(progress)
    assert steps.max() == pytest.approx(11.0, abs=0.1), "a checkpoint counts once, when it is made"
    assert sorted(steps)[-3] == pytest.approx(1.0, abs=0.1), "and not again in the steps behind it"


def test_a_run_that_time_has_ended_stays_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is foreseen from the pace, a little early; what is kept of it lies beyond the bound."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    config = CONFIG.model_copy(update={"max_minutes": 1.0, "max_steps": 100})
    clock = pace.Clock(config, Alone(), RunState(0, Position(0, ((0, 1),)), 0.0, 0))
    now[0] = 50.0
    clock.agree(10)
    assert (clock.progress(11), clock.final_s(11)) == (55.0 / 60.0, 50.0)
    assert (clock.progress(12), clock.final_s(12)) == (1.0, 60.0)
    assert clock.final_s(100) == 50.0


def test_epochs_without_batches_and_odd_shapes_are_refused() -> None:
    with pytest.raises(TrainingError, match="came to an end"):
        run(source=Given())
    with pytest.raises(TrainingError, match=r"batch of shape \(4, 16, 16, 1\)"):
        run(source=Given(np.zeros((4, 16, 16, 1), np.uint16)))
