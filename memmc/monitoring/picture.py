"""The trend of a cohort's findings as small multiples, one point a look."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

# Okabe and Ito: told apart by colour-blind readers.
_CALM, _ALARM, _BAND = "#0072B2", "#D55E00", "#56B4E9"
_WIDE, _HIGH = 3.6, 1.9  # of one panel, inches


@dataclass(frozen=True)
class Point:
    """One finding: when, how large, its interval where it has one, whether it alarmed."""

    moment: datetime
    value: float
    low: float | None = None
    high: float | None = None
    alarm: bool = False


def trend(series: Mapping[str, Sequence[Point]], title: str, labels: Sequence[str] | None = None) -> bytes:
    """Return a PNG with one panel a series, on [0, 1]; alarms are orange.

    Args:
        series: points by name, oldest first.
        title: above all panels.
        labels: of the looks, in place of their numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(series)))
    rows = -(-max(1, len(series)) // columns)
    figure = Figure(figsize=(columns * _WIDE, rows * _HIGH + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    moments = sorted({point.moment for points in series.values() for point in points})
    place = {moment: number for number, moment in enumerate(moments, start=1)}
    for number, (name, points) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        _panel(axes, name, points, place)
        axes.set_xlim(0.5, max(2, len(moments)) + 0.5)
        if labels is not None:
            axes.set_xticks(range(1, len(labels) + 1), labels, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, name: str, points: Sequence[Point], place: Mapping[datetime, int]) -> None:
    at = [place[point.moment] for point in points]
    axes.plot(at, [point.value for point in points], color=_CALM, linewidth=1, zorder=2)
    banded = [point for point in points if point.low is not None]
    if banded:
        axes.fill_between(
            [place[point.moment] for point in banded],
            [point.low for point in banded],
            [point.high for point in banded],
            color=_BAND, alpha=0.3, linewidth=0,
        )  # fmt: skip
    for alarm, colour in ((False, _CALM), (True, _ALARM)):
        chosen = [point for point in points if point.alarm is alarm]
        axes.scatter(
            [place[point.moment] for point in chosen], [point.value for point in chosen],
            color=colour, s=28 if alarm else 9, zorder=3,
        )  # fmt: skip
    axes.set_title(name, fontsize=8, loc="left")
    axes.set_ylim(-0.03, 1.03)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
