"""`memmc maps` and `memmc explain`: where a scan is abnormal, and why the model says so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memmc.cli.options import CohortOption, ConfigOption, JsonOption, LakeOption, ModelOption, SetOption, call


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
