"""Where the work runs and is watched."""

from __future__ import annotations

from zoneinfo import available_timezones

from pydantic import Field, model_validator

from memmc.config.section import Section


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(default=None, description="Tracking server; an SQLite file under .memmc/ when absent.")
    wait_minutes: float = Field(
        default=10.0, ge=0, description="How long a trained model waits for a server that is down, min."
    )


class RayConfig(Section):
    """Where the parallel work runs."""

    address: str | None = Field(
        default=None,
        description="Cluster to join, or the http(s):// address of a cluster's Jobs API, to which flows submit their "
        "steps; a local cluster is started when absent.",
    )
    job_directory: str | None = Field(
        default=None,
        description="Directory on the cluster in which submitted steps run; the cluster's own when absent.",
    )
    job_command: str = Field(default="memmc", description="The memmc command on the cluster.")
    ca_file: str | None = Field(
        default=None, description="PEM certificates for the Jobs API's chain; the system's when absent."
    )
    num_cpus: int | None = Field(
        default=None, ge=2, description="Logical CPUs of the local cluster; cores + 2 when absent."
    )
    ingest_from: int = Field(
        default=10_000,
        ge=0,
        description="New objects from which on an ingest starts a local cluster; fewer are converted by processes of "
        "its own, one per core.",
    )


class OperateConfig(Section):
    """When the work may run, and for how long."""

    window: str | None = Field(
        default=None,
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        description="Hours in which scoring works, HH:MM-HH:MM, over midnight too; it stops at the end and a later run "
        "goes on. At any time when absent.",
    )
    timezone: str = Field(
        default="UTC", description="IANA name of the zone of `window`, and of times in results for an archive."
    )
    deadline_minutes: float | None = Field(
        default=None, gt=0, description="A flow's step that takes longer is stopped, min; none is when absent."
    )

    @model_validator(mode="after")
    def _known_times(self) -> OperateConfig:
        if self.timezone not in available_timezones():
            raise ValueError("operate.timezone must be an IANA name such as Europe/Berlin")
        if self.window is not None and self.window[:5] == self.window[6:]:
            raise ValueError("operate.window must not end when it begins; leave it out to work at any time")
        return self
