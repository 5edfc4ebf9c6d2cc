"""Send to the tracking store what processes that are gone could not send."""

from __future__ import annotations

from dataclasses import dataclass

from memmc.config import Config
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import tracking_of
from memmc.pipeline.results import Result


@dataclass(frozen=True)
class ReplayResult(Result):
    """How many values and artifacts were sent, and how many the store refused for good, as of deleted runs."""

    sent: int
    refused: int


def replay(config: Config) -> ReplayResult:
    """Send what lies under `.memmc/spool` for this store; what a process at work holds, it sends itself.

    Raises:
        StorageError: the store cannot be reached; all stays.
    """
    tracking = tracking_of(config, home_directory())
    sent = tracking.replay()
    return ReplayResult(sent=sent, refused=tracking.lost)
