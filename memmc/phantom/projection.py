"""Exact path lengths of X-rays through convex bodies and thin tubes, cone-beam geometry.

Patient frame (PS3.3 C.7.6.2): x to the patient's left, y to the back, z to the head, mm.
A ray is a point near the patient plus a unit direction, so a ray parameter is a length in mm.

Shape suffixes: N rays, S tube segments, P points, K rays of one segment's patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]  # float32 wherever there is one value per ray

FAR_MM = np.float32(1.0e6)
_TINY = np.float32(1.0e-9)


class Rays(NamedTuple):
    """Rays: a point on each, (3, ...) mm, and its unit direction, (3, ...)."""

    point: Array
    direction: Array


class Interval(NamedTuple):
    """Where each ray enters and leaves a convex body, mm; enter >= exit means the ray misses it."""

    enter: Array
    exit: Array


@dataclass(frozen=True)
class Quadric:
    """The body |matrix (x - center)| <= 1: an ellipsoid, or with a zero row a cylinder.

    Attributes:
        center: (3,) mm.
        matrix: (3, 3) 1/mm.
    """

    center: Array
    matrix: Array

    def contracted(self, pivot: Array, factors: Array) -> Quadric:
        """Return the image of the body under x -> pivot + factors * (x - pivot), both (3,)."""
        return Quadric(pivot + factors * (self.center - pivot), self.matrix / factors[None, :])


def ellipsoid(center: npt.ArrayLike, semi_axes_mm: npt.ArrayLike, roll_degrees: float = 0.0) -> Quadric:
    """Return an ellipsoid; an infinite semi-axis makes a cylinder.

    Args:
        center: x, y, z, mm.
        semi_axes_mm: along x, y, z before the roll.
        roll_degrees: turn about the y axis; positive leans the top (+z) towards +x.
    """
    angle = math.radians(roll_degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    into_body = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
    scale = 1.0 / np.asarray(semi_axes_mm, np.float64)
    return Quadric(np.asarray(center, np.float32), (scale[:, None] * into_body).astype(np.float32))


def mirrored(body: Quadric) -> Quadric:
    """Return the body reflected in the midsagittal plane x = 0."""
    flip = np.array([-1, 1, 1], np.float32)
    return Quadric(body.center * flip, body.matrix * flip[None, :])


def cross(body: Quadric, rays: Rays) -> Interval:
    """Return where the rays cross the body."""
    shape = rays.point.shape[1:]
    start = _apply(body.matrix, rays.point.reshape(3, -1)) - _apply(body.matrix, body.center[:, None])
    step = _apply(body.matrix, rays.direction.reshape(3, -1))
    a = np.maximum(np.einsum("ij,ij->j", step, step), _TINY)
    half_b = np.einsum("ij,ij->j", step, start)
    c = np.einsum("ij,ij->j", start, start) - np.float32(1)
    discriminant = half_b * half_b - a * c
    hit = discriminant > 0
    root = np.sqrt(np.where(hit, discriminant, np.float32(0)))
    enter = np.where(hit, (-half_b - root) / a, FAR_MM)
    leave = np.where(hit, (root - half_b) / a, -FAR_MM)
    return Interval(enter.reshape(shape), leave.reshape(shape))


def _apply(matrix_33: Array, vectors_3N: Array) -> Array:
    """Return matrix times vectors. Not BLAS, whose sums depend on the number of its threads."""
    return np.einsum("ij,jn->in", matrix_33, vectors_3N)


def contains(body: Quadric, points_P3: Array) -> npt.NDArray[np.bool_]:
    """Return which points lie inside the body, (P,)."""
    return (_apply(body.matrix, (points_P3 - body.center).T) ** 2).sum(axis=0) < 1


def intersect(first: Interval, second: Interval) -> Interval:
    """Return the part of each ray inside both bodies."""
    return Interval(np.maximum(first.enter, second.enter), np.minimum(first.exit, second.exit))


def length(interval: Interval) -> Array:
    """Return the path length inside a body, mm."""
    return np.maximum(interval.exit - interval.enter, np.float32(0))


def union_length(intervals: Sequence[Interval]) -> Array:
    """Return the path length inside at least one body, mm.

    The intervals of a ray are sorted by entry with a sorting network, then swept once.
    """
    enters = [part.enter for part in intervals]
    exits = [np.maximum(part.exit, part.enter) for part in intervals]
    for last in range(len(intervals) - 1, 0, -1):
        for i in range(last):
            late = enters[i] > enters[i + 1]
            enters[i], enters[i + 1] = np.minimum(enters[i], enters[i + 1]), np.maximum(enters[i], enters[i + 1])
            exits[i], exits[i + 1] = np.where(late, exits[i + 1], exits[i]), np.where(late, exits[i], exits[i + 1])
    total = exits[0] - enters[0]
    reached = exits[0]
    for enter, leave in zip(enters[1:], exits[1:], strict=True):
        total = total + np.maximum(leave - np.maximum(enter, reached), np.float32(0))
        reached = np.maximum(reached, leave)
    return total


def uncovered_length(region: Interval, covers: Sequence[Interval]) -> Array:
    """Return the path length inside the region and outside every cover, mm."""
    covered = union_length([intersect(region, cover) for cover in covers])
    return np.maximum(length(region) - covered, np.float32(0))


@dataclass(frozen=True)
class Camera:
    """X-ray source and flat detector.

    Attributes:
        source: (3,) mm, patient frame.
        origin: (3,) centre of the detector, mm.
        right: (3,) unit vector along a row (0028,0011).
        down: (3,) unit vector along a column (0028,0010).
        size_px: rows and columns.
        pixel_mm: detector pixel pitch, (0018,1164) Imager Pixel Spacing.
    """

    source: Array
    origin: Array
    right: Array
    down: Array
    size_px: int
    pixel_mm: float

    def rays(self) -> Rays:
        """Return the ray to each pixel's centre, shapes (3, N), N = size_px squared in C order."""
        offsets = (np.arange(self.size_px, dtype=np.float32) - (self.size_px - 1) / 2) * np.float32(self.pixel_mm)
        across = self.right[:, None, None] * offsets[None, None, :] + self.down[:, None, None] * offsets[None, :, None]
        beam = ((self.origin - self.source)[:, None, None] + across).reshape(3, -1)
        distance = np.sqrt(np.einsum("ij,ij->j", beam, beam))
        direction = beam / distance
        # A point beside the patient, not the distant source: float32 keeps micrometres there.
        near = np.float32(np.linalg.norm(self.source))
        return Rays(self.source[:, None] + direction * near, direction)

    def pixels_of(self, points_P3: Array) -> Array:
        """Return (P, 2) fractional row and column of the points' shadows, px."""
        normal = np.cross(self.down, self.right).astype(np.float32)
        beam = points_P3 - self.source
        reach = float(np.dot(self.origin - self.source, normal))
        landing = beam * (reach / np.einsum("ij,j->i", beam, normal))[:, None] + (self.source - self.origin)
        half = (self.size_px - 1) / 2
        axes = np.stack([self.down, self.right])
        return np.einsum("ij,kj->ik", landing, axes) / np.float32(self.pixel_mm) + np.float32(half)


@dataclass(frozen=True)
class Tubes:
    """Elliptical cylinder pieces between two planes; neighbours share a plane, so pieces of a chain never overlap.

    Attributes:
        start, end: (S, 3) mm.
        start_normal, end_normal: (S, 3) unit normals of the cutting planes.
        across, along: (S, 3) cross-section axes divided by their semi-axis, 1/mm.
        radius: (S,) larger semi-axis, mm.
        weight: (S,) attenuation added per mm of path, 1/mm.
        core: (S,) scale of an inner tube over the outer one, 0 where there is none.
        core_weight: (S,) attenuation the inner tube adds to `weight`, 1/mm.
    """

    start: Array
    end: Array
    start_normal: Array
    end_normal: Array
    across: Array
    along: Array
    radius: Array
    weight: Array
    core: Array
    core_weight: Array

    def mirrored(self) -> Tubes:
        """Return the tubes reflected in the midsagittal plane x = 0."""
        flip = np.array([-1, 1, 1], np.float32)
        names = ("start", "end", "start_normal", "end_normal", "across", "along")
        return replace(self, **{name: getattr(self, name) * flip for name in names})


def join(tubes: Sequence[Tubes]) -> Tubes:
    """Return all segments as one set."""
    names = Tubes.__dataclass_fields__
    return Tubes(**{name: np.concatenate([getattr(part, name) for part in tubes]) for name in names})


def tube_chain(
    points_P3: npt.ArrayLike,
    radii_mm: tuple[float, float],
    weight: float,
    core: tuple[float, float] = (0.0, 0.0),
) -> Tubes:
    """Return a tube along a polyline that nowhere runs straight up.

    Args:
        points_P3: (P, 3) mm, P >= 3.
        radii_mm: semi-axes of the cross-section, across and along the upward direction.
        weight: attenuation, 1/mm.
        core: scale of the inner tube and the attenuation it adds, 1/mm.
    """
    points = np.asarray(points_P3, np.float32)
    tangents = _unit(np.gradient(points, axis=0).astype(np.float32))
    radii = np.broadcast_to(np.asarray(radii_mm, np.float32), (len(points) - 1, 2))
    return _assemble(points[:-1], points[1:], (tangents[:-1], tangents[1:]), radii, weight, core)


def separate_tubes(start_S3: Array, end_S3: Array, radii_S2: Array, weight: float | Array) -> Tubes:
    """Return tubes with square ends, one per segment; for an upright one the radii lie along x and y."""
    tangent = _unit(end_S3 - start_S3)
    return _assemble(start_S3, end_S3, (tangent, tangent), radii_S2, weight, (0.0, 0.0))


def _assemble(
    start: Array,
    end: Array,
    normals: tuple[Array, Array],
    radii_S2: Array,
    weight: float | Array,
    core: tuple[float, float],
) -> Tubes:
    axis = _unit(end - start)
    upward = np.where(np.abs(axis[:, 2:]) > 0.99, np.array([0, 1, 0], np.float32), np.array([0, 0, 1], np.float32))
    along = _unit(upward - np.einsum("ij,ij->i", axis, upward)[:, None] * axis)
    across = np.cross(along, axis).astype(np.float32)
    fill = (np.broadcast_to(np.float32(value), (len(start),)) for value in (weight, *core))
    return Tubes(start, end, *normals, across / radii_S2[:, :1], along / radii_S2[:, 1:], radii_S2.max(axis=1), *fill)


def _unit(vectors: Array) -> Array:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def project_tubes(tubes: Tubes, camera: Camera, rays: Rays) -> Array:
    """Return the attenuation the tubes add to each ray, (N,), dimensionless.

    Each segment is evaluated on the pixels its shadow can reach. A tube thinner than
    1.2 px is widened at equal mass, since one ray per pixel would miss parts of it.
    """
    total = np.zeros(camera.size_px**2, np.float64)
    first, last = camera.pixels_of(tubes.start), camera.pixels_of(tubes.end)
    magnified = tubes.radius * np.float32(1.2 / camera.pixel_mm) + np.float32(1)
    half = (np.ceil((np.abs(last - first).max(axis=1) / 2 + magnified) / 3) * 3).astype(np.int32)
    for width in np.unique(half):
        chosen = np.flatnonzero(half == width)
        index, segment = _shadow_pixels(first[chosen], last[chosen], magnified[chosen], int(width), camera.size_px)
        segment = chosen[segment]
        added = _tube_attenuation(tubes, segment, rays.point[:, index], rays.direction[:, index], camera.pixel_mm)
        total += np.bincount(index, weights=added, minlength=len(total))
    return total.astype(np.float32)


def _shadow_pixels(
    first_S2: Array, last_S2: Array, reach_S: Array, half: int, size_px: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return pairs (pixel index, segment) for the pixels within reach of a segment's projected axis."""
    middle = (first_S2 + last_S2) / 2
    span = last_S2 - first_S2
    size = np.linalg.norm(span, axis=1)
    unit = np.where(
        size[:, None] > 1e-3, span / np.maximum(size, np.float32(1e-3))[:, None], np.array([1, 0], np.float32)
    )
    corner = np.rint(middle).astype(np.int32)
    step = np.arange(-half, half + 1, dtype=np.int32)
    rows, columns = corner[:, :1] + step, corner[:, 1:] + step
    down, right = rows - middle[:, :1], columns - middle[:, 1:]
    aside = (down * unit[:, 1:])[:, :, None] - (right * unit[:, :1])[:, None, :]
    ahead = (down * unit[:, :1])[:, :, None] + (right * unit[:, 1:])[:, None, :]
    near = (np.abs(aside) < reach_S[:, None, None]) & (np.abs(ahead) < (size / 2 + reach_S)[:, None, None])
    near &= ((rows >= 0) & (rows < size_px))[:, :, None] & ((columns >= 0) & (columns < size_px))[:, None, :]
    segment, row, column = np.nonzero(near)
    return rows[segment, row].astype(np.intp) * size_px + columns[segment, column], segment


def _columns(rows_S3: Array, index_K: npt.NDArray[np.intp]) -> Array:
    """Return (3, K): one contiguous line per coordinate, which the products that follow read fastest."""
    return np.take(np.ascontiguousarray(rows_S3.T), index_K, axis=1)


def _tube_attenuation(
    tubes: Tubes, segment_K: npt.NDArray[np.intp], point_3K: Array, direction_3K: Array, pixel_mm: float
) -> Array:
    """Return what the tube piece of each pair adds to its ray, (K,): elliptical cylinder between two planes."""
    widen = np.maximum(np.float32(1), np.float32(0.6 * pixel_mm) / tubes.radius)
    offset = point_3K - _columns(tubes.start, segment_K)
    a = half_b = c = np.float32(0)
    for axes in (tubes.across, tubes.along):
        axis = _columns(axes / widen[:, None], segment_K)
        q, w = np.einsum("ij,ij->j", axis, offset), np.einsum("ij,ij->j", axis, direction_3K)
        a, half_b, c = a + w * w, half_b + q * w, c + q * q
    a = np.maximum(a, _TINY)
    enter, leave = np.full_like(a, -FAR_MM), np.full_like(a, FAR_MM)
    far_offset = offset - _columns(tubes.end - tubes.start, segment_K)
    for normals, relative, sign in ((tubes.start_normal, offset, 1), (tubes.end_normal, far_offset, -1)):
        normal = _columns(normals, segment_K)
        slope = np.einsum("ij,ij->j", normal, direction_3K) * np.float32(sign)
        slope = np.where(np.abs(slope) < 1e-6, np.float32(1e-6), slope)
        crossing = np.einsum("ij,ij->j", normal, relative) * np.float32(-sign) / slope
        enter = np.where(slope > 0, np.maximum(enter, crossing), enter)
        leave = np.where(slope < 0, np.minimum(leave, crossing), leave)

    def path(scale: Array | float) -> Array:
        root = np.sqrt(np.maximum(half_b * half_b - a * (c - np.float32(scale) * np.float32(scale)), np.float32(0)))
        inside = np.minimum(leave, (root - half_b) / a) - np.maximum(enter, (-half_b - root) / a)
        return np.where(root > 0, np.maximum(inside, np.float32(0)), np.float32(0))

    added = path(1.0) * (tubes.weight / (widen * widen))[segment_K]
    hollow = np.flatnonzero(tubes.core[segment_K] > 0)
    if len(hollow):
        added = added + path(tubes.core[segment_K]) * tubes.core_weight[segment_K]
    return added
