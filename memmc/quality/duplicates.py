"""Pictures that occur under more than one patient.

Two images are one picture when their hashes differ in few bits and what sets
them apart from the mean of the cohort correlates. Radiographs of different
patients look alike, so hashes alone, or thumbnails as they are, find too many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memmc.config import QualityConfig

_AS_GOOD_AS_EQUAL = 0.999
_LEAST = 1e-6
_BAND_DIGITS = 4  # hex; four bands of 16 bits: hashes that differ in 3 bits or fewer share a band


def duplicates(
    hashes: Sequence[str], thumbnails_NTT: NDArray[np.float32], patients: Sequence[str], rules: QualityConfig
) -> set[int]:
    """Return the positions of images that show the same picture as an earlier one of another patient.

    Args:
        hashes: `Look.perceptual_hash`.
        thumbnails_NTT: standardised.
        patients: patient keys.
        rules: `quality.duplicate_bits`, `quality.duplicate_correlation`; with fewer than `quality.min_reference`
            images, which have no mean to speak of, only pictures as good as equal are found.
    """
    codes_N = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    many = len(hashes) >= rules.min_reference
    limit = rules.duplicate_correlation if many else _AS_GOOD_AS_EQUAL
    own_NF = thumbnails_NTT.reshape(len(hashes), math.prod(thumbnails_NTT.shape[1:]))
    own_NF = own_NF - own_NF.mean(axis=0) if many else own_NF
    own_NF = own_NF / np.linalg.norm(own_NF, axis=1, keepdims=True).clip(_LEAST)
    groups = np.unique(np.array(patients, dtype=np.str_), return_inverse=True)[1]
    buckets: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    found: set[int] = set()
    for number, text in enumerate(hashes):
        keys = [(start, text[start : start + _BAND_DIGITS]) for start in range(0, len(text), _BAND_DIGITS)]
        near = np.array(sorted({other for key in keys for other in buckets[key]}), dtype=np.int64)
        near = near[groups[near] != groups[number]]
        near = near[_bits(codes_N[near] ^ codes_N[number]) <= rules.duplicate_bits]
        if near.size and (own_NF[near] @ own_NF[number]).max() >= limit:
            found.add(number)
        for key in keys:
            buckets[key].append(number)
    return found


def _bits(codes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the number of bits set in each code."""
    return np.bitwise_count(codes)
