"""Labels a caller states at ingest: one for all, or a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from memmc.dicom.deidentify import keyed_uid
from memmc.errors import DataError, UsageError

LABELS = ("normal", "abnormal", "unknown")
_NAMES = ("path", "sop_instance_uid")
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


@dataclass(frozen=True)
class StatedLabels:
    """What the caller says of the objects of one source.

    Attributes:
        default: label of every object that no other statement names.
        by_path: path relative to the source -> label.
        by_uid: keyed SOP Instance UID -> label.
    """

    default: str = "unknown"
    by_path: Mapping[str, str] = field(default_factory=dict, repr=False)
    by_uid: Mapping[str, str] = field(default_factory=dict, repr=False)

    def of(self, path: str, sop_instance_uid: str | None) -> str:
        """Return the label of one object; a path's statement precedes a UID's."""
        return self.by_path.get(path) or self.by_uid.get(sop_instance_uid or "") or self.default

    def check_against(self, paths: Iterable[str]) -> None:
        """Refuse a table that names nothing in the source.

        Raises:
            DataError: rows name paths, and none of them is listed.
        """
        if self.by_path and not self.by_uid and not set(self.by_path) & set(paths):
            raise DataError(
                f"none of the {len(self.by_path)} paths in the label table is in the source; "
                "write them relative to SOURCE, with forward slashes, or give SOPInstanceUIDs"
            )


def read_labels(label: str | None, labels_file: str | None, key: bytes) -> StatedLabels:
    """Read `--label` and `--labels`.

    Args:
        label: one of `LABELS`, or None for unknown.
        labels_file: CSV with the columns `path` (relative to the source, or a SOPInstanceUID) and `label`.
        key: the identity key, under which UIDs are looked up.

    Raises:
        UsageError: an unknown label, a missing column, an unreadable file. Row numbers, never contents, are named.
    """
    if label is not None and label not in LABELS:
        raise UsageError(f"unknown label; expected one of {', '.join(LABELS)}")
    if labels_file is None:
        return StatedLabels(default=label or "unknown")
    stated = read_table(labels_file)
    by_path = {name: given for name, given in stated.items() if not is_uid(name)}
    by_uid = {keyed_uid(key, name): given for name, given in stated.items() if is_uid(name)}
    return StatedLabels(default=label or "unknown", by_path=by_path, by_uid=by_uid)


def is_uid(name: str) -> bool:
    """Return whether a name in a label table is a UID; else it is a path."""
    return _UID.fullmatch(name) is not None


def read_table(labels_file: str) -> dict[str, str]:
    """Return path or UID -> label of a label table, the last row of a name.

    Args:
        labels_file: CSV with the columns `path` (relative to the source, or a UID), or `sop_instance_uid`, and `label`.

    Raises:
        UsageError: an unknown label, a missing column, an unreadable file. Row numbers, never contents, are named.
    """
    try:
        with Path(labels_file).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"label table cannot be read ({type(error).__name__}); expected CSV in UTF-8") from None
    column = next((name for name in _NAMES if rows and name in rows[0]), None)
    if rows and (column is None or "label" not in rows[0]):
        raise UsageError(
            f"label table lacks a column; expected 'label' and one of {', '.join(_NAMES)} in its first line"
        )
    stated: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        given = (row["label"] or "").strip().lower()
        if given not in LABELS:
            raise UsageError(f"label table, line {number}: unknown label; expected one of {', '.join(LABELS)}")
        name = (row[str(column)] or "").strip()
        stated[name if is_uid(name) else str(PurePosixPath(name))] = given
    return stated
