"""Define, list and show cohorts: those that were ingested, and views of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from memmc.config import Config
from memmc.errors import DataError
from memmc.lake.schemas import INSTANCES
from memmc.lake.tables import Lake
from memmc.lake.views import UNKNOWN, View, define, find_view, list_views, parse_rule
from memmc.pipeline.audit import recorded
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.results import CohortResult, CohortsResult

_SHOWN = ("split", "label", "view_position", "body_part", "modality", "manufacturer", "patient_sex")


@recorded("cohort-define", lambda done: {"cohort": done.cohort, "bases": done.bases})
def define_cohort(config: Config, name: str, bases: list[str], conditions: list[str]) -> CohortResult:
    """Name the instances of other cohorts that fit a rule.

    Args:
        name: of the view; the same definition twice is one.
        bases: ingested cohorts.
        conditions: ``column=value,value``; all must hold. UNKNOWN stands for no value.

    Raises:
        UsageError: a name that is taken or malformed, or a rule that is none.
        DataError: nothing stored is in it, or an instance is stored in two of its cohorts.
    """
    for one in (name, *bases):
        check_cohort(one)
    lake = Lake(config.lake.uri)
    define(lake, name, tuple(bases), parse_rule(conditions))
    return show_cohort(config, name)


def show_cohort(config: Config, name: str) -> CohortResult:
    """Return what a cohort is made of: its rule if it has one, and counts of its stored instances by attribute.

    Raises:
        DataError: nothing is stored under this name.
    """
    check_cohort(name)
    lake = Lake(config.lake.uri)
    view = find_view(lake, name)
    columns = ["patient_key", *_SHOWN]
    rows = lake.instances_with_labels(columns, None, {"cohort": name, "outcome": "stored"}).to_pylist()
    if not rows and view is None:
        raise DataError(f"nothing is stored in a cohort '{name}'; `memmc cohort list` shows those that there are")
    return _result(name, view, rows)


def list_cohorts(config: Config) -> CohortsResult:
    """Return every cohort and view with the number of its stored instances."""
    lake = Lake(config.lake.uri)
    names: list[str] = []
    if lake.exists(INSTANCES):
        names = sorted(set(lake.read(INSTANCES, ["cohort"], filter={"outcome": "stored"})["cohort"].to_pylist()))
    names += [view.name for view in list_views(lake)]
    results: list[dict[str, Any]] = []
    for name in names:
        where = {"cohort": name, "outcome": "stored"}
        rows = lake.instances_with_labels(["patient_key"], None, where).to_pylist()
        results.append(_result(name, find_view(lake, name), rows).as_dict())
    return CohortsResult(results)


def _result(name: str, view: View | None, rows: list[dict[str, Any]]) -> CohortResult:
    shown = [column for column in _SHOWN if rows and column in rows[0]]
    return CohortResult(
        cohort=name,
        bases=list(view.bases) if view else [],
        rule={column: [_text(value) for value in allowed] for column, allowed in view.rule.items()} if view else {},
        created_at=view.created_at if view else "",
        instances=len(rows),
        patients=len({row["patient_key"] for row in rows}),
        counts={column: dict(sorted(Counter(_text(row[column]) for row in rows).items())) for column in shown},
    )


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)
