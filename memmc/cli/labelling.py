"""`memmc label`: labels that arrive later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import CohortOption, ConfigOption, DryRunOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.results import LabelResult


def label(
    labels: Annotated[
        Path,
        typer.Option(
            "--labels",
            metavar="FILE.csv",
            help="Columns label, and path (as ingested, or a SOPInstanceUID) or sop_instance_uid (also as exported).",
        ),
    ],
    cohort: CohortOption,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Give stored images the labels of a table; the newest opinion holds, pixels are not touched."""
    from memmc.pipeline.relabel import relabel

    with call(lake, config, settings, as_json=as_json) as run:
        result = relabel(run.config, cohort, labels, dry_run=dry_run)
        run.finish(result, lambda: summary(result, dry_run))


def summary(result: LabelResult, dry_run: bool) -> str:
    """What changed, and what the table names that is not there."""
    changed = ", ".join(f"{count} {label}" for label, count in result.labels.items()) or "nothing"
    lines = [f"{'would set' if dry_run else 'set'} {changed}; {result.unchanged} labels are so already"]
    if result.unknown:
        lines.append(f"{result.unknown} of {result.stated} names are not stored in cohort {result.cohort}")
    return "\n".join(lines)
