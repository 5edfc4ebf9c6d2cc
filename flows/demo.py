"""The demo's three steps as flows, one after the other on one local server."""

from __future__ import annotations

from typing import Any

from flows.embedded import prepare
from memmc.config import Config
from memmc.pipeline.demo import Steps
from memmc.pipeline.identity import home_directory
from memmc.pipeline.progress import Progress


def steps() -> Steps:
    """Return the flows as `memmc.pipeline.demo.run_demo` takes them; the server starts while scans are generated."""
    prepare(home_directory())
    return Steps(ingest=_ingest, train=_train, score=_score)


def _ingest(config: Config, source: str, cohort: str, *, labels_file: str, progress: Progress) -> Any:
    from flows import ingest

    return ingest.run(config, source, cohort, None, labels_file, home=home_directory(), progress=progress)


def _train(config: Config, cohort: str, *, progress: Progress) -> Any:
    from flows import train

    return train.run(config, cohort, home=home_directory(), progress=progress)


def _score(config: Config, cohort: str, model: str | None, *, progress: Progress) -> Any:
    from flows import score

    return score.run(config, cohort, model, home=home_directory(), progress=progress)
