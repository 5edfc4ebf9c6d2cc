"""The quality gate: which stored instances are kept out of training, calibration and scores, and why.

Rows of `instances` never change, so verdicts live in the table `quality`; of
several rows of one instance the newest holds.
"""

from __future__ import annotations

from memmc.lake.schemas import QUALITY
from memmc.lake.tables import Lake


def flags_of(lake: Lake, cohort: str) -> dict[str, tuple[str, ...]]:
    """Return SOP Instance UID -> QC_* codes of the flagged instances of a cohort; none that passed or is not gated."""
    if not lake.exists(QUALITY):
        return {}
    rows = lake.read(QUALITY, ["sop_instance_uid", "flags", "gated_at"], filter={"cohort": cohort})
    newest = {row["sop_instance_uid"]: row["flags"] for row in rows.sort_by("gated_at").to_pylist()}
    return {uid: tuple(flags) for uid, flags in newest.items() if flags}
