"""Where the work runs and is watched."""

from __future__ import annotations

from pydantic import Field

from memmc.config.section import Section


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(default=None, description="Tracking server; an SQLite file under .memmc/ when absent.")


class RayConfig(Section):
    """Where the parallel work runs."""

    address: str | None = Field(default=None, description="Cluster to join; a local one is started when absent.")
    num_cpus: int | None = Field(
        default=None, ge=2, description="Logical CPUs of the local cluster; cores + 2 when absent."
    )
