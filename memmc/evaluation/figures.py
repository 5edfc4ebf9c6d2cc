"""Figures of the report: charts as inline SVG, scans as PNG, one house style.

Charts take their colours from the page (CSS variables), so that one SVG reads
well in the light, in the dark and on paper. They use matplotlib's objects only
and no global figure state. Colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memmc.evaluation.metrics import RocCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour drawn -> variable of the page's style sheet it stands for.
_INK, _MUTED, _GRID, _NORMAL, _ABNORMAL, _MODEL = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _NORMAL: "--normal",
    _ABNORMAL: "--abnormal",
    _MODEL: "--accent",
}
_CONTROL_DASHES = ((0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (2.5, 1.5)))
_OUTCOME_COLOURS = {"stored": _NORMAL, "duplicate": _MUTED, "excluded": _MODEL, "quarantined": _ABNORMAL}

MAX_SIDE = 256  # thumbnails are reduced to this, px
MAX_LABEL = 32  # longer labels are cut, characters

# Heat ramp: share of map_scale -> red, green, blue, opacity. Luminance rises with the value; the lower third, where
# most of a normal scan lies, stays nearly clear.
_HEAT = np.array(
    [
        [0.00, 0.45, 0.05, 0.35, 0.00],
        [0.30, 0.55, 0.07, 0.33, 0.04],
        [0.55, 0.80, 0.20, 0.20, 0.45],
        [0.78, 0.97, 0.56, 0.05, 0.74],
        [1.00, 1.00, 0.93, 0.45, 0.90],
    ]
)


def roc_figure(model: RocCurve, model_title: str, controls: Mapping[str, RocCurve]) -> str:
    """Return the ROC curve of the model with those of the controls, as SVG."""
    figure, axes = _chart(5.4, 4.2)
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, alpha=0.5)
    for (title, curve), dashes in zip(controls.items(), _CONTROL_DASHES * (1 + len(controls) // 4), strict=False):
        axes.plot(
            curve.false_positive_rate,
            curve.sensitivity,
            color=_MUTED,
            linewidth=1.2,
            linestyle=dashes,
            label=_plain(title),
        )
    axes.plot(model.false_positive_rate, model.sensitivity, color=_MODEL, linewidth=2.4, label=_plain(model_title))
    axes.fill_between(model.false_positive_rate, model.sensitivity, color=_MODEL, alpha=0.08, linewidth=0)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_xlabel("false-positive rate (normals flagged)")
    axes.set_ylabel("sensitivity (abnormals flagged)")
    _legend(axes, loc="lower right", reverse=True)
    return _svg(figure, "roc", "ROC curves of the model and of the controls")


def histogram_figure(groups: Mapping[str, ArrayLike], threshold: float, called: str = "threshold") -> str:
    """Return score histograms as SVG.

    Args:
        groups: scores (N,) per name; "normal" and "abnormal" get their colours, others grey.
        threshold: where the line is drawn.
        called: what the line is.
    """
    figure, axes = _chart(5.4, 4.2)
    values = {name: np.asarray(scores, dtype=np.float64) for name, scores in groups.items()}
    everything = np.concatenate([*values.values(), [threshold]])
    low, high = float(everything.min()), float(everything.max())
    pad = (high - low or 1.0) * 0.02
    edges = np.linspace(low - pad, high + pad, int(np.clip(np.sqrt(everything.size) * 2, 12, 48)) + 1).tolist()
    colours = {"normal": _NORMAL, "abnormal": _ABNORMAL}
    for name, scores in values.items():
        colour = colours.get(name, _MUTED)
        axes.hist(scores, edges, color=colour, alpha=0.32, linewidth=0)
        axes.hist(
            scores, edges, color=colour, histtype="step", linewidth=1.6, label=_plain(f"{name} ({scores.size:,})")
        )
    axes.axvline(threshold, color=_INK, linewidth=1.4, linestyle=(0, (4, 2)), label=called)
    axes.set_xlabel("anomaly score (higher = more abnormal)")
    axes.set_ylabel("images")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    _legend(axes, loc="upper right")
    return _svg(figure, "scores", f"Histogram of anomaly scores with the {called}")


def ingest_figure(counts: Sequence[tuple[str, str, int]]) -> str:
    """Return horizontal bars of (outcome, row title, objects), first row on top, as SVG."""
    figure, axes = _chart(5.4, 0.55 + 0.3 * len(counts))
    positions = np.arange(len(counts))
    totals = [count for _, _, count in counts]
    axes.barh(positions, totals, height=0.66, color=[_OUTCOME_COLOURS.get(outcome, _MUTED) for outcome, _, _ in counts])
    for position, total in zip(positions, totals, strict=True):
        axes.annotate(
            f"{total:,}", (total, position), (4, 0), textcoords="offset points", va="center", color=_INK, fontsize=9
        )
    axes.set_yticks(positions, [_plain(title) for _, title, _ in counts])
    axes.set(ylim=(len(counts) - 0.45, -0.55), xlim=(0, max(totals, default=1) * 1.16 or 1))
    axes.grid(visible=False)
    axes.xaxis.set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return _svg(figure, "ingest", "Objects per outcome and reason")


def training_figure(
    steps: ArrayLike, losses: ArrayLike, validation_steps: ArrayLike = (), validation_losses: ArrayLike = ()
) -> str:
    """Return the loss over steps, logarithmic where it spans a decade, as SVG."""
    figure, axes = _chart(10.6, 3.2)
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    keep = np.unique(np.linspace(0, max(len(x) - 1, 0), 800).astype(int)) if len(x) else np.zeros(0, dtype=int)
    if len(x) >= 60:
        width = len(x) // 30
        smooth = np.convolve(y, np.ones(width) / width, mode="valid")
        middle = x[(width - 1) // 2 : (width - 1) // 2 + len(smooth)]
        axes.plot(x[keep], y[keep], color=_MUTED, linewidth=0.8, alpha=0.55, label="each logged step")
        axes.plot(middle, smooth, color=_MODEL, linewidth=2.2, label=f"mean of {width} steps logged")
    else:
        axes.plot(x, y, color=_MODEL, linewidth=2.2, label="training")
    if np.size(validation_losses):
        axes.plot(np.asarray(validation_steps), np.asarray(validation_losses), color=_ABNORMAL, marker="o",
                  markersize=4, linewidth=1.6, label="held-out normals")  # fmt: skip
    if len(y) and y.min() > 0 and y.max() / y.min() > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("reconstruction loss")
    _legend(axes, loc="upper right")
    return _svg(figure, "training", "Training loss over optimiser steps")


def image_png(image: NDArray[np.floating]) -> str:
    """Return a grey PNG data URI of an (H, W) image in [0, 1], at most `MAX_SIDE` px a side."""
    grey = np.clip(_resized(image, _thumbnail_size(image.shape)), 0, 1)
    return _png((grey * 255 + 0.5).astype(np.uint8))


def overlay_png(image: NDArray[np.floating], anomaly_map: NDArray[np.floating], map_scale: float) -> str:
    """Return a PNG data URI of the heat map over its image.

    Args:
        image: (H, W) in [0, 1].
        anomaly_map: (h, w), resampled to the image.
        map_scale: map value of the hottest colour; larger values are clipped, so images compare.
    """
    size = _thumbnail_size(image.shape)
    grey = np.clip(_resized(image, size), 0, 1)[..., None]
    share = np.clip(_resized(anomaly_map, size) / max(map_scale, 1e-12), 0, 1)
    colour, opacity = _heat(share)
    return _png(((grey * (1 - opacity) + colour * opacity) * 255 + 0.5).astype(np.uint8))


def heat_scale_png() -> str:
    """Return the colour scale, cold to hot over mid grey, as a PNG data URI one pixel high."""
    colour, opacity = _heat(np.linspace(0, 1, 256)[None])
    return _png(((0.35 * (1 - opacity) + colour * opacity) * 255 + 0.5).astype(np.uint8))


def mask_outline(mask: NDArray[np.bool_]) -> str:
    """Return an SVG path along the pixel edges of an (H, W) mask, in units of pixels."""
    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    parts = [f"M{x} {y}h1" for y, x in zip(rows.tolist(), columns.tolist(), strict=True)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    parts += [f"M{x} {y}v1" for y, x in zip(rows.tolist(), columns.tolist(), strict=True)]
    return "".join(parts)


def _heat(share: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    channels = [np.interp(share, _HEAT[:, 0], _HEAT[:, channel]) for channel in range(1, 5)]
    return np.stack(channels[:3], axis=-1), channels[3][..., None]


def _thumbnail_size(shape: tuple[int, ...]) -> tuple[int, int]:
    factor = min(1.0, MAX_SIDE / max(shape))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _resized(image: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    from PIL import Image

    pixels = np.ascontiguousarray(image, dtype=np.float32)
    if pixels.shape == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _png(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chart(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure, inches, with one bare axes in the house style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelcolor=_MUTED, labelsize=9, length=3, color=_GRID)
    axes.xaxis.label.set(color=_MUTED, fontsize=9.5)
    axes.yaxis.label.set(color=_MUTED, fontsize=9.5)
    return figure, axes


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=2.4, **options)


def _plain(text: str) -> str:
    """Return text that matplotlib draws as it stands, short enough and without reading mathematics into it."""
    text = text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
    return text.replace("$", r"\$")


def _svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an inline SVG element, free of outside references and of ids used elsewhere."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    assert view is not None
    widest = round(figure.get_figwidth() * 108)  # px: 1.5 times the size drawn, or its text would outgrow the page's
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would apply to the whole page
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg class="chart" style="max-width:{widest}px" role="img" aria-label="{title}" {view.group()}>{body}'
