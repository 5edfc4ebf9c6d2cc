"""Monitor: drift, canaries, golden set and the dead-man switch of a cohort, in one look."""

from __future__ import annotations

import base64
import html
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from memmc.config import Config
from memmc.errors import DataError, IntegrityError, PreprocessMismatch
from memmc.lake.tables import Lake
from memmc.monitoring.picture import Point, trend
from memmc.monitoring.watch import Alarm, AlarmName
from memmc.pipeline.canaries import CanaryResult, canaries
from memmc.pipeline.drift import DriftResult, drift
from memmc.pipeline.findings import Row, record, recorded
from memmc.pipeline.golden import GoldenResult, golden
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.progress import Progress, Silent
from memmc.pipeline.results import Result
from memmc.pipeline.watch import watch

_LOOKS = 52  # that the picture shows
_T = TypeVar("_T", bound=Result)


@dataclass(frozen=True)
class MonitorResult(Result):
    """One look at a cohort.

    Attributes:
        model: looked at; None where there is no champion.
        calm: no alarm stands.
        alarms: name, found, to_do; nothing of a patient.
        skipped: checks that could not run, and why.
        drift, canaries, golden: what they found, None where they could not run.
        picture: trend over the latest looks, a PNG in the lake's `reports`.
        page: the same with the alarms in words, HTML.
    """

    cohort: str
    run: str
    model: str | None
    calm: bool
    alarms: list[dict[str, str]]
    skipped: list[str] = field(default_factory=list[str])
    drift: dict[str, Any] | None = None
    canaries: dict[str, Any] | None = None
    golden: dict[str, Any] | None = None
    picture: str = ""
    page: str = ""
    seconds: float = 0.0


def monitor(
    config: Config,
    cohort: str,
    model: str | None = None,
    *,
    since: str | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> MonitorResult:
    """Look at a cohort and its champion; keep what was found in the table `monitoring` and draw its trend.

    A check that lacks what it needs (no calibration yet, say) is named in `skipped`; one that finds something wrong, or
    meets damaged data or pixels prepared otherwise than the model's, raises an alarm and nothing else.

    Args:
        model: looked at in place of the champion.
        since: begin of the window, a date or a version of `instances`; the last `monitor.window_days` when absent.
        now: end of the window, and the time by which silence is measured.

    Raises:
        IntegrityError: what the dead-man switch itself reads is damaged.
        StorageError: the lake or the registry cannot be reached.
        UsageError: `since` is neither a date nor a version.
    """
    began, now, progress = time.monotonic(), now or datetime.now(UTC), progress or Silent()
    check_cohort(cohort)
    lake = Lake(config.lake.uri)
    progress.stage("watch")
    watched = watch(config, cohort, model, since, now)
    alarms, skipped, stopped = list(watched.alarms), list[str](), dict[AlarmName, list[str]]()
    reference = watched.model
    steady = moved = sung = None
    if watched.sound:
        steady = _try("golden set", skipped, stopped, lambda: golden(config, cohort, reference, now=now))
        sung = _try(
            "canaries", skipped, stopped, lambda: canaries(config, cohort, reference, now=now, progress=progress)
        )
        moved = _try(
            "drift", skipped, stopped, lambda: drift(config, cohort, reference, since=since, now=now, progress=progress)
        )
        alarms += [Alarm.of(name, "; ".join(texts)) for name, texts in stopped.items()]
        alarms += _alarms(steady, sung, moved)
    else:
        skipped.append("golden set, canaries, drift: there is no model that could be trusted")
    run = f"watch-{cohort}-{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    rows = [{"name": alarm.name, "alarm": alarm.name, "found": alarm.found} for alarm in alarms]
    record(lake, cohort, run, "watch", rows or [{"name": "calm"}], now, model=reference)
    picture, page = draw(lake, cohort, alarms)
    return MonitorResult(
        cohort=cohort,
        run=run,
        model=reference,
        calm=not alarms,
        alarms=[asdict(alarm) for alarm in alarms],
        skipped=skipped,
        drift=moved.as_dict() if moved else None,
        canaries=sung.as_dict() if sung else None,
        golden=steady.as_dict() if steady else None,
        picture=picture,
        page=page,
        seconds=round(time.monotonic() - began, 2),
    )


def _try(name: str, skipped: list[str], stopped: dict[AlarmName, list[str]], check: Callable[[], _T]) -> _T | None:
    """Run a check; keep why it could not run in `skipped`, or by alarm in `stopped` where its data are at fault."""
    try:
        return check()
    except IntegrityError as error:
        stopped.setdefault("damaged_data", []).append(f"{name}: {error}")
    except PreprocessMismatch as error:
        stopped.setdefault("preprocess_mismatch", []).append(f"{name}: {error}")
    except DataError as error:
        skipped.append(f"{name}: {error}")
    return None


def _alarms(steady: GoldenResult | None, sung: CanaryResult | None, moved: DriftResult | None) -> list[Alarm]:
    found: list[Alarm] = []
    if steady and steady.moved:
        text = (
            f"{steady.num_scans} golden scans: largest difference {steady.largest:.2g}, {steady.tolerance:g} accepted"
        )
        found.append(Alarm.of("golden_set", text))
    if sung and sung.fell:
        text = f"planted lesions found: {sung.sensitivity:.0%}, {sung.baseline or 0:.0%} at first"
        found.append(Alarm.of("canary_sensitivity", text))
    if moved and moved.drifted:
        found.append(Alarm.of("drift", "; ".join(moved.findings[:5])))
    return found


def draw(lake: Lake, cohort: str, alarms: list[Alarm]) -> tuple[str, str]:
    """Write the trend of the latest looks into the lake's reports, as a picture and as a page; return both places."""
    png = trend(trends(recorded(lake, cohort)), f"Monitoring of cohort {cohort}")
    lines = [
        f"<li><b>{alarm.name}</b>: {html.escape(alarm.found)}. {html.escape(alarm.to_do)}</li>" for alarm in alarms
    ]
    page = (
        f"<!doctype html><meta charset=utf-8><title>Monitoring: {cohort}</title>"
        "<style>body{font:15px sans-serif;max-width:76em;margin:2em auto;padding:0 1em}img{max-width:100%}</style>"
        f"<h1>Monitoring of cohort {cohort}</h1><p>Research software, not a medical device.</p>"
        f"<ul>{''.join(lines) or '<li>No alarm stands.</li>'}</ul>"
        f"<img alt='Trend of the findings, one point a look; alarms are orange' "
        f"src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
    )
    names = _names(cohort)
    for name, data in zip(names, (png, page.encode()), strict=True):
        lake.storage.write(name, data)
    return lake.storage.join(names[0]), lake.storage.join(names[1])


def picture_of(config: Config, cohort: str) -> bytes:
    """Return the PNG that the latest look has drawn.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    return Lake(config.lake.uri).storage.read(_names(cohort)[0])


def _names(cohort: str) -> tuple[str, str]:
    return f"reports/monitor-{cohort}.png", f"reports/monitor-{cohort}.html"


def trends(rows: list[Row]) -> dict[str, list[Point]]:
    """Return the series of the picture from the rows of `monitoring`: the largest effect of each kind of evidence."""
    series: dict[str, list[Point]] = {}
    kinds = {"headers": "headers", "pixels": "pixels", "embedding": "embedding", "scores": "scores",
             "p_values": "p-values"}  # fmt: skip
    for moment in sorted({row["checked_at"] for row in rows if row["kind"] == "drift"})[-_LOOKS:]:
        here = [row for row in rows if row["kind"] == "drift" and row["checked_at"] == moment]
        for kind, name in kinds.items():
            mine = [row for row in here if row["name"].startswith(f"{kind}:")]
            if mine:
                # The finding that alarms, else the most surprising one.
                top = min(mine, key=lambda row: (row["alarm"] is None, row["adjusted"], -row["value"]))
                series.setdefault(f"drift: {name} (effect)", []).append(
                    Point(moment, top["value"], alarm=top["alarm"] is not None)
                )
    for row in rows:
        if row["kind"] == "canary" and row["name"] in ("all lesions", "no lesion"):
            name = "planted lesions found" if row["name"] == "all lesions" else "flagged without a lesion"
            point = Point(row["checked_at"], row["value"], row["low"], row["high"], row["alarm"] is not None)
            series.setdefault(name, []).append(point)
    for moment in sorted({row["checked_at"] for row in rows if row["kind"] == "watch"})[-_LOOKS:]:
        standing = sum(
            row["kind"] == "watch" and row["checked_at"] == moment and row["alarm"] is not None for row in rows
        )
        series.setdefault("an alarm stands", []).append(Point(moment, float(standing > 0), alarm=standing > 0))
    return {name: points[-_LOOKS:] for name, points in series.items()}
