"""Pictures that occur under more than one patient.

Two images are one picture when their hashes differ in few bits and their
thumbnails correlate: either alone finds too many, since chest radiographs of
different patients look alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memmc.config import QualityConfig

_BAND_DIGITS = 4  # hex; four bands of 16 bits: hashes that differ in 3 bits or fewer share a band


def duplicates(
    hashes: Sequence[str], thumbnails_NTT: NDArray[np.float32], patients: Sequence[str], rules: QualityConfig
) -> set[int]:
    """Return the positions of images that show the same picture as an earlier one of another patient.

    Args:
        hashes: `Look.perceptual_hash`.
        thumbnails_NTT: standardised.
        patients: patient keys.
        rules: `quality.duplicate_bits`, `quality.duplicate_correlation`.
    """
    codes_N = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    flat_NF = thumbnails_NTT.reshape(len(hashes), math.prod(thumbnails_NTT.shape[1:]))
    groups = np.unique(np.array(patients, dtype=np.str_), return_inverse=True)[1]
    buckets: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    found: set[int] = set()
    for number, text in enumerate(hashes):
        keys = [(start, text[start : start + _BAND_DIGITS]) for start in range(0, len(text), _BAND_DIGITS)]
        near = np.array(sorted({other for key in keys for other in buckets[key]}), dtype=np.int64)
        near = near[groups[near] != groups[number]]
        near = near[_bits(codes_N[near] ^ codes_N[number]) <= rules.duplicate_bits]
        if near.size and (flat_NF[near] @ flat_NF[number] / flat_NF.shape[1]).max() >= rules.duplicate_correlation:
            found.add(number)
        for key in keys:
            buckets[key].append(number)
    return found


def _bits(codes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the number of bits set in each code."""
    return np.bitwise_count(codes)
