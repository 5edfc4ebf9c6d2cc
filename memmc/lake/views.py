"""Cohorts by rule: a name for the instances of other cohorts whose attributes have certain values; nothing is copied.

A view never changes, so what a model was trained on can be told later. Every
instance belongs to the cohort that it was ingested into: labels, verdicts of
the quality gate and scores are filed there, and a view reads them. An instance
that two of a view's cohorts hold would count twice; such a view is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from memmc.errors import DataError, UsageError
from memmc.lake.files import Filter, Value, values
from memmc.lake.schemas import ALLOWED, COHORTS, INSTANCES, SCHEMAS

if TYPE_CHECKING:
    from memmc.lake.tables import Lake

RULE_COLUMNS = (
    "view_position",
    "body_part",
    "laterality",
    "modality",
    "manufacturer",
    "manufacturer_model",
    "patient_sex",
    "patient_age_years",
    "photometric_interpretation",
    "transfer_syntax_uid",
    "lossy",
    "split",
    "label",
    "preprocess_id",
)
"""Columns of `instances` that a rule may name; `label` is the newest opinion."""

UNKNOWN = "UNKNOWN"
"""Stands for no value in a rule, as it does in the settings select.*."""


@dataclass(frozen=True)
class View:
    """A cohort by rule.

    Attributes:
        name: in one name space with ingested cohorts.
        bases: ingested cohorts.
        rule: column -> values that an instance may have; every column must hold.
        created_at: ISO 8601, UTC.
    """

    name: str
    bases: tuple[str, ...]
    rule: Mapping[str, tuple[Value, ...]]
    created_at: str = ""


def parse_rule(conditions: Collection[str]) -> dict[str, tuple[Value, ...]]:
    """Return the rule that ``column=value,value`` texts state.

    Raises:
        UsageError: no such column, one that is given twice, no value, or a value that is not of its column's type.
    """
    rule: dict[str, tuple[Value, ...]] = {}
    for condition in conditions:
        column, _, text = condition.partition("=")
        given = tuple(part.strip() for part in text.split(",") if part.strip())
        if column not in RULE_COLUMNS or not given:
            raise UsageError(f"--where expects COLUMN=VALUE[,VALUE]; columns are {', '.join(RULE_COLUMNS)}")
        if column in rule:
            raise UsageError(f"--where {column} is given twice; give its values at once, as {column}=VALUE,VALUE")
        rule[column] = tuple(sorted({_typed(column, part) for part in given}, key=str))
    return rule


def _typed(column: str, text: str) -> Value:
    kind, allowed = SCHEMAS[INSTANCES].field(column).type, ALLOWED.get(column)
    if allowed is not None:
        if text not in allowed:
            raise UsageError(f"--where {column}: expected one of {', '.join(allowed)}")
        return text
    if text == UNKNOWN:
        return None
    if pa.types.is_boolean(kind):
        if text not in {"true", "false"}:
            raise UsageError(f"--where {column}: expected true or false")
        return text == "true"
    if pa.types.is_integer(kind):
        if not text.isdecimal():
            raise UsageError(f"--where {column}: expected whole numbers")
        return int(text)
    return text


def define(lake: Lake, name: str, bases: tuple[str, ...], rule: Mapping[str, tuple[Value, ...]]) -> tuple[View, int]:
    """Make a view, once; return it and the number of stored instances in it.

    Raises:
        UsageError: the name is taken by something else, or a base is a view.
        DataError: nothing stored is in it, or an instance is stored in two of its cohorts.
    """
    view = View(name, tuple(dict.fromkeys(bases)), dict(rule))
    for base in view.bases:
        if find_view(lake, base) is not None:
            raise UsageError(f"'{base}' is a view itself; name the cohorts that it is made of")
    if lake.read(INSTANCES, ["cohort"], filter={"cohort": name}).num_rows and find_view(lake, name) is None:
        raise UsageError(f"'{name}' is a cohort that was ingested; choose another name")
    number = len(members(lake, view))
    if not number:
        raise DataError(f"no stored instance of {', '.join(view.bases)} fits the rule; see `memmc cohort show`")
    row = {
        "name": name,
        "bases": list(view.bases),
        "rule": json.dumps(view.rule, sort_keys=True),
        "created_at": datetime.now(UTC),
    }
    # Of two definitions of one name the first commit holds; the other finds it made.
    lake.append(COHORTS, pa.Table.from_pylist([row], schema=SCHEMAS[COHORTS]), run_id=f"define {name}")
    made = find_view(lake, name)
    if made is None or (made.bases, made.rule) != (view.bases, view.rule):
        raise UsageError(f"'{name}' is a view with another rule, and views do not change; choose another name")
    return made, number


def list_views(lake: Lake) -> list[View]:
    """Return all views, by name."""
    if not lake.exists(COHORTS):
        return []
    rows = lake.read(COHORTS).sort_by("name").to_pylist()
    return [
        View(
            row["name"],
            tuple(row["bases"]),
            {column: tuple(allowed) for column, allowed in json.loads(row["rule"]).items()},
            row["created_at"].isoformat(timespec="seconds"),
        )
        for row in rows
    ]


def find_view(lake: Lake, name: str) -> View | None:
    """Return the view of a name, or None for an ingested cohort."""
    return next((view for view in list_views(lake) if view.name == name), None)


def refuse_view(lake: Lake, name: str) -> None:
    """Refuse to add to, or take from, a view: it holds no rows of its own.

    Raises:
        UsageError: the name is that of a view.
    """
    view = find_view(lake, name)
    if view is not None:
        raise UsageError(f"'{name}' is a view of {', '.join(view.bases)}; name one of them, or a new cohort to ingest")


def members(lake: Lake, view: View, version: int | None = None) -> dict[str, str]:
    """Return SOP Instance UID -> cohort of the stored instances of a view.

    Raises:
        DataError: an instance is stored in two of its cohorts.
    """
    where = {**view.rule, "cohort": view.bases, "outcome": "stored"}
    rows = lake.instances_with_labels(["sop_instance_uid", "cohort"], version, where)
    uids = rows["sop_instance_uid"].to_pylist()
    twice = sum(count > 1 for count in Counter(uids).values())
    if twice:
        raise DataError(
            f"{twice} instances are stored in more than one of {', '.join(view.bases)}; a view takes each from one "
            "cohort: name fewer, or ingest them into one"
        )
    return dict(zip(uids, rows["cohort"].to_pylist(), strict=True))


def expand(lake: Lake, table: str, where: Filter, *, labels: bool = False) -> dict[str, Any]:
    """Return a filter in which a view's name has become its cohorts and its rule; any other filter as it is.

    Rows of tables that know nothing of a rule's columns are chosen by instance.

    Args:
        lake: where views are looked up.
        table: whose rows are filtered.
        where: may have ``cohort``, one name.
        labels: the caller applies ``label`` to the newest opinion; else a rule on labels chooses by instance too.
    """
    name = where.get("cohort")
    view = find_view(lake, name) if isinstance(name, str) and table != COHORTS else None
    if view is None:
        return dict(where)
    rule: dict[str, Any] = {"cohort": view.bases, **view.rule}
    if table != INSTANCES or ("label" in rule and not labels):
        rule = {"cohort": view.bases, "sop_instance_uid": tuple(members(lake, view))}
    rest = {column: allowed for column, allowed in where.items() if column != "cohort"}
    return {**rule, **{column: _both(rule.get(column), allowed) for column, allowed in rest.items()}}


def _both(first: Any, second: Any) -> Any:
    if first is None:
        return second
    allowed = set(values(second))
    return tuple(value for value in values(first) if value in allowed)
