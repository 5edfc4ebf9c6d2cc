"""What a run shows to whoever watches it."""

from __future__ import annotations

from pydantic import Field

from memmc.config.section import Section


class CockpitConfig(Section):
    """Artifacts of flow runs in the Prefect server."""

    pixels: bool = Field(
        default=False,
        description="Show the most abnormal scans of a batch, with their heat maps, in the Prefect server. Off by "
        "default: the server has one password for all, and an erasure does not reach what it keeps.",
    )
    scans: int = Field(default=9, ge=1, le=18, description="Scans of a batch that are shown, the most abnormal first.")
