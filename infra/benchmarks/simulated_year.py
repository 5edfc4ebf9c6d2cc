"""A year of weekly batches: is a model retrained when it should be, a bad one refused, a changed stream noticed?

    python infra/benchmarks/simulated_year.py [--weeks 52] [--out FOLDER] [--steps 400]

Simulated radiographs of three makers, 64 px, 40 patients a week, one in ten with a lesion and without a label. Each
week is stored, scored by the champion, monitored, and `memmc retrain` decides. Planted: a week of contaminated
normals, a scanner that is replaced, and a challenger that was hardly trained. Prints a table and the champion's
decisions; writes timeline.png and year.json; ends with 1 where an expectation is not met. The same --out goes on where
it stopped. Times are simulated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.ndimage import gaussian_filter

from memmc.config import Config, load_config
from memmc.lake.schemas import INSTANCES, SCHEMAS
from memmc.lake.splits import split_of
from memmc.lake.tables import Lake
from memmc.phantom.lesions import LESION_KINDS, Lesion
from memmc.phantom.radiograph import simulate
from memmc.pipeline.cluster import ray_cluster
from memmc.pipeline.decisions import read as decisions
from memmc.pipeline.identity import home_directory
from memmc.pipeline.monitor import monitor
from memmc.pipeline.promote import promote
from memmc.pipeline.retrain import retrain
from memmc.pipeline.score import score
from memmc.pipeline.train import train

COHORT, SIDE, PER_WEEK, FIRST = "year", 64, 40, 320
START = datetime(2025, 1, 6, tzinfo=UTC)  # verdicts bear the real time: the simulated one stays behind it
# Share of the stream before and after the change of scanner; gain and blur of each maker's processing.
BEFORE, AFTER = {"A": 0.4, "B": 0.35, "C": 0.25}, {"A": 0.4, "B": 0.35, "D": 0.25}
LOOK = {"A": (1.0, 0.0), "B": (0.95, 0.0), "C": (1.0, 0.35), "D": (0.82, 0.8)}


@dataclass(frozen=True)
class Plan:
    """In which week what is planted."""

    weeks: int

    @property
    def contaminated(self) -> int:
        return max(2, round(0.38 * self.weeks))

    @property
    def scanner(self) -> int:
        return max(3, round(0.58 * self.weeks))

    @property
    def bad_challenger(self) -> int:
        return max(5, round(0.85 * self.weeks))

    def name(self, week: int) -> str:
        found = {self.contaminated: "contaminated normals", self.scanner: "scanner replaced",
                 self.bad_challenger: "bad challenger"}  # fmt: skip
        return found.get(week, "")


@dataclass
class Week:
    """What happened in one."""

    week: int
    planted: str
    alarms: list[str] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    effect: float = 0.0
    sensitivity: float | None = None
    flagged: float = 0.0
    suspects: int = 0
    decision: str = ""
    verdict: str = ""
    champion: str = ""


def settings(out: Path, steps: int, short: bool) -> Config:
    """Return a small model on small images, and a policy that fits a year; a short one has a short cool-down."""
    return load_config(
        overrides=[
            f"lake.uri={out / 'lake'}", f"data.image_size={SIDE}", "score.scorer=residual_peak", "score.num_actors=1",
            "split.train=0.5", "split.calibrate=0.3", "split.test=0.2", "calibrate.false_positive_rate=0.10",
            f"train.max_steps={steps}", "train.max_minutes=10", "train.num_workers=1", "model.decoder_depth=2",
            "train.batch_size=16",
            "train.base_lr=0.016", "train.ema_decay=0.98",
            "evaluate.bootstrap=200", "promote.parity=", "promote.max_slowdown=20", "promote.probes=60",
            "retrain.min_new_patients=150", "retrain.min_new_share=0.9", "retrain.max_age_days=150",
            "retrain.screen_p_value=0.03",
            f"retrain.cooldown_days={7 if short else 28}", "monitor.canary_scans=16", "monitor.canary_sizes=0.1,0.2",
            "monitor.canary_contrasts=0.5,1.0", "monitor.resamplings=4999",
        ]
    )  # fmt: skip


def batch(config: Config, week: int, count: int, plan: Plan) -> pa.Table:
    """Return a week's rows of `instances`, as ingest would leave them; one image a patient."""
    rng = np.random.default_rng([2026, week])
    makers = AFTER if week >= plan.scanner else BEFORE
    moment = START + timedelta(days=7 * week - 1)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        key = hashlib.sha256(f"{week}/{number}".encode()).hexdigest()
        seed, maker = week * 1000 + number, str(rng.choice(list(makers), p=list(makers.values())))
        lesion = Lesion(LESION_KINDS[number % len(LESION_KINDS)], seed)
        abnormal = rng.random() < 0.1
        smuggled = not abnormal and week == plan.contaminated and rng.random() < 0.3
        gain, blur = LOOK[maker]
        exposed = simulate(seed, 0, lesion if abnormal or smuggled else None, SIDE).image_HW / 4095
        image = np.clip(gaussian_filter(gain * exposed, blur), 0, 1)
        row = {"cohort": COHORT, "object_key": key, "source_ref": "sealed", "content_key": key, "size_bytes": 1}
        row |= {"outcome": "stored", "split": split_of(key, config.split), "patient_key": key}
        row |= {"study_uid": f"2.25.{int(key[:20], 16)}", "series_uid": f"2.25.{int(key[20:40], 16)}"}
        row |= {"sop_instance_uid": f"2.25.{int(key[40:60], 16)}", "preprocess_id": config.preprocess_id}
        # Labels are known of the first patients; later on only of the normals, from their reports.
        row |= {"label": ("abnormal" if week == 0 else "unknown") if abnormal else "normal"}
        row |= {"pixels": (image * 65535).round().astype("<u2").tobytes(), "height": SIDE, "width": SIDE}
        row |= {"channels": 1, "bits": 16, "rows": 2048, "columns": 2048, "modality": "DX", "manufacturer": maker}
        row |= {"manufacturer_model": f"{maker}-1", "view_position": "PA", "body_part": "CHEST", "bits_stored": 12}
        row |= {"patient_sex": str(rng.choice(["F", "M"])), "patient_age_years": int(rng.integers(18, 90))}
        row |= {"photometric_interpretation": "MONOCHROME2", "lossy": False, "pixel_mean": float(image.mean())}
        row |= {"pixel_std": float(image.std()), "ingest_run": f"week-{week}", "ingested_at": moment}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMAS[INSTANCES])


def live(config: Config, number: int, plan: Plan) -> Week:
    """Go through one week."""
    lake, now = Lake(config.lake.uri), START + timedelta(days=7 * number)
    week = Week(number, plan.name(number))
    lake.append(INSTANCES, batch(config, number, PER_WEEK, plan), f"week-{number}")
    score(config, COHORT)
    found = monitor(config, COHORT, since=(now - timedelta(days=2)).isoformat(), now=now)
    week.alarms = [alarm["name"] for alarm in found.alarms]
    if found.drift:
        week.drift = found.drift["findings"]
        week.effect = max((shift["effect"] for shift in found.drift["shifts"] if shift["drifted"]), default=0.0)
    week.sensitivity = found.canaries["sensitivity"] if found.canaries and found.canaries["tested"] else None
    if number == plan.bad_challenger:
        bad = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2})})
        judged = promote(config, COHORT, train(bad, COHORT).model)
        week.verdict = f"planted: {judged.outcome}"
    done = retrain(config, COHORT, now=now)
    week.decision = f"{done.plan['outcome']}: {done.plan['reason']}"
    week.suspects = (done.plan["screened"] or {}).get("suspects", 0)
    if done.verdict:
        week.verdict = f"{week.verdict} {done.verdict['model']} {done.verdict['outcome']}".strip()
    champion = [item for item in decisions(lake, name=f"memmc-{COHORT}") if item.outcome == "promoted"]
    week.champion = champion[0].model or "" if champion else ""
    return week


def expectations(weeks: list[Week], plan: Plan, history: list[Any]) -> dict[str, bool]:
    """Return what must hold, by name."""
    quiet = [week for week in weeks if week.week < plan.scanner and week.week != plan.contaminated]
    shifted = [week for week in weeks if plan.scanner <= week.week < plan.scanner + 2]
    bad = [week for week in weeks if week.week == plan.bad_challenger]
    trained = [item for item in history if item.outcome == "trained"]
    promoted = [item for item in history if item.outcome == "promoted"]
    return {
        "the change of scanner alarms within two weeks": any("drift" in week.alarms for week in shifted),
        "at most one false alarm in 26 quiet weeks": sum("drift" in week.alarms for week in quiet)
        <= max(1, len(quiet) / 26),
        "the change of scanner leads to a retraining": any(
            week.week >= plan.scanner and week.decision.startswith("train") for week in weeks
        ),
        "the bad challenger is refused": not bad or "planted: refused" in bad[0].verdict,
        "suspects of the contaminated week wait for a person": weeks[plan.contaminated - 1].suspects > 0,
        "every champion has a training and a verdict that explain it": {item.model for item in promoted}
        <= {item.model for item in trained},
    }


def line_of(week: Week) -> str:
    alarms, found = ",".join(week.alarms) or "-", f"{week.sensitivity or 0:5.0%} {week.suspects:2d} suspects"
    outcome = f"{week.champion:14} {week.verdict:24} {week.decision[:90]}"
    return f"{week.week:3d} {week.planted:21} {alarms:22} {found}  {outcome}"


def timeline(weeks: list[Week], file: Path) -> None:
    """Write the year as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    at = [week.week for week in weeks]
    alarmed = [week for week in weeks if "drift" in week.alarms]
    top.bar(at, [week.effect for week in weeks], color="#0072B2")
    top.scatter([week.week for week in alarmed], [1.04] * len(alarmed), color="#D55E00", s=16, label="drift alarm")
    top.set_ylabel("drift (effect)")
    top.set_ylim(0, 1.12)
    sung = [week for week in weeks if week.sensitivity is not None]
    middle.plot([week.week for week in sung], [week.sensitivity for week in sung], color="#009E73", marker=".")
    middle.set_ylabel("planted lesions found")
    middle.set_ylim(0, 1)
    bottom.step(at, [int(week.champion.rpartition("/")[2] or 0) for week in weeks], where="post", color="#000000")
    refused = [week for week in weeks if "refused" in week.verdict]
    bottom.scatter([week.week for week in refused], [0.5] * len(refused), marker="x", color="#D55E00", label="refused")
    bottom.set_ylabel("champion (version)")
    bottom.set_xlabel("week")
    for axes in (top, middle, bottom):
        for week in weeks:
            if week.planted:
                axes.axvline(week.week, color="#CC79A7", linewidth=1)
    for week in weeks:
        if week.planted:
            top.text(week.week + 0.1, 0.86, week.planted, fontsize=8, color="#CC79A7")
    top.legend(loc="upper left", fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="year-"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    plan, began = Plan(arguments.weeks), time.monotonic()
    config = settings(out, arguments.steps, short=arguments.weeks < 26)
    lake, kept = Lake(config.lake.uri), out / "weeks.json"
    weeks = [Week(**week) for week in json.loads(kept.read_text())] if kept.exists() else list[Week]()
    with ray_cluster(config, home_directory()):
        if not kept.exists():
            lake.append(INSTANCES, batch(config, 0, FIRST, plan), "week-0")
            first = retrain(config, COHORT, now=START)
            print(f"first champion: {first.verdict['reason'] if first.verdict else first.plan['reason']}", flush=True)
        for number in range(len(weeks) + 1, arguments.weeks + 1):
            weeks.append(live(config, number, plan))
            kept.write_text(json.dumps([asdict(week) for week in weeks]))
            print(line_of(weeks[-1]), flush=True)
    history = decisions(lake, name=f"memmc-{COHORT}")
    print("\ndecisions, oldest first")
    for item in reversed(history):
        if item.outcome != "wait":
            what = f"{item.action:8} {item.outcome:9} {item.model or '':14}"
            print(f"  {item.decided_at:%Y-%m-%d} {what} {item.reason[:110]}")
    met = expectations(weeks, plan, history)
    timeline(weeks, out / "timeline.png")
    minutes = round((time.monotonic() - began) / 60, 1)
    document = {"weeks": [asdict(week) for week in weeks], "met": met, "minutes": minutes}
    (out / "year.json").write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(["", *(f"{'yes' if held else 'NO '}  {name}" for name, held in met.items())]))
    print(f"{minutes} min; {out / 'timeline.png'}")
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
