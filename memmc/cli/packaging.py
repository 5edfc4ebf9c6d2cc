"""`memmc export`: a model as files for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import ConfigOption, JsonOption, LakeOption, ModelOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.results import PackageResult


class ExportFormat(StrEnum):
    """What `memmc export` writes."""

    torch = "torch"
    onnx = "onnx"
    both = "both"


def export(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New or empty folder.")],
    model: ModelOption = None,
    form: Annotated[
        ExportFormat, typer.Option("--format", help="A torch.export program, ONNX, or both.")
    ] = ExportFormat.both,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the whole scorer as files: stored pixels in; score, p-value, verdict and map out."""
    from memmc.pipeline.package import package

    formats = ("torch", "onnx") if form is ExportFormat.both else (form.value,)
    with call(lake, config, settings, as_json=as_json) as run:
        result = package(run.config, model, out, formats, progress=run.terminal)
        run.finish(result, lambda: summary(result))


def summary(result: PackageResult) -> str:
    """The folder, and how far each file is from the lake's scorer."""
    lines = [f"{result.model}, calibration {result.calibration_id}: {result.folder}"]
    lines += [
        f"  {name:<11}  differs on {result.scans} scans by {value:.1e} of the score at most"
        for name, value in result.score_difference.items()
    ]
    return "\n".join(lines)
