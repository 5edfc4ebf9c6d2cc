"""Versions of the tables that decide which normals a run learned, so that the same rows can be named again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from memmc.lake.schemas import LABELS, QUALITY, REVIEWS
from memmc.lake.tables import Lake

_ABSENT = -1
_PREFIX = "pinned_"


@dataclass(frozen=True)
class Pins:
    """Versions beside that of `instances`; None is the newest, -1 a table that was not there yet."""

    labels: int | None = None
    quality: int | None = None
    reviews: int | None = None

    @classmethod
    def now(cls, lake: Lake) -> Pins:
        """Return the versions of this moment."""
        return cls(*(lake.version(table) if lake.exists(table) else _ABSENT for table in (LABELS, QUALITY, REVIEWS)))

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> Pins:
        """Return what `as_tags` wrote; the newest of a table that the tags do not name."""
        found = {name: tags.get(_PREFIX + name) for name in ("labels", "quality", "reviews")}
        return cls(**{name: None if value is None else int(value) for name, value in found.items()})

    def as_tags(self) -> dict[str, str]:
        """Return tags of a run or a model version."""
        return {_PREFIX + name: str(value) for name, value in asdict(self).items() if value is not None}


def absent(version: int | None) -> bool:
    """Return whether a pinned table was not there yet."""
    return version == _ABSENT
