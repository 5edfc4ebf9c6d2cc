from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.config import SplitConfig
from memmc.errors import DataError
from memmc.lake.splits import check_disjoint, split_of

SHARES = SplitConfig()
keys = st.text("0123456789abcdef", min_size=1, max_size=64)


@settings(max_examples=200, deadline=None)
@given(st.lists(keys, unique=True, max_size=30), st.lists(keys, unique=True, max_size=30))
def test_more_patients_never_move_one(before, later):
    first = {key: split_of(key, SHARES) for key in before}
    after = {key: split_of(key, SHARES) for key in reversed(before + later)}
    assert {key: after[key] for key in before} == first


def test_shares_are_met():
    counts = Counter(split_of(f"{index:064x}", SHARES) for index in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.75, abs=0.015)
    assert counts["calibrate"] / 20_000 == pytest.approx(0.15, abs=0.015)
    assert counts["test"] / 20_000 == pytest.approx(0.10, abs=0.015)


def test_a_larger_training_share_takes_nobody_out_of_training():
    larger = SplitConfig(train=0.8, calibrate=0.1, test=0.1)
    patients = [f"{index:x}" for index in range(3000)]
    stay = [key for key in patients if split_of(key, SHARES) == "train"]
    assert {split_of(key, larger) for key in stay} == {"train"}


KNOWN = [
    "train",
    "train",
    "test",
    "train",
    "train",
    "calibrate",
    "train",
    "calibrate",
    "train",
    "train",
    "train",
    "train",
]


def test_known_values():
    assert [split_of(f"{index:064x}", SHARES) for index in range(12)] == KNOWN


def test_no_key_no_split():
    with pytest.raises(DataError, match="patient key"):
        split_of("", SHARES)


def test_check_disjoint():
    good = {
        "patient_key": ["a", "a", "b", "a", None, None],
        "split": ["train", "train", "test", "none", "train", "test"],
    }
    check_disjoint(pa.table(good))
    with pytest.raises(DataError, match="1 of 2 patients"):
        check_disjoint(pa.table({"patient_key": ["a", "a", "b"], "split": ["train", "test", "test"]}))
