"""`memmc compare`: what changes when one model takes another's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memmc.cli.options import CohortOption, ConfigOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.compare import CompareResult

_SHOWN = 20


def compare(
    model_a: Annotated[str, typer.Argument(metavar="MODEL_A", help="The model in use.")],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B", help="The model that may take its place.")],
    cohort: CohortOption,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which studies of a cohort change side between two models, and by how much."""
    from memmc.pipeline.compare import compare as step

    with call(lake, config, settings, as_json=as_json) as run:
        result = step(run.config, model_a, model_b, cohort, progress=run.terminal)
        run.finish(result, lambda: summary(result))


def summary(result: CompareResult) -> str:
    """Counts, quality where it can be measured, then the studies that change side, the farthest moved first."""
    lines = [
        f"{result.num_studies} studies: {result.num_flagged} newly abnormal, {result.num_cleared} no longer "
        f"({result.flagged_a} under {result.model_a}, {result.flagged_b} under {result.model_b})"
    ]
    if result.quality:
        quality, interval = result.quality, result.quality["interval"]
        lines.append(
            f"  AUROC of studies of unseen patients  {quality['auroc_a']:.3f} -> {quality['auroc_b']:.3f}  "
            f"({quality['difference']:+.3f}, {interval['low']:+.3f} to {interval['high']:+.3f})"
        )
    moved = [study for study in result.studies if study["change"] != "same"]
    lines += [
        f"  {study['change']:<8} {study['label']:<9} p {study['p_value_a']:.4f} -> {study['p_value_b']:.4f}  "
        f"{study['study_uid']}"
        for study in moved[:_SHOWN]
    ]
    if len(moved) > _SHOWN:
        lines.append(f"  and {len(moved) - _SHOWN} more (--json lists all)")
    return "\n".join(lines)
