"""What the model reaches, and what its parts are worth: runs over sets and seeds, one table per question.

* ``tiny``: 20 minutes, the last weights and the selected ones, the controls beside them;
* ``ablation``: 10 minutes each of a plain MAE, one with memory, one with the multi-level decoder, both, and a plain MAE
  widened to as many parameters; memory and levels shut off when the model is judged, too;
* ``gates``: 10 minutes each of the gates, every second level, no self-attention in the decoder;
* ``choices``: 6 minutes each of other patches, mask ratios, slots, averages, and no augmentation;
* ``high``: one run of 60 minutes at 128 px.

Each table ends with controls: the training normals' mean image judged as a reconstruction is (what the score finds
without a model), and those of `memmc.evaluation.controls`.

Every run is kept in --out and not repeated, an interrupted one goes on from its checkpoint: call again until all are
there. Seeds go first and variants last, so that what is there can be compared in pairs. Leave the machine alone.

::

    python infra/benchmarks/quality_runs.py ../shared/data --out runs [--only ablation gates] [--seeds 0 1 2]
    python infra/benchmarks/quality_runs.py ../shared/data --out runs --tables      # of what is there
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quality_figures import DEFAULT, Row, Store, control_lines, judged, markdown, rank_correlation
from quality_model import LAST, SELECTED, fit, judge, parameters
from quality_sets import QualitySet, read_set

from memmc.config import Config, ModelConfig, load_config
from memmc.model.mae import MemMCMAE
from memmc.scoring.mean_image import MeanImage

SETS = ("cxr-kermany", "cxr-adult")
PLAIN = {"memory_slots": 0, "cross_attention": False}
SELECTION = ("train.validate_share=0.08", "train.select=probe_auroc")


@dataclass(frozen=True)
class Question:
    """Runs that are compared.

    Attributes:
        minutes: of each run.
        variants: settings by name, `model.*` fields where no section is named; the first is the one that others are
            compared with. None: plain and wide.
        settings: of all runs.
        seeds: most seeds.
    """

    minutes: float
    variants: Mapping[str, Mapping[str, Any] | None]
    settings: tuple[str, ...] = ()
    seeds: int | None = None


QUESTIONS = {
    "tiny": Question(20, {"full": {}}, SELECTION),
    "ablation": Question(
        10,
        {
            "full": {},
            "plain MAE": PLAIN,
            "plain + memory": {"cross_attention": False},
            "plain + multi-level decoder": {"memory_slots": 0},
            "plain, as many parameters": None,
        },
    ),
    "gates": Question(
        10,
        {
            "full": {},  # gate: head
            "channel gate": {"gate": "channel"},
            "scalar gate": {"gate": "scalar"},
            "every second level": {"levels": "every_2"},
            "no decoder self-attention": {"decoder_self_attention": False},
        },
    ),
    "choices": Question(
        6,
        {
            "full": {},
            "patches of 16 px": {"patch_size": 16},
            "half hidden": {"mask_ratio": 0.5},
            "no augmentation": {"train.crop_scale": 1.0, "train.rotate_degrees": 0},
            "64 slots": {"memory_slots": 64},
            "nine tenths hidden": {"mask_ratio": 0.9},
            "patches of 4 px": {"patch_size": 4},
            "average of a thousand steps": {"train.ema_decay": 0.999},
        },
    ),
    "high": Question(60, {"full": {}}, ("data.image_size=128", *SELECTION), seeds=1),
}


def widened(config: Config) -> dict[str, Any]:
    """Return the widths of the plain MAE that comes nearest to the configured model's number of parameters."""
    model = config.model

    def count(changes: Mapping[str, Any]) -> int:
        with torch.device("meta"):
            made = MemMCMAE(ModelConfig(**{**model.model_dump(), **changes}), config.data.image_size)
        return parameters(made)

    aimed, ratio = count({}), model.decoder_dim / model.encoder_dim
    widths = itertools.product(
        range(model.encoder_dim, 2 * model.encoder_dim, 4 * model.encoder_heads),
        range(model.decoder_dim, 2 * model.decoder_dim, 4 * model.decoder_heads),
    )
    near = [(dim, width) for dim, width in widths if abs(width / dim / ratio - 1) < 0.15]
    candidates = [{**PLAIN, "encoder_dim": dim, "decoder_dim": width} for dim, width in near]
    return min(candidates, key=lambda changes: abs(count(changes) - aimed))


class Runs:
    """Makes runs, or finds them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._store, self._sets = args, Store(args.out), dict[tuple[str, int], QualitySet | None]()

    def config(self, question: Question, variant: str, seed: int) -> Config:
        minutes = self._args.minutes or question.minutes
        settings = [f"train.max_minutes={minutes}", f"train.seed={seed}", *question.settings, *self._args.set]
        base = load_config(overrides=settings)
        changes = question.variants[variant]
        changes = widened(base) if changes is None else changes
        named = [f"{key if '.' in key else f'model.{key}'}={value}" for key, value in changes.items()]
        return load_config(overrides=[*settings, *named])

    def data(self, name: str, config: Config) -> QualitySet | None:
        at = (name, config.data.image_size)
        if at not in self._sets:
            self._sets[at] = found = read_set(self._args.data / name, config, self._args.limit)
            print(found or "", flush=True)
        return self._sets[at]

    def run(self, question: Question, name: str, variant: str, seed: int) -> dict[str, Any] | None:
        """Return a run, made now unless it is there; None where it is not and only tables are wanted."""
        config = self.config(question, variant, seed)
        minutes, side, chosen = config.train.max_minutes, config.data.image_size, config.train.select
        key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name} {side} px {minutes:g} min {chosen} {variant} seed {seed}")
        tree = config.model_dump(mode="json", include={"data", "model", "train", "score"})
        settings = {"set": name, "limit": self._args.limit, **tree}
        kept = self._store.get(key, settings)
        if kept is not None or self._args.tables:
            return kept
        data = self.data(name, config)
        if data is None:
            return None
        began, folder = time.monotonic(), self._args.out / key
        self._store.begin(key, settings)
        figures = fit(data, config, folder)
        models = [which for which in (LAST, SELECTED) if (folder / which).is_dir()]
        run = {which: judge(data, folder / which, config.score.passes) for which in models}
        print(f"{key}: {figures['steps']} steps, {time.monotonic() - began:.0f} s in all", flush=True)
        return self._store.put(key, settings, {"training": figures, "models": run, "controls": control_lines(data)})

    def table(self, title: str, question: Question) -> None:
        """Make the runs of a question and print its tables."""
        seeds = self._args.seeds[: question.seeds]
        for name in self._args.sets:
            made = {
                (variant, seed): run
                for seed, variant in itertools.product(seeds, question.variants)
                if (run := self.run(question, name, variant, seed)) is not None
            }
            data = self.data(name, self.config(question, next(iter(question.variants)), 0)) if made else None
            if data is not None:
                print(f"\n### {title}, {name}\n\n{_table(data, question, made)}", flush=True)


def _table(data: QualitySet, question: Question, made: Mapping[tuple[str, int], dict[str, Any]]) -> str:
    lines: list[tuple[str, list[Any]]] = []
    for variant in question.variants:
        runs = [run for (which, _), run in sorted(made.items(), key=lambda item: item[0][1]) if which == variant]
        for model in (LAST, SELECTED):
            with_it = [run["models"][model]["scores"] for run in runs if model in run["models"]]
            title = variant if model == LAST else f"{variant}, {SELECTED}"
            for score in dict.fromkeys(name for scores in with_it for name in scores):
                lines.append((f"{title}: {score}", [scores[score] for scores in with_it]))
    if not lines:
        return "no run yet"
    without_model = judged(data, MeanImage(data.train.grey()))[0]
    lines += [(f"mean image: {score}", [values]) for score, values in without_model.items()]
    rows = [(name, Row.of(data, scores)) for name, scores in lines]
    first = rows[0][1]
    cells = [(name, len(row.areas), row, "" if row is first else row.ahead_of(first)) for name, row in rows]
    run = next(iter(made.values()))
    controls = [(f"control: {name}", "", f"{area:.3f}", "") for name, area in run["controls"].items()]
    told = [f"* {variant}, seed {seed}: {_told(run, without_model[DEFAULT])}" for (variant, seed), run in made.items()]
    header = ("variant: score", "seeds", "AUROC, sd over seeds (95 % of patients)", f"minus {rows[0][0]}")
    return f"{markdown(header, [*cells, *controls])}\n\nRuns:\n\n{chr(10).join(told)}"


def _told(run: Mapping[str, Any], mean_image: list[float]) -> str:
    """Return what a run was: its size and length, its errors, and how far its order is the mean image's."""
    training, model = run["training"], run["models"][LAST]
    text = f"{model['parameters']:,} parameters, {training['steps']} steps, loss {training['loss']:.4f}"
    text += f", ranks as the mean image {rank_correlation(model['scores'][DEFAULT], mean_image):.2f}"
    if looks := training["looks"]:
        least = min(looks, key=lambda look: look["val_error"])
        text += f", error of held-out normals {looks[-1]['val_error']:.3f} at the end and least at step"
        text += f" {least['step']:.0f}, planted lesions select step {training['selected_step']}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=[], help="of the questions, by name; all when absent")
    parser.add_argument("--minutes", type=float, help="of every run, in place of the question's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, help="images of each kind, for a try")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, for every run")
    parser.add_argument("--tables", action="store_true", help="make no run")
    args = parser.parse_args()
    known = {variant for name in args.only for variant in QUESTIONS[name].variants}
    if unknown := set(args.variants) - known:
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    torch.set_num_threads(args.threads)
    runs = Runs(args)
    for name in args.only:
        question = QUESTIONS[name]
        chosen = {key: changes for key, changes in question.variants.items() if key in (args.variants or [key])}
        if chosen:
            runs.table(name, replace(question, variants=chosen))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
