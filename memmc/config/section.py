"""What all groups of settings have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ServerSection(Section):
    """How a server of an archive is reached; the settings of `memmc.sources.http.Access`."""

    user: str | None = Field(default=None, description="User of an Orthanc or DICOMweb server (HTTP Basic).")
    password_file: str | None = Field(default=None, description="File whose first line is that user's password.")
    token_file: str | None = Field(default=None, description="File whose first line is a bearer token, instead.")
    ca_file: str | None = Field(
        default=None, description="PEM certificates that a server's chain must end in; the system's when absent."
    )
    connect_seconds: float = Field(default=5.0, gt=0, description="Time to reach a server, s.")
    read_seconds: float = Field(default=20.0, gt=0, description="Time a server may stay silent, s.")
    answer_seconds: float = Field(default=300.0, gt=0, description="Time one whole answer may take, s.")
