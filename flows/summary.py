"""A step's result as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def as_markdown(title: str, result: Mapping[str, Any]) -> str:
    """Return a heading and a table of two columns; nested values are named `outer.inner`."""
    lines = [f"## {title}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in _flat(result)]
    return "\n".join(lines)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; the first says the columns.

    >>> print(as_table([{"scan": "2.25.1", "p_value": 0.0213333}]))
    | scan | p_value |
    |---|---|
    | 2.25.1 | 0.02133 |
    """
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows)])


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
