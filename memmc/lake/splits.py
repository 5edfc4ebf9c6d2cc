"""Patients to splits, by the hash of the keyed patient key alone.

A patient's split depends on nothing but the patient, so instances that arrive
later join the split their patient has, and no patient stands on two sides.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import pyarrow as pa

from memmc.config import SplitConfig
from memmc.errors import DataError

Split = Literal["train", "calibrate", "test"]

_DOMAIN = b"memmc/split/1\0"


def split_of(patient_key: str, shares: SplitConfig) -> Split:
    """Return the split of a patient.

    Args:
        patient_key: the keyed (HMAC) patient key, so that the split tells nothing about the identifier.
        shares: shares of patients; each patient's position in [0, 1) is fixed and compared with their sums.

    Raises:
        DataError: an empty key.
    """
    if not patient_key:
        raise DataError("an instance without a patient key has no split; give it one or exclude it")
    digest = hashlib.sha256(_DOMAIN + patient_key.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < shares.train:
        return "train"
    return "calibrate" if position < shares.train + shares.calibrate else "test"


def check_disjoint(instances: pa.Table) -> None:
    """Check that no patient stands in two splits of one table.

    Args:
        instances: rows with columns ``patient_key`` and ``split``; rows of split ``none`` do not count.

    Raises:
        DataError: some patients stand in more than one split; their number is named.
    """
    pairs = instances.select(["patient_key", "split"]).group_by(["patient_key", "split"]).aggregate([]).to_pydict()
    splits: dict[str, set[str]] = {}
    for patient_key, split in zip(pairs["patient_key"], pairs["split"], strict=True):
        if patient_key is not None and split != "none":
            splits.setdefault(patient_key, set()).add(split)
    num_crossing = sum(len(found) > 1 for found in splits.values())
    if num_crossing:
        raise DataError(
            f"{num_crossing} of {len(splits)} patients stand in more than one split; "
            "the lake was filled with different split shares: keep [split] as it was, or ingest into a new lake"
        )
