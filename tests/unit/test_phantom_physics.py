"""The phantom's geometry and physics against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from memmc.phantom.lesions import LESION_KINDS, MASK_PATH_MM, Lesion, place
from memmc.phantom.projection import (
    Camera,
    Interval,
    Rays,
    contains,
    cross,
    ellipsoid,
    intersect,
    length,
    project_tubes,
    tube_chain,
    uncovered_length,
    union_length,
)
from memmc.phantom.radiograph import expose, line_integrals, simulate
from memmc.phantom.thorax import MU_LUNG, MU_SOFT, SIDES, build_thorax


def camera(size_px: int = 65, pixel_mm: float = 4.0) -> Camera:
    axes = np.eye(3, dtype=np.float32)
    return Camera(
        source=np.float32([0, 1650, 0]),
        origin=np.float32([0, -150, 0]),
        right=axes[0],
        down=-axes[2],
        size_px=size_px,
        pixel_mm=pixel_mm,
    )


def test_central_ray_obeys_beer_lambert() -> None:
    radius, mu = 60.0, 0.0195
    view = camera()
    path = length(cross(ellipsoid((0, 0, 0), (radius, radius, radius)), view.rays())).reshape(65, 65)
    transmission = np.exp(-mu * path)
    assert transmission[32, 32] == pytest.approx(np.exp(-mu * 2 * radius), rel=1e-5)
    assert transmission[0, 0] == 1.0
    # Magnification 1800 / 1650: the shadow of the sphere is wider than the sphere.
    assert (path > 0)[32].sum() * 4.0 == pytest.approx(2 * radius * 1800 / 1650, abs=4.0)


def test_detector_counts_follow_the_transmission_without_scatter_edge() -> None:
    rng = np.random.default_rng(0)
    attenuation = np.full((64, 64), 1.5, np.float32)
    counts = expose(attenuation, 1e6, 1.6, rng)
    # A flat field: every blur keeps it, scatter adds a tenth.
    assert counts.mean() == pytest.approx(1.1e6 * np.exp(-1.5), rel=1e-3)
    assert counts.std() == pytest.approx(np.sqrt(1.1e6 * np.exp(-1.5) + 36), rel=0.05)


def brute_force_length(inside: np.ndarray, step_mm: float) -> np.ndarray:
    return inside.sum(axis=0) * step_mm


def test_interval_algebra_equals_marching_along_the_rays() -> None:
    rng = np.random.default_rng(1)
    bodies = [ellipsoid(rng.uniform(-25, 25, 3), rng.uniform(15, 45, 3), float(rng.uniform(-50, 50))) for _ in range(5)]
    point = rng.uniform(-40, 40, (3, 40)).astype(np.float32)
    direction = rng.normal(size=(3, 40)).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=0)
    rays = Rays(point, direction)
    t = np.arange(-200, 200, 0.05, dtype=np.float32)
    samples = point[:, None, :] + t[None, :, None] * direction[:, None, :]
    inside = [contains(body, samples.reshape(3, -1).T).reshape(len(t), 40) for body in bodies]
    spans = [cross(body, rays) for body in bodies]
    tolerance = 0.05 * 6
    union = brute_force_length(np.any(inside, axis=0), 0.05)
    assert union.max() > 40
    np.testing.assert_allclose(union_length(spans), union, atol=tolerance)
    both = brute_force_length(inside[0] & inside[1], 0.05)
    assert both.max() > 5
    np.testing.assert_allclose(length(intersect(spans[0], spans[1])), both, atol=tolerance)
    bare = brute_force_length(inside[0] & ~np.any(inside[1:], axis=0), 0.05)
    assert bare.max() > 5
    np.testing.assert_allclose(uncovered_length(spans[0], spans[1:]), bare, atol=tolerance)


def test_a_missed_body_has_no_length_and_covers_nothing() -> None:
    region = Interval(np.float32([0.0]), np.float32([10.0]))
    missed = cross(ellipsoid((500, 0, 0), (5, 5, 5)), Rays(np.zeros((3, 1), np.float32), np.float32([[0], [1], [0]])))
    assert length(missed)[0] == 0
    assert uncovered_length(region, [missed])[0] == 10


def test_a_bent_tube_has_the_mass_of_its_volume() -> None:
    angle = np.linspace(0, np.pi, 40)
    line = np.stack([50 * np.cos(angle), 20 * np.sin(angle), 50 * np.sin(angle)], axis=1)
    view = camera(129, 1.5)
    total = project_tubes(tube_chain(line, (4.0, 4.0), 0.01), view, view.rays()).sum()
    arc = np.linalg.norm(np.diff(line, axis=0), axis=1).sum()
    # Area of a detector pixel seen at the tube's depth.
    pixel_area = (1.5 * 1650 / 1800) ** 2
    assert total * pixel_area == pytest.approx(0.01 * np.pi * 16 * arc, rel=0.03)


def test_a_thin_tube_keeps_its_mass() -> None:
    line = np.array([[-60, 0, -31], [0, 0, 2], [60, 0, 40]])
    view = camera(129, 1.5)
    total = project_tubes(tube_chain(line, (0.4, 0.4), 1.0), view, view.rays()).sum()
    arc = np.linalg.norm(np.diff(line, axis=0), axis=1).sum()
    assert total * (1.5 * 1650 / 1800) ** 2 == pytest.approx(np.pi * 0.16 * arc, rel=0.05)


def test_marrow_replaces_cortex_inside_a_hollow_tube() -> None:
    line = np.array([[-40, 0, 0], [0, 0, 0], [40, 0, 0]])
    view = camera()
    solid = project_tubes(tube_chain(line, (10, 10), 0.02), view, view.rays()).reshape(65, 65)
    hollow = project_tubes(tube_chain(line, (10, 10), 0.02, (0.5, -0.02)), view, view.rays()).reshape(65, 65)
    assert solid[32, 32] == pytest.approx(0.02 * 20, rel=1e-3)
    assert hollow[32, 32] == pytest.approx(0.02 * 10, rel=1e-3)


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_the_mask_is_where_the_lesion_changes_the_beam(kind: str) -> None:
    """The noise-free attenuation with and without the lesion differs inside the mask in the lesion's direction."""
    thorax = build_thorax(5)
    view = camera(128, 3.2)
    placed = place(Lesion(kind, 3), thorax)  # type: ignore[arg-type]
    normal, no_path = line_integrals(thorax, None, view)
    diseased, path = line_integrals(thorax, placed, view)
    assert not no_path.any()
    mask = path > MASK_PATH_MM[kind]  # type: ignore[index]
    change = diseased - normal
    assert 0.001 < mask.mean() < 0.25
    if kind == "pneumothorax":
        # Pure air: wherever the ray meets no remaining lung it loses the lung's attenuation.
        assert np.median(change[mask]) < -0.1
        return
    # Elsewhere nothing changes, except where vessels are hidden.
    assert np.abs(change[path == 0]).max() < 0.12
    assert np.quantile(change[mask], 0.1) > 0.02
    if kind == "nodule":
        np.testing.assert_allclose(change, path * (placed.mu - MU_LUNG), atol=0.06)


def test_a_nodule_is_brighter_for_presentation() -> None:
    lesion = Lesion("nodule", 11)
    diseased, normal = simulate(3, 0, lesion, 128), simulate(3, 0, None, 128)
    gain = diseased.image_HW.astype(int) - normal.image_HW.astype(int)
    assert gain[diseased.mask_HW].mean() > 150
    assert abs(gain[~diseased.mask_HW].mean()) < 40
    assert diseased.image_HW.max() < 4096
    assert diseased.image_HW.dtype == np.uint16


def test_masks_at_two_resolutions_are_the_same_region() -> None:
    lesion = Lesion("consolidation", 2)
    fine, coarse = simulate(8, 1, lesion, 256).mask_HW, simulate(8, 1, lesion, 128).mask_HW
    reduced = fine.reshape(128, 2, 128, 2).mean(axis=(1, 3)) >= 0.5
    assert (reduced & coarse).sum() / (reduced | coarse).sum() > 0.9


def test_a_patient_keeps_the_anatomy_and_another_does_not() -> None:
    first, second, other = (simulate(*seeds, None, 64).image_HW.astype(float) for seeds in ((4, 0), (4, 1), (9, 0)))
    assert not np.array_equal(first, second)
    one, same, another = build_thorax(4), build_thorax(4), build_thorax(9)
    for side in SIDES:
        np.testing.assert_array_equal(one.lungs[side].matrix, same.lungs[side].matrix)
        np.testing.assert_array_equal(one.vessels[side].start, same.vessels[side].start)
        assert not np.array_equal(one.lungs[side].matrix, another.lungs[side].matrix)
    assert not np.array_equal(first, other)


def test_lungs_are_dark_and_the_spine_is_bright() -> None:
    thorax = build_thorax(1)
    view = camera(128, 3.2)
    integral, _ = line_integrals(thorax, None, view)
    rows, columns = np.round(view.pixels_of(np.float32([[75, 0, 0], [-75, 0, 0], [0, 40, -60]]))).astype(int).T
    left, right, spine = integral[rows, columns]
    assert max(left, right) < 2.6
    assert spine > MU_SOFT * 170
