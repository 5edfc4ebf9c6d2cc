"""MemMC-MAE beside its peers: trained on the same normals for the same time, judged by the same scorers.

Every method sees the same images, augmented alike, on all threads for --minutes; then SSIM, L1 and the residual
scores, these fitted on the same held-out normals, judge what it reconstructs, and the paper's own score where that
is another. PatchCore and PaDiM stand on the encoder of the MemMC-MAE of the same seed and cost no training of their
own. The controls reconstruct nothing: the mean image of the normals, and `memmc.evaluation.controls`.

Runs are kept in --out and not repeated; call again until all are there. Leave the machine alone.

::

    python infra/benchmarks/peers.py ../shared/data --out runs [--minutes 10] [--seeds 0 1 2] [--sets cxr-adult]
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from feature_banks import padim, patch_core, patch_features
from peer_networks import PEERS, Peer
from quality_figures import DEFAULT, Row, Store, batches, control_lines, judged, markdown
from quality_model import LAST, fit, judge, parameters
from quality_sets import QualitySet, read_set
from torch import Tensor

from memmc.config import Config, load_config
from memmc.model.artifact import load_model
from memmc.scoring.masks import Reconstruction
from memmc.scoring.mean_image import MeanImage
from memmc.training.augment import augment, standardise
from memmc.training.feed import CachedFeed
from memmc.training.loop import step_seed
from memmc.training.order import Position

OURS = "MemMC-MAE"
BATCH, RATE, WARM_UP, CLIP = 16, 1e-3, 0.05, 1.0


def train_peer(peer: Peer, data: QualitySet, config: Config) -> dict[str, Any]:
    """Train for `train.max_minutes` or `train.max_steps`: Adam, its rate falling to 0 as a cosine of the time spent."""
    job, cpu = config.train, torch.device("cpu")
    optimizer = torch.optim.Adam(peer.parameters(), lr=0.0)
    stream = CachedFeed([data.train.table()], len(data.train), BATCH, job.seed, 0)(Position(0, ((0, 1),)))
    peer.train()
    began, step, loss = time.monotonic(), 0, torch.tensor(math.nan)
    while (progress := max((time.monotonic() - began) / 60 / job.max_minutes, step / job.max_steps)) < 1.0:
        pixels = next(stream).pixels
        images_BCHW = standardise(pixels, bits=config.data.bits, pixel_mean=0.0, pixel_std=1.0, device=cpu)
        generator = torch.Generator().manual_seed(step_seed(job.seed, 0, step))
        loss = peer.loss(augment(images_BCHW, job.crop_scale, job.rotate_degrees, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), CLIP)
        warm = min(1.0, progress / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.step()
        step += 1
    peer.eval()
    return {"steps": step, "images": step * BATCH, "loss": loss.item(), "train_seconds": time.monotonic() - began}


@torch.inference_mode()
def judge_peer(peer: Peer, data: QualitySet) -> dict[str, Any]:
    """Return scores and rate of false alarms as `quality_figures.judged`, and the paper's own score."""

    def reconstruct(images_BCHW: Tensor, _names: Sequence[str]) -> Reconstruction:
        with torch.inference_mode():
            return Reconstruction.certain(peer.reconstruct(images_BCHW))

    scores, rate = judged(data, reconstruct)
    if peer.own_score is not None:
        scores[peer.own_score] = torch.cat([peer.score(images) for images, _ in batches(data.test)]).tolist()
    return {"scores": scores, "false_positive_rate": rate, "parameters": parameters(peer)}


class Comparison:
    """The runs of one set, made or found."""

    def __init__(self, args: argparse.Namespace, data: QualitySet) -> None:
        self._args, self._data, self._store = args, data, Store(args.out)

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Return one method's scores of the test images."""
        args, data = self._args, self._data
        config = load_config(
            overrides=[f"train.max_minutes={args.minutes}", f"train.seed={seed}", *args.set]  # tiny at 64 px
        )
        settings = {"set": data.name, "limit": args.limit, **config.model_dump(mode="json", include={"data", "train"})}
        key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{data.name} {args.minutes:g} min {method} seed {seed}")
        kept = self._store.get(key, settings)
        if kept is not None or args.tables:
            return kept or {}
        self._store.begin(key, settings)
        began = time.monotonic()
        make: Callable[..., dict[str, Any]] = _ours if method == OURS else _peer
        run = make(data, config, args.out / key, method)
        print(f"{key}: {run['training']['steps']} steps, {time.monotonic() - began:.0f} s in all", flush=True)
        return self._store.put(key, settings, run)

    def table(self, seeds: Sequence[int]) -> str:
        """Make the runs and return the table, every method's best score marked by its place: ours first."""
        runs = {(method, seed): self.run(method, seed) for seed in seeds for method in (OURS, *PEERS)}
        lines: dict[str, list[list[float]]] = {}
        for (method, _), run in runs.items():
            for score, values in run.get("scores", {}).items():
                lines.setdefault(f"{method}: {score}", []).append(values)
        reference = f"{OURS}: {DEFAULT}"
        if reference not in lines:
            return "no run yet"
        mean_image = judged(self._data, MeanImage(self._data.train.grey()))[0]
        lines |= {f"control: mean image: {score}": [values] for score, values in mean_image.items()}
        rows = {name: Row.of(self._data, values) for name, values in lines.items()}
        ours = rows[reference]
        ordered = sorted(rows.items(), key=lambda item: (item[1] is not ours, -item[1].mean))
        cells = [(name, len(row.areas), row, "" if row is ours else ours.ahead_of(row)) for name, row in ordered]
        controls = [(f"control: {name}", "", f"{area:.3f}", "") for name, area in control_lines(self._data).items()]
        header = ("method: score", "seeds", "AUROC, sd over seeds (95 % of patients)", "ours minus it")
        made = ", ".join(
            f"{method} {run['parameters']:,} parameters, {run['training']['images']:,} images"
            for (method, seed), run in runs.items()
            if run and seed == seeds[0]
        )
        return f"{markdown(header, [*cells, *controls])}\n\nSeed {seeds[0]}: {made}."


def _peer(data: QualitySet, config: Config, _folder: Path, method: str) -> dict[str, Any]:
    torch.manual_seed(config.train.seed)
    peer = PEERS[method](config.data.image_size)
    training = train_peer(peer, data, config)
    return {"training": training, **judge_peer(peer, data)}


def _ours(data: QualitySet, config: Config, folder: Path, _method: str) -> dict[str, Any]:
    training = fit(data, config, folder)
    run = judge(data, folder / LAST, config.score.passes)
    loaded, seed = load_model(folder / LAST), config.train.seed
    train_NLF, test_NLF = patch_features(loaded, data.train), patch_features(loaded, data.test)
    run["scores"] |= {
        "its features, PatchCore": patch_core(train_NLF, test_NLF, seed).tolist(),
        "its features, PaDiM": padim(train_NLF, test_NLF, seed).tolist(),
    }
    return {"training": training, **run}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["cxr-kermany", "cxr-adult"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, help="images of each kind, for a try")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, for every run")
    parser.add_argument("--tables", action="store_true", help="make no run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.sets:
        data = read_set(args.data / name, load_config(overrides=args.set), args.limit)
        if data is not None:
            print(f"{data}\n\n### {args.minutes:g} minutes, {name}\n\n{Comparison(args, data).table(args.seeds)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
