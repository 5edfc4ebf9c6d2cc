"""`memmc maps` and `memmc explain`: where a scan is abnormal, and why the model says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import CohortOption, ConfigOption, JsonOption, LakeOption, ModelOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.results import WhyResult


def maps(
    cohort: CohortOption,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Pictures go here, named by pseudonymous UID.")],
    uids: Annotated[
        Path | None, typer.Option("--uids", metavar="FILE", help="Pseudonymous UIDs, one a line; else all scored.")
    ] = None,
    side: Annotated[int, typer.Option("--side", min=16, max=4096, help="Longer side of a picture, px.")] = 512,
    model: ModelOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a PNG of each scored scan with its heat map and regions, on one colour scale."""
    from memmc.pipeline.maps import maps as step
    from memmc.pipeline.maps import read_uids

    with call(lake, config, settings, as_json=as_json) as run:
        chosen = read_uids(uids) if uids else None
        result = step(run.config, cohort, out, model, uids=chosen, side_px=side, progress=run.terminal)
        run.finish(result, lambda: f"{result.pictures} pictures: {result.folder}")


def explain(
    cohort: CohortOption,
    uid: Annotated[str, typer.Option("--uid", metavar="UID", help="Pseudonymous SOP Instance UID of a scored scan.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="A picture of the explanation.")] = None,
    model: ModelOption = None,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show why a scan scored as it did: its region, memory slots, look-alikes among normals, scales and levels."""
    from memmc.pipeline.why import why

    with call(lake, config, settings, as_json=as_json) as run:
        result = why(run.config, cohort, uid, model, picture=out, progress=run.terminal)
        run.finish(result, lambda: summary(result))


def summary(result: WhyResult) -> str:
    """The verdict, then what stands behind it, a line each."""
    verdict = "abnormal" if result.is_abnormal else "normal"
    lines = [f"{result.sop_instance_uid}: {verdict}, score {result.anomaly_score:.4g}, p {result.p_value:.4g}"]
    region = result.region
    if region:
        lines.append(
            f"  region    {region['width_px']} x {region['height_px']} px at ({region['x_px']}, {region['y_px']}), "
            f"peak {region['peak']:.3g}, p {region['p_value']:.3g}"
        )
    else:
        lines.append("  region    none above the level; what follows is about the map's peak")
    lines.append(f"  patch     row {result.patch['row']}, column {result.patch['column']}")
    lines += [f"  scale     {item['share']:6.1%}  {item['part']}" for item in result.scales]
    lines += [f"  level     {gate:6.3f}  encoder level {number}" for number, gate in enumerate(result.levels, start=1)]
    lines += [
        f"  slot      {item['attention']:6.1%}  layer {item['layer']}, head {item['head']}, slot {item['slot']} "
        f"({item['attention_everywhere']:.1%} everywhere)"
        for item in result.memory
    ]
    lines += [
        f"  like      {item['similarity']:6.3f}  {item['sop_instance_uid']} row {item['row']}, column {item['column']}"
        for item in result.nearest
    ]
    return "\n".join(lines)
