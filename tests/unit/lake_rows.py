"""Rows for tests of the lake."""

from datetime import UTC, datetime, timedelta

import pyarrow as pa

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def instance_rows(start: int = 0, num: int = 6, cohort: str = "a") -> pa.Table:
    outcomes = ["stored", "stored", "stored", "duplicate", "excluded", "quarantined"]
    splits = ["train", "calibrate", "test", "none", "none", "none"]
    rows = []
    for index in range(start, start + num):
        outcome = outcomes[index % 6]
        rows.append(
            {
                "cohort": cohort,
                "object_key": f"{index:064x}",
                "source_ref": f"ref{index}",
                "outcome": outcome,
                "split": splits[index % 6],
                "reason": None if outcome == "stored" else "FILE_EMPTY",
                "content_key": f"{index:064x}",
                "size_bytes": index,
                "patient_key": f"p{index}",
                "sop_instance_uid": f"uid{index}",
                "label": "unknown",
                "pixels": bytes([index % 256]) * 16 if outcome == "stored" else None,
                "height": 4,
                "width": 4,
                "channels": 1,
                "bits": 8,
                "ingest_run": "run",
                "ingested_at": NOW,
            }
        )
    return pa.Table.from_pylist(rows)


def label_rows(rows: list[tuple[str, str, int]], cohort: str = "a") -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "cohort": cohort,
                "sop_instance_uid": uid,
                "label": label,
                "source": "reader",
                "labelled_at": NOW + timedelta(seconds=seconds),
            }
            for uid, label, seconds in rows
        ]
    )
