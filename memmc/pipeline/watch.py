"""The dead-man switch: gathers what its rules ask for, from the lake and the registry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memmc.config import Config
from memmc.errors import IntegrityError, ModelError
from memmc.lake.schemas import INSTANCES, SCHEMAS, SCORES
from memmc.lake.tables import Lake
from memmc.monitoring import watch as rules_of
from memmc.monitoring.watch import Alarm, Weights
from memmc.pipeline.identity import home_directory
from memmc.pipeline.models import open_model, tracking_of
from memmc.pipeline.observed import with_only, without
from memmc.pipeline.quality import kept_from_scores
from memmc.pipeline.score_plan import newer, since_limits
from memmc.registry.models import all_versions, champion_among, registered_at, resolve

_LATEST = 200  # scores that are asked whether they are all one
_COUNTED = ("stored", "excluded", "quarantined")


@dataclass(frozen=True)
class Watched:
    """What the switch found.

    Attributes:
        alarms: those that stand.
        model: name/version of the champion, or the model that was named, as it was named; None where there is none.
        sound: the model can be opened and its weights are weights, so that the other checks can run.
    """

    alarms: list[Alarm]
    model: str | None
    sound: bool


def watch(config: Config, cohort: str, model: str | None, since: str | None, now: datetime) -> Watched:
    """Ask every rule of the dead-man switch about a cohort.

    Args:
        config: settings `monitor.*`.
        cohort: looked at.
        model: watched in place of the champion; then the alias is not asked for.
        since: begin of the window, as for `drift`.
        now: end of the window.

    Raises:
        StorageError: the lake or the registry cannot be reached.
    """
    lake, tracking, rules = Lake(config.lake.uri), tracking_of(config, home_directory()), config.monitor
    stored = _instances(lake, cohort)
    window = _window(lake, cohort, stored, since, now - timedelta(days=rules.window_days))
    before = without(stored, "object_key", window["object_key"])
    scores = _scores(lake, cohort)
    latest = _latest(window, scores)
    version = resolve(tracking, model) if model else champion_among(all_versions(tracking), cohort)
    reference = model or (version.ref if version else None)
    weights = _weights(config, reference) if reference else None
    found = [
        rules_of.no_data(_newest(stored), now, rules),
        rules_of.quarantine_rate(_quarantined(before), _quarantined(window), rules),
        rules_of.scoring_backlog(_unscored(lake, cohort, stored, scores), now, rules),
        rules_of.constant_scores([row["anomaly_score"] for row in latest[:_LATEST]]),
        None
        if model
        else rules_of.stale_alias(
            version.ref if version else None, list(dict.fromkeys(row["model"] for row in latest))
        ),
        rules_of.broken_weights(weights) if weights else None,
        rules_of.old_champion(registered_at(tracking, version), now, rules) if version else None,
    ]
    alarms = [alarm for alarm in found if alarm is not None]
    sound = version is not None and not any(alarm.name == "broken_weights" for alarm in alarms)
    return Watched(alarms, reference, sound)


def _instances(lake: Lake, cohort: str) -> pa.Table:
    columns = ["object_key", "sop_instance_uid", "outcome", "ingested_at"]
    if not lake.exists(INSTANCES):
        return SCHEMAS[INSTANCES].empty_table().select(columns)
    return lake.read(INSTANCES, columns, None, {"cohort": cohort, "outcome": _COUNTED})


def _window(lake: Lake, cohort: str, rows: pa.Table, since: str | None, begin: datetime) -> pa.Table:
    if since is None or not rows.num_rows:
        return newer(rows, begin, None)
    return newer(rows, *since_limits(lake, cohort, since))


def _scores(lake: Lake, cohort: str) -> pa.Table:
    """Return a cohort's score rows, the newest first."""
    columns = ["sop_instance_uid", "model", "anomaly_score", "scored_at"]
    if not lake.exists(SCORES):
        return SCHEMAS[SCORES].empty_table().select(columns)
    return lake.read(SCORES, columns, None, {"cohort": cohort}).sort_by([("scored_at", "descending")])


def _newest(rows: pa.Table) -> datetime | None:
    return pc.call_function("max", [with_only(rows, "outcome", ["stored"])["ingested_at"]]).as_py()


def _quarantined(rows: pa.Table) -> tuple[int, int]:
    return with_only(rows, "outcome", ["quarantined"]).num_rows, rows.num_rows


def _unscored(lake: Lake, cohort: str, rows: pa.Table, scores: pa.Table) -> list[datetime]:
    """Return when each instance was stored that should have a score of some model and has none."""
    if not rows.num_rows:
        return []
    waiting = without(with_only(rows, "outcome", ["stored"]), "sop_instance_uid", scores["sop_instance_uid"])
    return without(waiting, "sop_instance_uid", kept_from_scores(lake, cohort))["ingested_at"].to_pylist()


def _latest(window: pa.Table, scores: pa.Table) -> list[dict[str, Any]]:
    """Return the newest score of each instance of the window, the newest first; of everything where it has none."""
    made = scores.filter(pc.call_function("is_valid", [scores["anomaly_score"]]))
    inside = with_only(made, "sop_instance_uid", window["sop_instance_uid"])
    chosen = inside if inside.num_rows else made.slice(0, _LATEST)
    newest: dict[str, dict[str, Any]] = {}
    for row in chosen.to_pylist():
        newest.setdefault(row["sop_instance_uid"], row)
    return list(newest.values())


def _weights(config: Config, reference: str) -> Weights:
    """Load a model as scoring would; count its weight matrices, and those of one value."""
    from memmc.model.artifact import load_model

    try:
        loaded = load_model(open_model(config, home_directory(), reference).folder)
    except (ModelError, IntegrityError) as error:
        return Weights(0, 0, str(error))
    matrices = [tensor for tensor in loaded.model.parameters() if tensor.ndim >= 2]
    return Weights(len(matrices), sum(bool((tensor == tensor.flatten()[0]).all()) for tensor in matrices))
