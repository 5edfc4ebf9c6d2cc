"""Names of runs and artifacts: readable, in the alphabet Prefect asks for, never from patient data."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from memmc.errors import UsageError
from memmc.pipeline.approval import PERSON

# The form cohort names have everywhere; checked by Prefect before a run begins, so that no other text becomes a name.
_COHORT = r"^[a-z0-9][a-z0-9._-]{0,63}$"
TAG = "memmc"  # of every run, by which automations know it
Cohort = Annotated[str, Field(pattern=_COHORT)]
Person = Annotated[str, Field(pattern=PERSON)]


def check_cohort(cohort: str) -> None:
    """Refuse a name before Prefect sees it; its own refusal would repeat the text.

    Raises:
        UsageError: naming the form expected.
    """
    if not re.fullmatch(_COHORT, cohort):
        raise UsageError("cohort names are 1-64 of a-z, 0-9, '.', '_', '-' and begin with a letter or digit")


def run_name(step: str) -> Callable[[], str]:
    """Return what names a run of `step`: `ingest-cxr-20261122-2301`, in UTC."""

    def name() -> str:
        from prefect.runtime import flow_run

        return f"{step}-{flow_run.parameters['cohort']}-{datetime.now(UTC):%Y%m%d-%H%M}"

    return name


def artifact_key(*parts: str) -> str:
    """Join the parts into lowercase letters, digits and dashes.

    >>> artifact_key("ingest", "cxr_2026.a")
    'ingest-cxr-2026-a'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
