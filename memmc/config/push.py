"""Where results go back to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from memmc.config.section import ServerSection


class PushConfig(ServerSection):
    """The archive that takes results, and what it is given. A password may also stand in MEMMC_PUSH_PASSWORD."""

    uri: str | None = Field(
        default=None,
        description="dicomweb+https://host/dicom-web (QIDO-RS, STOW-RS), dicom://AETITLE@host:port (C-FIND, C-STORE), "
        "or dicom+tls://, the same over TLS.",
    )
    objects: tuple[Literal["sr", "sc"], ...] = Field(
        default=("sr", "sc"),
        min_length=1,
        description="What each image gets: sr, a report of score, verdict and regions; sc, a picture with heat map.",
    )
    ae_title: str = Field(
        default="MEMMC",
        pattern=r"^[\x21-\x5b\x5d-\x7e]{1,16}$",
        description="Our own Application Entity title, by which a DICOM archive knows us.",
    )
    side_px: int = Field(default=512, ge=64, le=4096, description="Longer side of a picture, px.")
    tries: int = Field(
        default=4, ge=1, le=8, description="How often a server that is busy or gone is asked, 1, 4, 16, ... s apart."
    )
