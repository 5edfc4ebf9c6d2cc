"""What one image shows, what a cohort's normals say of it, and pictures under two patients."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from drawn_chests import TOP, chest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmc.config import QualityConfig
from memmc.quality.duplicates import duplicates
from memmc.quality.flags import FLAGS, in_order
from memmc.quality.look import THUMBNAIL_SIDE, look, thumbnails_from_bytes
from memmc.quality.reference import TURNS, Reference, fit_reference

RULES = QualityConfig()


def thumbnails(images: list[np.ndarray]) -> np.ndarray:
    return thumbnails_from_bytes([look(image, TOP, 500, 500, RULES).thumbnail for image in images])


@functools.cache
def reference() -> Reference:
    fitted = fit_reference(thumbnails([chest(n) for n in range(300)]), [f"p{n}" for n in range(300)], RULES)
    assert fitted is not None
    return fitted


def judged(images: list[np.ndarray], fitted: Reference | None = None) -> list[tuple[str, ...]]:
    found = (fitted or reference()).judge(thumbnails(images), [f"new {n}" for n in range(len(images))], RULES)
    return [in_order(flags) for flags in found]


@pytest.mark.parametrize(
    ("image", "rows", "flags"),
    [
        (chest(1), 500, ()),
        (np.full((64, 64), 9, np.uint16), 500, ("QC_CONSTANT",)),
        (np.where(np.arange(4096).reshape(64, 64) < 3000, TOP, 7), 500, ("QC_SATURATED",)),
        (np.where(np.arange(4096).reshape(64, 64) < 2800, TOP, 7), 500, ()),  # 68 % is below the limit
        (np.where(np.arange(4096).reshape(64, 64) < 3000, 0, 7), 500, ("QC_SATURATED",)),
        (np.where(np.arange(4096).reshape(64, 64) < 3000, TOP - 1, 7), 500, ()),  # bright, not at the end
        (chest(1), 95, ("QC_TOO_SMALL",)),
        (chest(1), 96, ()),
        (chest(1), None, ()),
        (np.zeros((64, 64), np.uint16), 3, ("QC_CONSTANT", "QC_TOO_SMALL")),
    ],
)
def test_one_image(image, rows, flags):
    assert look(image.astype(np.uint16), TOP, rows, 500, RULES).flags == flags
    assert set(flags) <= FLAGS.keys()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    scale=st.floats(0.2, 1.0),
    offset=st.floats(0.0, 0.7),
)
def test_a_look_knows_neither_exposure_nor_size(seed, height, width, scale, offset):
    image = np.random.default_rng(seed).normal(0.5, 0.1, (height, width)).clip(0, 1)
    plain = look(np.rint(image * 30_000).astype(np.uint16), TOP, None, None, RULES)
    other = look(np.rint((image * scale + offset) * 30_000).astype(np.uint16), TOP, None, None, RULES)
    twice = look(np.rint(image * 30_000).astype(np.uint16).repeat(2, 0).repeat(2, 1), TOP, None, None, RULES)
    ours = thumbnails_from_bytes([plain.thumbnail, other.thumbnail, twice.thumbnail])
    assert ours.shape == (3, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    np.testing.assert_allclose(ours[1:], ours[:1].repeat(2, 0), atol=0.06)  # a step is 1/24
    assert len(plain.perceptual_hash) == 16
    different = int(plain.perceptual_hash, 16) ^ int(other.perceptual_hash, 16)
    assert different.bit_count() <= 4
    np.testing.assert_allclose(ours.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(ours.std((1, 2)), 1, atol=1e-5)


def test_normals_pass_and_every_wrong_way_is_noticed():
    fresh = [chest(n) for n in range(1000, 1100)]
    assert sum(map(bool, judged(fresh))) <= 2
    flips = {
        "half a turn": lambda x: x[::-1, ::-1],
        "upside down": lambda x: x[::-1],
        "a quarter left": lambda x: np.rot90(x),
        "inverted": lambda x: TOP - x,
    }
    for name, flip in flips.items():
        found = judged([flip(image) for image in fresh])
        assert sum(flags == ("QC_ORIENTATION",) for flags in found) >= 97, name
    mirrored = judged([image[:, ::-1] for image in fresh])
    assert not any("QC_ORIENTATION" in flags for flags in mirrored)


def test_every_turn_is_its_own_picture():
    image = thumbnails([chest(3) + np.arange(64, dtype=np.uint16)[:, None] * 9])
    turned = [turn(image)[0].tobytes() for turn in TURNS.values()]
    assert len({image[0].tobytes(), *turned}) == len(TURNS) + 1


def test_what_is_no_chest_is_far_out():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    others = {
        "noise": rng.integers(0, TOP, (64, 64)),
        "disc": TOP * (np.hypot(x, y) < 0.7),
        "stripes": TOP * (np.sin(20 * x) > 0),
        "blank with noise": 20_000 + rng.integers(0, 300, (64, 64)),
    }
    for name, image in others.items():
        assert judged([image.astype(np.uint16)]) == [("QC_OOD",)], name


def test_turned_images_among_the_normals_do_not_become_normal():
    images = [chest(n)[::-1, ::-1] if n < 20 else TOP - chest(n) if n < 30 else chest(n) for n in range(300)]
    fitted = fit_reference(thumbnails(images), [f"p{n}" for n in range(300)], RULES)
    assert fitted is not None
    own = fitted.judge(thumbnails(images), [f"p{n}" for n in range(300)], RULES)
    assert sum(map(bool, own[:30])) >= 29
    assert sum(map(bool, own[30:])) <= 6


def test_a_patient_is_judged_by_a_model_that_has_not_seen_the_patient():
    """Forty images of one odd patient among a hundred: models that held them would take them for normal."""
    odd = [TOP - chest(n) for n in range(12)]
    images = [*odd, *(chest(n) for n in range(100, 200))]
    patients = ["odd"] * 12 + [f"p{n}" for n in range(100)]
    fitted = fit_reference(thumbnails(images), patients, RULES)
    assert fitted is not None
    assert all(fitted.judge(thumbnails(odd), ["odd"] * 12, RULES))


def test_with_few_normals_nothing_is_compared():
    few = [chest(n) for n in range(49)]
    assert fit_reference(thumbnails(few), [f"p{n}" for n in range(49)], RULES) is None
    assert fit_reference(thumbnails([*few, chest(50)]), [f"p{n}" for n in range(50)], RULES) is not None
    assert fit_reference(thumbnails([*few, chest(50)]), ["one"] * 50, RULES) is None


def test_copies_of_another_patient_are_found_whatever_was_done_to_them():
    images = [chest(n) for n in range(60)]
    softer = [np.rint(image * 0.8 + 3000 + np.random.default_rng(n).normal(0, 300, image.shape)) for n, image in
              enumerate(images[:20])]  # fmt: skip
    looks = [look(image.astype(np.uint16), TOP, 500, 500, RULES) for image in [*images, *softer]]
    hashes = [one.perceptual_hash for one in looks]
    pictures = thumbnails_from_bytes([one.thumbnail for one in looks])
    found = duplicates(hashes, pictures, [f"p{n}" for n in range(80)], RULES)
    assert {n for n in found if n >= 60} == set(range(60, 80))
    assert found == set(range(60, 80))  # the one that came first stays, and different chests are no copies
    same_patient = [f"p{n}" for n in range(60)] + [f"p{n}" for n in range(20)]
    assert duplicates(hashes, pictures, same_patient, RULES) == set()
    assert duplicates([], pictures[:0], [], RULES) == set()
    few = [0, 1, 60, 0]  # the third is the first, softer; the fourth is the first itself
    found = duplicates([hashes[n] for n in few], pictures[few], ["a", "b", "c", "d"], RULES)
    assert found in ({3}, {2, 3})


def test_patients_who_stand_alike_are_no_copies():
    """Thumbnails as they are correlate by more than 0.98 among pictures that share most of what they show."""
    alike = [np.rint(0.85 * chest(0) + 0.15 * chest(n)).astype(np.uint16) for n in range(1, 81)]
    looks = [look(image, TOP, 500, 500, RULES) for image in alike]
    pictures = thumbnails_from_bytes([one.thumbnail for one in looks])
    flat = pictures.reshape(80, -1)
    assert np.sort((flat @ flat.T / flat.shape[1])[np.triu_indices(80, 1)])[-100] > 0.98
    assert duplicates([looks[0].perceptual_hash] * 80, pictures, [f"p{n}" for n in range(80)], RULES) == set()
