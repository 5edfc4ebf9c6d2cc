"""Images per second, GPU-hours and network bytes of training `base` on N GPUs, by formula and by simulation.

What is assumed stands in `GPUS` and in the options; what is derived: operations, parameters and kept bytes of the
model (model_cost.py). `--check` holds the same formulas against this machine's CPU: the share of the matmul rate is
fitted on a plain MAE, and predicts the other gates and the next size, which it was not fitted on.

::

    python infra/benchmarks/scaling_model.py
    python infra/benchmarks/scaling_model.py --check
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from model_cost import StepCost, config_of, step_cost
from train_step import PLAIN, Trainer, load, matmul_rate, seconds

from memmc.config import PRESET_SIDES

BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default
LATENCY_S = 10e-6  # of one hop of a ring


@dataclass(frozen=True)
class Gpu:
    """Figures of the maker's data sheet; all assumed, none measured here.

    Attributes:
        flops: dense bf16 operations/s.
        memory: bytes/s of its memory.
        inside: bytes/s to its neighbour in a machine of eight, one direction.
        outside: bytes/s to another machine, one network card per GPU.
    """

    flops: float
    memory: float
    inside: float
    outside: float


GPUS = {
    "H100 SXM, NVLink 4, NDR": Gpu(989e12, 3.35e12, 450e9, 50e9),
    "A100 SXM, NVLink 3, HDR": Gpu(312e12, 2.0e12, 300e9, 25e9),
}


def step_seconds(cost: StepCost, kept: float, batch: int, gpu: Gpu, share: float) -> float:
    """Return one GPU's seconds of compute: the longer of operations and bytes, and the optimiser's bytes.

    Args:
        kept: bytes an image keeps for the backward pass, written and read once; as much again is not kept.
        share: of `gpu.flops` that matrix products reach; assumed.
    """
    operations_s = batch * cost.executed / (gpu.flops * share)
    bytes_s = batch * 4 * kept / gpu.memory
    return max(operations_s, bytes_s) + 9 * 4 * cost.parameters / gpu.memory


def ring_seconds(num_bytes: float, gpus: int, gpu: Gpu) -> float:
    """Return the seconds of a ring all-reduce: every GPU sends 2 (N - 1) / N of the bytes over the slowest link."""
    link = gpu.inside if gpus <= 8 else gpu.outside
    return 2 * (gpus - 1) / gpus * num_bytes / link + 2 * (gpus - 1) * LATENCY_S


def simulate(compute_s: float, gradient_bytes: float, gpus: int, gpu: Gpu, jitter: float, steps: int = 2000) -> float:
    """Return the mean seconds of a synchronous step with overlap and stragglers.

    Every GPU's compute is log-normal round `compute_s`. A bucket's gradients are ready when the slowest GPU has them,
    evenly over the last two thirds of its compute (the backward pass); all-reduces run one after the other.
    """
    rng = np.random.default_rng(0)
    slowest_N = (compute_s * np.exp(rng.normal(0, jitter, (steps, gpus)))).max(axis=1)
    buckets = max(1, round(gradient_bytes / BUCKET_BYTES))
    each_s = ring_seconds(gradient_bytes / buckets, gpus, gpu) if gpus > 1 else 0.0
    finished_N = np.zeros(steps)
    for bucket in range(1, buckets + 1):
        ready_N = slowest_N * (1 / 3 + 2 / 3 * bucket / buckets)
        finished_N = np.maximum(finished_N, ready_N) + each_s
    return float(np.maximum(finished_N, slowest_N).mean())


def table(args: argparse.Namespace) -> None:
    config = config_of("base", gate=args.gate)
    cost = step_cost(config, PRESET_SIDES["base"])
    trainer = Trainer(config, PRESET_SIDES["base"], 1, argparse.Namespace(device="cpu", bf16=False, compile=False))
    kept = trainer.kept_bytes() / 2  # float32 there, bf16 on a GPU
    if args.gate != "channel":  # a GPU keeps contexts and queries of all levels, which a CPU computes anew
        kept += (
            2 * 2.0 * config.decoder_depth * config.encoder_depth * (trainer.model.num_patches + 1) * config.decoder_dim
        )
    gradient = 4.0 * cost.parameters
    print(
        f"base, gate {args.gate}, 224 px: {cost.parameters / 1e6:.1f} M parameters, {cost.needed / 1e9:.1f} GFLOP/image"
    )
    print(f"executed {cost.executed / 1e9:.1f} GFLOP/image, kept {kept / 2**20:.1f} MiB/image")
    print(f"gradients {gradient / 2**20:.0f} MiB, sent in float32")
    print(f"assumed: {args.share:.0%} of the peak, jitter {args.jitter:.0%}, {args.batch} images per GPU and step")
    for name, gpu in GPUS.items():
        compute_s = step_seconds(cost, kept, args.batch, gpu, args.share)
        print(f"\n{name}\n| GPUs | images/s | efficiency | GPU-hours | hours | sent/GPU/step | all-reduce | input |")
        print("|---|---|---|---|---|---|---|---|")
        for gpus in (1, 2, 4, 8, 16, 32, 64):
            step_s = simulate(compute_s, gradient, gpus, gpu, args.jitter)
            rate = gpus * args.batch / step_s
            hours = args.images / rate / 3600
            sent = 2 * (gpus - 1) / gpus * gradient
            ring_s = ring_seconds(gradient, gpus, gpu) if gpus > 1 else 0.0
            pixels = rate * PRESET_SIDES["base"] ** 2 * 2
            line = f"| {gpus} | {rate:,.0f} | {compute_s / step_s:.0%} | {hours * gpus:.1f} | {hours:.2f} | "
            line += (
                f"{sent / 2**20:.0f} MiB | {ring_s * 1e3:.1f} of {step_s * 1e3:.0f} ms | {pixels / 2**20:,.0f} MiB/s |"
            )
            print(line)


def check(args: argparse.Namespace) -> bool:
    """Print predicted / measured seconds of a step on one thread of this machine."""
    torch.set_num_threads(1)
    run = argparse.Namespace(device="cpu", bf16=False, compile=False)
    print(f"one thread, load {load()}; share fitted on each size's plain MAE")
    ratios: list[float] = []
    before = None
    for preset, batch in (("tiny", 8), ("small", 4), ("base", 2)):
        share = before
        for name, changes in (("plain", PLAIN), *((gate, {"gate": gate}) for gate in ("scalar", "head", "channel"))):
            config = config_of(preset, **changes)
            trainer, cost = Trainer(config, PRESET_SIDES[preset], batch, run), step_cost(config, PRESET_SIDES[preset])
            trainer.step()
            measured = statistics.median(seconds(trainer.step, run) for _ in range(args.rounds))
            bound = batch * cost.executed / matmul_rate(trainer, run)
            if name == "plain":
                if before is not None:
                    print(
                        f"{preset:6} plain    by the size before: predicted / measured {bound / before / measured:.2f}"
                    )
                share = before = bound / measured
                continue
            ratios.append(bound / share / measured)
            line = f"{preset:6} {name:8} predicted / measured {ratios[-1]:.2f}"
            print(f"{line} ({measured * 1e3:.0f} ms, share {share:.0%})")
    return all(0.75 <= ratio <= 1.33 for ratio in ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", default="head", choices=["channel", "head", "scalar"])
    parser.add_argument("--batch", type=int, default=128, help="images per GPU and step")
    parser.add_argument("--images", type=float, default=20.48e6, help="of the whole run: 20,000 steps of 1,024")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached; assumed")
    parser.add_argument("--jitter", type=float, default=0.03, help="deviation of a GPU's step, as a share; assumed")
    parser.add_argument("--check", action="store_true", help="predicted against measured on this CPU")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not args.check:
        table(args)
        return 0
    passed = check(args)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
