"""The picture of an explanation: what the model saw, expected and marked, and what stands behind it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating]

_INK, _MUTED, _MARK, _BAR = "#1d232b", "#68727f", "#2aa7e0", "#3b6ea5"
_AROUND = 1  # patches of context on each side of a neighbour


def why_png(
    explanation: dict[str, Any],
    image_HW: Image,
    expected_HW: Image,
    anomaly_map_HW: Image,
    map_scale: float,
    neighbours: Sequence[Image],
    patch_size: int,
) -> bytes:
    """Return a PNG.

    Args:
        explanation: of `memmc explain`.
        image_HW: in [0, 1].
        expected_HW: the reconstruction, in [0, 1].
        anomaly_map_HW: its map.
        map_scale: top of the colour scale, of the calibration.
        neighbours: (H, W) in [0, 1], the scans `explanation["nearest"]` names, in that order.
        patch_size: px.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.6), dpi=110, layout="constrained", facecolor="white")
    rows: Any = figure.subfigures(3, 1, height_ratios=[1.35, 0.85, 1.0])
    _scan(rows[0], explanation, image_HW, expected_HW, anomaly_map_HW, map_scale, patch_size)
    _neighbours(rows[1], explanation, image_HW, neighbours, patch_size)
    _bars(rows[2], explanation)
    verdict = "abnormal" if explanation["is_abnormal"] else "normal"
    figure.suptitle(
        f"{verdict}: score {explanation['anomaly_score']:.3g}, p {explanation['p_value']:.3g}   "
        f"{explanation['model']}\n{explanation['sop_instance_uid']}   research software, not for diagnosis",
        fontsize=10,
        color=_INK,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _scan(
    row: Any, explanation: dict[str, Any], image: Image, expected: Image, anomaly: Image, scale: float, patch_size: int
) -> None:
    from matplotlib.patches import Rectangle

    axes = row.subplots(1, 3)
    titles = ("scan", "what the model expected", "heat map, same scale for every scan")
    for one, title, pixels in zip(axes, titles, (image, expected, image), strict=True):
        one.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        _bare(one, title)
    height, width = image.shape
    axes[2].imshow(
        anomaly, cmap="inferno", vmin=0, vmax=scale, alpha=0.55, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )
    region = explanation["region"]
    if region is not None:
        corner = (region["x_px"] - 0.5, region["y_px"] - 0.5)
        for one in (axes[0], axes[2]):
            one.add_patch(
                Rectangle(corner, region["width_px"], region["height_px"], fill=False, color=_MARK, linewidth=2)
            )
    patch = explanation["patch"]
    corner = (patch["column"] * patch_size - 0.5, patch["row"] * patch_size - 0.5)
    axes[0].add_patch(Rectangle(corner, patch_size, patch_size, fill=False, color="white", linewidth=1.2))


def _neighbours(
    row: Any, explanation: dict[str, Any], image: Image, neighbours: Sequence[Image], patch_size: int
) -> None:
    axes = row.subplots(1, 1 + max(len(neighbours), 1))
    crops = [(image, explanation["patch"], "this patch")]
    crops += [
        (pixels, item, f"normal, likeness {item['similarity']:.2f}")
        for pixels, item in zip(neighbours, explanation["nearest"], strict=True)
    ]
    for one, (pixels, place, title) in zip(axes, crops, strict=True):
        one.imshow(surroundings(pixels, place["row"], place["column"], patch_size), cmap="gray", vmin=0, vmax=1)
        _bare(one, f"{title}\nrow {place['row']}, column {place['column']}")
    row.supylabel("nearest normal patches", fontsize=8, color=_MUTED)


def surroundings(image_HW: Image, row: int, column: int, patch_size: int) -> Image:
    """Return a patch with its neighbours; black beyond the image."""
    padding = _AROUND * patch_size
    padded = np.pad(image_HW, padding)
    side = patch_size + 2 * padding
    return padded[row * patch_size : row * patch_size + side, column * patch_size : column * patch_size + side]


def _bars(row: Any, explanation: dict[str, Any]) -> None:
    axes = row.subplots(1, 3)
    memory = [f"layer {item['layer']} head {item['head']} slot {item['slot']}" for item in explanation["memory"]]
    levels = [f"level {number}" for number in range(1, len(explanation["levels"]) + 1)]
    groups = [
        ("share of the score, by scale", [item["part"] for item in explanation["scales"]],
         [item["share"] for item in explanation["scales"]]),
        ("mean gate of the encoder levels", levels, explanation["levels"]),
        ("attention of the region on memory slots", memory, [item["attention"] for item in explanation["memory"]]),
    ]  # fmt: skip
    for one, (title, names, values) in zip(axes, groups, strict=True):
        if not names:
            _bare(one, f"{title}: none")
            continue
        places = np.arange(len(names))
        one.barh(places, values, color=_BAR, height=0.66)
        one.set_yticks(places, names, fontsize=7)
        one.invert_yaxis()
        one.tick_params(axis="x", labelsize=7, colors=_MUTED)
        one.set_title(title, fontsize=8.5, color=_INK)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    if explanation["memory"]:
        everywhere = [item["attention_everywhere"] for item in explanation["memory"]]
        axes[2].plot(everywhere, np.arange(len(everywhere)), "|", color=_INK, markersize=12, label="all tokens")
        axes[2].legend(fontsize=7, frameon=False, loc="lower right")


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=8.5, color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
