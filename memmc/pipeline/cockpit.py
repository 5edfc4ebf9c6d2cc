"""What whoever watches a run wants to see: curves, the most abnormal scans, where it is tracked, the lake's state.

Pictures are small, since the orchestrator keeps each of them; pixels are shown only where `cockpit.pixels` says so.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from memmc.config import Config
from memmc.lake.schemas import INSTANCES, SCORES
from memmc.lake.tables import Lake
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.select import newest_calibration, score_rows
from memmc.registry.models import CHAMPION, all_versions, resolve

MOST_BYTES = 160_000  # of one picture
_TILE_PX, _GAP_PX, _CAPTION_PX, _PAIRS_PER_ROW = 144, 6, 22, 3
_QUALITIES = (85, 70, 50, 30)  # of JPEG; the first that fits


def training_curves(config: Config, model: str) -> bytes | None:
    """Return a PNG of loss and of the share of time spent waiting for data, by step; None where nothing was logged.

    Args:
        model: name/version of a registered model.
    """
    tracking = tracking_of(config, home_directory())
    run = resolve(tracking, model).run_id
    loss, waiting = (tracking.metric_history(run, name) for name in ("loss", "data_wait"))
    if not loss:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    line: dict[str, Any] = {"linewidth": 1.2, "marker": "o", "markersize": 4, "clip_on": False}  # one point is seen too
    left.plot(*zip(*loss, strict=True), color="#1f5fa8", **line)
    left.set(title="Loss", xlabel="step")
    if waiting:
        steps, shares = zip(*waiting, strict=True)
        right.plot(steps, [100 * share for share in shares], color="#b3541e", **line)
    right.set(title="Waiting for data, % of the time", xlabel="step", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tracked_at(config: Config, model: str) -> str | None:
    """Return the address of a model's run in the tracking server's pages; None where there is no server."""
    tracking = tracking_of(config, home_directory())
    run = resolve(tracking, model).run_id
    if run is None or not tracking.uri.startswith(("http://", "https://")):
        return None
    with tracking.reaching("read"):
        experiment = tracking.client.get_run(run).info.experiment_id
    return f"{tracking.place.rstrip('/')}/#/experiments/{experiment}/runs/{run}"


def most_abnormal(config: Config, cohort: str, model: str, since: datetime) -> list[dict[str, Any]]:
    """Return the `cockpit.scans` most abnormal instances that were scored since a moment, the most abnormal first.

    Returns:
        Rows with sop_instance_uid (a pseudonym), anomaly_score, p_value, is_abnormal and stratum.
    """
    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model)
    rows = score_rows(lake, cohort, opened, newest_calibration(lake, opened)["calibration_id"])
    fresh = [row for row in rows.values() if row["scored_at"] >= since]
    fresh.sort(key=lambda row: (row["p_value"], -row["anomaly_score"]))
    columns = ("sop_instance_uid", "anomaly_score", "p_value", "is_abnormal", "stratum")
    return [{name: row[name] for name in columns} for row in fresh[: config.cockpit.scans]]


def contact_sheet(config: Config, cohort: str, model: str, shown: Sequence[dict[str, Any]]) -> bytes:
    """Return a JPEG of at most `MOST_BYTES`: each scan beside its heat map, below p-value and end of the pseudonym.

    Args:
        shown: rows of `most_abnormal`.
    """
    from PIL import Image, ImageDraw, ImageFont

    pairs = _pairs(config, cohort, model, [row["sop_instance_uid"] for row in shown])
    columns = min(_PAIRS_PER_ROW, len(pairs))
    width, height = 2 * _TILE_PX + _GAP_PX, _TILE_PX + _CAPTION_PX
    lines = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP_PX) + _GAP_PX, lines * (height + _GAP_PX) + _GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for number, (row, (scan, heat)) in enumerate(zip(shown, pairs, strict=True)):
        left = _GAP_PX + number % columns * (width + _GAP_PX)
        top = _GAP_PX + number // columns * (height + _GAP_PX)
        sheet.paste(scan, (left, top))
        sheet.paste(heat, (left + _TILE_PX, top))
        mark = "abnormal" if row["is_abnormal"] else "normal"
        caption = f"...{row['sop_instance_uid'][-10:]}  p = {row['p_value']:.3g}  {mark}"
        draw.text((left, top + _TILE_PX + 2), caption, fill="black", font=font)
    return _small_jpeg(sheet)


def lake_status(config: Config) -> dict[str, Any]:
    """Return what the lake holds: objects by cohort and outcome, scores, and the champion if there is one.

    An absent table counts nothing.
    """
    lake = Lake(config.lake.uri)
    cohorts: dict[str, dict[str, int]] = {}
    if lake.exists(INSTANCES):
        counted = (
            lake.read(INSTANCES, ["cohort", "outcome"]).group_by(["cohort", "outcome"]).aggregate([([], "count_all")])
        )
        for row in sorted(counted.to_pylist(), key=lambda row: (row["cohort"], row["outcome"])):
            cohorts.setdefault(row["cohort"], {})[row["outcome"]] = row["count_all"]
    verdicts = lake.read(SCORES, ["is_abnormal"])["is_abnormal"].to_pylist() if lake.exists(SCORES) else []
    versions = all_versions(tracking_of(config, home_directory()))
    champions = [version.ref for version in versions if CHAMPION in version.aliases]
    return {
        "dataset_version": lake.version(INSTANCES) if lake.exists(INSTANCES) else None,
        "cohorts": cohorts,
        "scores": len(verdicts) - verdicts.count(None),
        "abnormal": verdicts.count(True),
        "champions": champions,
        "models": len(versions),
    }


def _pairs(config: Config, cohort: str, model: str, uids: list[str]) -> list[tuple[Any, Any]]:
    """Return for each instance its picture without and with heat, `_TILE_PX` wide, in the order of the UIDs."""
    import numpy as np
    from PIL import Image

    from memmc.pipeline.images import read_images
    from memmc.scoring.maps import decode_map, overlay_png

    lake = Lake(config.lake.uri)
    opened = open_model(config, home_directory(), model)
    calibration = newest_calibration(lake, opened)
    columns = ["sop_instance_uid", "anomaly_map", "map_height", "map_width"]
    where: dict[str, Any] = {
        "cohort": cohort,
        "calibration_id": calibration["calibration_id"],
        "sop_instance_uid": uids,
        "not_scored": None,  # what was refused before it was scored keeps both rows
    }
    kept = {row["sop_instance_uid"]: row for row in lake.read(SCORES, columns, filter=where).to_pylist()}
    pairs: list[tuple[Any, Any]] = []
    for uid, image in zip(uids, read_images(lake, cohort, uids), strict=True):
        row = kept[uid]
        heat = decode_map(row["anomaly_map"], row["map_height"], row["map_width"])
        scale = calibration["map_scale"]
        pictures = [overlay_png(image, values, scale, _TILE_PX) for values in (np.zeros_like(heat), heat)]
        tiles = [_square(Image.open(io.BytesIO(png))) for png in pictures]
        pairs.append((tiles[0], tiles[1]))
    return pairs


def _square(picture: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.pad(picture, (_TILE_PX, _TILE_PX), color="black")


def _small_jpeg(picture: Any) -> bytes:
    buffer = io.BytesIO()
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()
