"""`memmc gate`: which stored images are kept out of training, calibration and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memmc.cli import summaries
from memmc.cli.options import CohortOption, ConfigOption, DryRunOption, JsonOption, LakeOption, SetOption, call

if TYPE_CHECKING:
    from memmc.pipeline.results import GateResult


def gate(
    cohort: CohortOption,
    lake: LakeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Flag broken, turned, foreign and copied images; train, calibrate and score do it too and leave them out."""
    from memmc.pipeline.quality import gate as step
    from memmc.pipeline.quality import preview

    with call(lake, config, settings, as_json=as_json) as run:
        if dry_run:
            plan = preview(run.config, cohort)
            run.finish(plan, lambda: summaries.plan(plan))
            return
        result = step(run.config, cohort, progress=run.terminal)
        run.finish(result, lambda: summary(result))


def summary(result: GateResult) -> str:
    """Counts, then what each flag means."""
    from memmc.quality.flags import FLAGS

    first = f"{result.instances} instances, {result.gated} looked at now: {result.flagged} are kept out"
    return "\n".join([first, *(f"  {count:6d}  {flag}: {FLAGS[flag]}" for flag, count in result.flags.items())])
