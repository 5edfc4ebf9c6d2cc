"""Labels that arrive after the images: opinions appended to `labels`, no pixel and no row of `instances` touched."""

from __future__ import annotations

import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from memmc.config import Config
from memmc.dicom.deidentify import frame_uid, key_id, keyed_uid, seal_path
from memmc.errors import DataError, IdentityKeyError
from memmc.lake.schemas import LABELS, SCHEMAS
from memmc.lake.tables import Lake
from memmc.pipeline.audit import recorded
from memmc.pipeline.identity import held_key, home_directory
from memmc.pipeline.ingest import check_cohort
from memmc.pipeline.labels import is_uid, read_table
from memmc.pipeline.results import LabelResult

_SOURCE = "label table"
_COLUMNS = ("cohort", "sop_instance_uid", "source_ref", "frame_number", "label")

Row = dict[str, Any]


@recorded("label", lambda done: {"stated": done.stated, "labels": done.labels, "version": done.version})
def relabel(config: Config, cohort: str, labels_file: Path, *, dry_run: bool = False) -> LabelResult:
    """Give stored instances of a cohort the labels of a table; the newest opinion holds.

    A label that an instance has already adds no row, so the same table twice adds nothing.

    Args:
        labels_file: CSV with `label` and `path` (as ingested, or a SOP Instance UID) or `sop_instance_uid`; UIDs are
            the original ones, or the pseudonyms that `memmc scores` exports. A path precedes a UID.
        dry_run: count, and write nothing.

    Raises:
        UsageError: the table cannot be read.
        IdentityKeyError: names that are no pseudonyms, and no key of this lake to look them up with.
        DataError: nothing is stored in the cohort, or no name of the table is in it.
    """
    check_cohort(cohort)
    stated = read_table(str(labels_file))
    lake = Lake(config.lake.uri)
    rows = lake.instances_with_labels(_COLUMNS, None, {"cohort": cohort, "outcome": "stored"}).to_pylist()
    if not rows:
        raise DataError(f"cohort '{cohort}' has no stored images; run `memmc ingest SOURCE --cohort {cohort}`")
    named, unknown = _matched(rows, stated, _key(config, lake))
    if stated and unknown == len(stated):
        raise DataError(
            f"none of the {unknown} names in the label table is stored in cohort '{cohort}'; write paths as they were "
            "ingested, relative to SOURCE, or SOPInstanceUIDs"
        )
    changed = [(row, label) for row, label in named if row["label"] != label]
    if changed and not dry_run:
        _append(lake, cohort, changed)
    return LabelResult(
        cohort=cohort,
        stated=len(stated),
        unknown=unknown,
        added=len(changed),
        unchanged=len(named) - len(changed),
        labels=dict(sorted(Counter(label for _, label in changed).items())),
        version=lake.version(LABELS) if lake.exists(LABELS) else -1,
    )


def _key(config: Config, lake: Lake) -> bytes | None:
    key = held_key(config, home_directory())
    return key if key is not None and lake.key_id() in (None, key_id(key)) else None


def _matched(rows: list[Row], stated: dict[str, str], key: bytes | None) -> tuple[list[tuple[Row, str]], int]:
    """Return each named row with its stated label, and how many names are none of a row."""
    by_uid: dict[str, list[Row]] = {}
    by_ref: dict[str, list[Row]] = {}
    for row in rows:
        by_uid.setdefault(row["sop_instance_uid"], []).append(row)
        by_ref.setdefault(row["source_ref"], []).append(row)
    most_frames = max((row["frame_number"] or 0) for row in rows)
    found: dict[tuple[str, str], tuple[Row, str]] = {}
    unknown = 0
    for name in sorted(stated, key=is_uid, reverse=True):  # UIDs first, so that paths overwrite them
        hits = by_uid.get(name, [])
        if not hits and key is None:
            raise IdentityKeyError(
                "the label table names paths or original UIDs, which only the holder of this lake's identity key can "
                "look up; set deid.key_file, or give the pseudonyms that `memmc scores` exports"
            )
        if not hits and key is not None and is_uid(name):
            pseudonym = keyed_uid(key, name)
            uids = [pseudonym, *(frame_uid(pseudonym, number) for number in range(1, most_frames + 1))]
            hits = [row for uid in uids for row in by_uid.get(uid, [])]
        elif not hits and key is not None:
            hits = by_ref.get(seal_path(key, name), [])
        unknown += not hits
        found.update(((row["cohort"], row["sop_instance_uid"]), (row, stated[name])) for row in hits)
    return list(found.values()), unknown


def _append(lake: Lake, cohort: str, changed: list[tuple[Row, str]]) -> None:
    now = datetime.now(UTC)
    rows = [
        {
            "cohort": row["cohort"],
            "sop_instance_uid": row["sop_instance_uid"],
            "label": label,
            "source": _SOURCE,
            "labelled_at": now,
        }
        for row, label in changed
    ]
    run = f"label-{cohort}-{uuid.uuid4().hex[:12]}"
    lake.append(LABELS, pa.Table.from_pylist(rows, schema=SCHEMAS[LABELS]), run, {"cohort": cohort})
