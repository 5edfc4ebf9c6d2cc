"""One training step of MemMC-MAE against a plain MAE of the same widths, as ratios in one run.

A step is forward, backward, gradient clipping, AdamW and weight average. The variants take turns within a round, and
a ratio is the median over rounds, so that other work on the machine meets all of them alike; with one thread the
clock is CPU time. ``literal`` is the default gate computed by the tests' loop over levels and heads.

* share of the matmul rate: operations of the step per second, against those of the step's own matrix products, each
  timed alone on tensors of its shape;
* both floors of the step's time: operations / matmul rate, and bytes / copy rate;
* activations: bytes of the distinct tensors kept for the backward pass, parameters left out.

::

    python infra/benchmarks/train_step.py --preset tiny small --threads 1 2
    python infra/benchmarks/train_step.py --preset tiny --compile --bf16
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from model_cost import config_of, step_cost
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memmc.config import PRESET_SIDES, ModelConfig, TrainConfig
from memmc.model.decoder import LevelCrossAttention
from memmc.model.mae import MemMCMAE
from memmc.training.optim import WeightAverage, make_optimizer, set_learning_rate

sys.path.append(str(Path(__file__).parents[2] / "tests" / "unit"))
from reference_decoder import reference_cross_attention

BATCH = {"tiny": 8, "small": 8, "base": 2}
TO_PLAIN, TO_LITERAL, MATMUL_SHARE, MEMORY = 1.4, 1.3, 0.5, 1.5
PLAIN = {"memory_slots": 0, "cross_attention": False}


class Trainer:
    """A model with all that a step needs."""

    def __init__(self, config: ModelConfig, side: int, batch: int, args: argparse.Namespace, literal: bool = False):
        torch.manual_seed(0)
        self.model = MemMCMAE(config, side).to(args.device)
        self.images = torch.randn(batch, 1, side, side, device=args.device)
        self.optimizer = make_optimizer(self.model, TrainConfig())
        self.average = WeightAverage(self.model, 0.999)
        self.autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)
        for module in self.model.modules():
            if literal and isinstance(module, LevelCrossAttention):
                module.forward = lambda query, levels, own=module: reference_cross_attention(own, query, levels)
        self.call = torch.compile(self.model) if args.compile and not literal else self.model

    def forward(self) -> Tensor:
        with self.autocast:
            return self.call(self.images).loss

    def step(self) -> None:
        loss = self.forward()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        set_learning_rate(self.optimizer, 1e-4)
        self.optimizer.step()
        self.average.update(self.model)

    def kept_bytes(self) -> int:
        """Return the bytes kept between forward and backward, every storage once, parameters not."""
        own = {tensor.untyped_storage().data_ptr() for tensor in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        del loss
        return sum(kept.values())


class Products(TorchDispatchMode):
    """Counts the matrix products of a step by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        skip = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}.get(func._schema.name)
        if skip is not None:
            self.shapes[tuple(tuple(tensor.shape) for tensor in args[skip : skip + 2])] += 1  # type: ignore[index]
        return func(*args, **(kwargs or {}))


def seconds(work: Callable[[], object], args: argparse.Namespace) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 and args.device == "cpu" else time.perf_counter
    start = clock()
    work()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def matmul_rate(trainer: Trainer, args: argparse.Namespace) -> float:
    """Return operations/s over the step's matrix products, each shape timed alone, in the step's proportions."""
    with Products() as products:
        trainer.step()
    operations = total_s = 0.0
    for (left, right), count in products.shapes.items():
        a, b = torch.randn(left, device=args.device), torch.randn(right, device=args.device)
        with trainer.autocast:
            a @ b
            total_s += count * min(seconds(lambda a=a, b=b: a @ b, args) for _ in range(5))
        operations += count * 2.0 * a.numel() * right[-1]
    return operations / total_s


def copy_rate(args: argparse.Namespace) -> float:
    """Return bytes/s of a copy, read and written bytes together."""
    source = torch.randn(32 << 20, device=args.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), args) for _ in range(5))


def bench(preset: str, threads: int, args: argparse.Namespace) -> bool:
    torch.set_num_threads(threads)
    side, batch = PRESET_SIDES[preset], args.batch or BATCH[preset]
    default = config_of(preset)
    configs = {"plain MAE": config_of(preset, **PLAIN), "default": default}
    configs |= {gate: config_of(preset, gate=gate) for gate in ("scalar", "head", "channel") if gate != default.gate}
    configs |= {
        "every_2": config_of(preset, gate="head", levels="every_2"),
        "no self-attention": config_of(preset, gate="head", decoder_self_attention=False),
    }
    trainers = {name: Trainer(config, side, batch, args) for name, config in configs.items()}
    trainers["literal"] = Trainer(default, side, batch, args, literal=True)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.step()
    for _ in range(args.rounds):
        for name, trainer in trainers.items():
            times[name].append(seconds(trainer.step, args))
    ratio = {name: median_ratio(times[name], times["plain MAE"]) for name in times}
    kept = {name: trainer.kept_bytes() for name, trainer in trainers.items()}
    rates = {name: matmul_rate(trainers[name], args) for name in ("plain MAE", "default", "head") if name in trainers}
    copied = copy_rate(args)
    print(f"\n{preset}: {side} px, batch {batch}, {threads} thread(s), default gate {default.gate}, load {load()}")
    for name in times:
        cost = step_cost(configs.get(name, default), side)
        step_s = statistics.median(times[name])
        line = f"{name:18} {step_s * 1e3:8.1f} ms  {ratio[name]:5.2f} x plain"
        operations = cost.needed / step_cost(configs["plain MAE"], side).needed
        line += f"   operations {batch * cost.needed / 1e9:6.1f} G ({operations:4.2f} x)"
        line += f"   kept {kept[name] / 2**20:7.1f} MiB ({kept[name] / kept['plain MAE']:4.2f} x)"
        if name in rates:
            operations_s = batch * cost.executed / rates[name]
            bytes_s = (2 * kept[name] + 9 * 4 * cost.parameters) / copied
            share = batch * cost.executed / step_s / rates[name]
            line += (
                f"   {share:4.0%} of {rates[name] / 1e9:5.1f} GFLOP/s, floors {operations_s * 1e3:.1f} ms operations"
            )
            line += f", {bytes_s * 1e3:.1f} ms bytes"
        print(line, flush=True)
    to_literal = median_ratio(times["literal"], times["default"])
    share = batch * step_cost(default, side).executed / statistics.median(times["default"]) / rates["default"]
    memory = kept["default"] / kept["plain MAE"]
    checks = {
        f"default / plain MAE {ratio['default']:.2f} (asked <= {TO_PLAIN})": ratio["default"] <= TO_PLAIN,
        f"literal / default {to_literal:.2f} (asked >= {TO_LITERAL})": to_literal >= TO_LITERAL,
        f"share of the matmul rate {share:.0%} (asked >= {MATMUL_SHARE:.0%})": share >= MATMUL_SHARE,
        f"activations / plain MAE's {memory:.2f} (asked <= {MEMORY})": memory <= MEMORY,
    }
    for text, passed in checks.items():
        print(f"  {'PASS' if passed else 'FAIL'}  {text}")
    return all(checks.values())


def median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def load() -> str:
    return f"{os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["tiny", "small"], choices=list(PRESET_SIDES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="images a step; 8 for tiny and small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile all but the literal one")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    results = [bench(preset, threads, args) for preset in args.preset for threads in args.threads]
    print("PASS" if all(results) else "FAIL")
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
