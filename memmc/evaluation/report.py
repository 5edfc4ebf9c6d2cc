"""The report: one HTML file that needs nothing else, to be read by people, mailed and printed.

It holds no script and no reference to another place, and its Content Security
Policy forbids both, so a hostile string in the data can neither run nor call home.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memmc.errors import StorageError
from memmc.evaluation import figures
from memmc.evaluation.controls import CONTROL_TITLES
from memmc.evaluation.findings import findings
from memmc.evaluation.metrics import Interval, roc_curve
from memmc.evaluation.report_data import Case, ReportData

OUTCOMES = ("stored", "duplicate", "excluded", "quarantined")
OUTCOME_MEANINGS = {
    "stored": "accepted, pixels in the table",
    "duplicate": "the same object again",
    "excluded": "outside the selection",
    "quarantined": "unreadable or unsafe",
}
MAX_CHART_REASONS = 14


@dataclass(frozen=True)
class _Gallery:
    title: str
    text: str
    absent: str
    cases: list[dict[str, Any]]


def write_report(data: ReportData, out_path: str | Path) -> Path:
    """Write the report as one self-contained HTML file and return its path.

    The file appears whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    path = Path(out_path)
    page = render_report(data)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise StorageError(f"report cannot be written ({error.strerror}); check the output folder") from None
    return path


def render_report(data: ReportData) -> str:
    """Return the page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent,
        number=_number,
        pvalue=_p_value,
        duration=_duration,
        span=_span,
        count=_count,
        score=_score,
        png=figures.png_uri,
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        findings=findings(data),
        galleries=_galleries(data),
        charts=_charts(data),
        control_titles=CONTROL_TITLES,
        ingest=_ingest(data),
        outcome_meanings=OUTCOME_MEANINGS,
        groupings=list(dict.fromkeys(group.grouping for group in data.groups)),
        heat_scale=figures.heat_scale_png(),
    )


def _charts(data: ReportData) -> dict[str, str]:
    """Return the SVG of every chart whose data is there."""
    charts: dict[str, str] = {}
    evaluation = data.evaluation
    line = data.calibration.threshold, "pooled threshold" if data.calibration.strata else "threshold"
    if evaluation is not None:
        curves = {
            f"{control.name} ({control.auroc:.3f})": roc_curve(evaluation.labels, control.scores)
            for control in data.controls
        }
        model = roc_curve(evaluation.labels, evaluation.scores)
        charts["roc"] = figures.roc_figure(model, f"model ({evaluation.auroc:.3f})", curves)
        groups = {
            "normal": evaluation.scores[~evaluation.labels],
            "abnormal": evaluation.scores[evaluation.labels],
        }
        charts["scores"] = figures.histogram_figure(groups, *line)
    elif np.size(data.scores):
        charts["scores"] = figures.histogram_figure({"all scans": data.scores}, *line)
    if data.ingest:
        charts["ingest"] = figures.ingest_figure(_ingest_rows(data))
    if data.training is not None and np.size(data.training.steps):
        curve = data.training
        charts["training"] = figures.training_figure(
            curve.steps, curve.losses, curve.validation_steps, curve.validation_losses
        )
    return charts


def _galleries(data: ReportData) -> list[_Gallery]:
    labelled = data.evaluation is not None
    flagged_all = "No normal scan was flagged." if labelled else "No labels: false alarms are not known."
    missed_none = "No abnormal scan was missed." if labelled else "No labels: misses are not known."
    rows: list[tuple[str, str, str, Sequence[Case]]] = [
        ("Most abnormal", "Highest scores of the cohort.", "No scans were given.", data.most_abnormal),
        ("Calmest normals", "Lowest scores among scans labelled normal.", "No labelled normal scans were given.",
         data.calmest_normals),
        ("Typical normals", "Scans labelled normal, nearest to their median score.",
         "No labelled normal scans were given.", data.typical_normals),
        ("Missed", "Labelled abnormal, below the threshold; lowest scores first.", missed_none, data.missed_abnormals),
        ("False alarms", "Labelled normal, flagged; highest scores first.", flagged_all, data.flagged_normals),
    ]  # fmt: skip
    scale = data.calibration.map_scale
    return [
        _Gallery(title, text, absent, [_card(case, scale) for case in cases]) for title, text, absent, cases in rows
    ]


def _card(case: Case, map_scale: float) -> dict[str, Any]:
    return {
        "case": case,
        "image": figures.image_png(case.image),
        "overlay": figures.overlay_png(case.image, case.anomaly_map, map_scale),
        "outline": None if case.mask is None else figures.mask_outline(case.mask),
        "mask_shape": None if case.mask is None else case.mask.shape,
        "peak": float(np.max(case.anomaly_map)) / map_scale if map_scale > 0 else 0.0,
    }


def _ingest(data: ReportData) -> dict[str, Any]:
    totals = {outcome: sum(row.count for row in data.ingest if row.outcome == outcome) for outcome in OUTCOMES}
    order = sorted(data.ingest, key=lambda row: (OUTCOMES.index(row.outcome), -row.count))
    return {"totals": totals, "seen": sum(totals.values()), "rows": order}


def _ingest_rows(data: ReportData) -> list[tuple[str, str, int]]:
    """Return one bar per reason, the rarest gathered into one."""
    rows = [(row.outcome, row.reason or row.outcome, row.count) for row in _ingest(data)["rows"]]
    if len(rows) <= MAX_CHART_REASONS:
        return rows
    common = sorted(rows, key=lambda row: -row[2])[: MAX_CHART_REASONS - 1]
    kept = [row for row in rows if row in common]
    return [*kept, ("", "other reasons", sum(row[2] for row in rows) - sum(row[2] for row in kept))]


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


def _score(value: float) -> str:
    return f"{value:#.4g}"


def _count(value: int) -> str:
    return f"{value:,}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}%}"


def _span(interval: Interval, percent: bool = False) -> str:
    if percent:
        return f"{interval.low:.1%} – {interval.high:.1%}"
    return f"{interval.low:.3f} – {interval.high:.3f}"


def _p_value(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"
