"""Four thoracic findings as bodies in a given thorax.

A focal lesion (nodule, consolidation) fills a region of lung with something denser. A displacing one
(effusion, pneumothorax) leaves the aerated lung only inside `remaining`, a convex body; fluid or air
takes the rest of the pleural cavity. So one rule gives every path length exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from memmc.phantom.projection import Array, Quadric, Rays, contains, cross, ellipsoid, length
from memmc.phantom.thorax import MU_AIR, MU_LUNG, MU_SOFT, SIDES, Side, Thorax, VesselTree

LesionKind = Literal["nodule", "consolidation", "effusion", "pneumothorax"]
LESION_KINDS: tuple[LesionKind, ...] = ("nodule", "consolidation", "effusion", "pneumothorax")

# A pixel belongs to the mask when its ray runs further than this through the lesion, mm.
MASK_PATH_MM = {"nodule": 2.0, "consolidation": 6.0, "effusion": 8.0, "pneumothorax": 8.0}


@dataclass(frozen=True)
class Lesion:
    """What to plant; place and shape follow from the seed and the patient.

    Attributes:
        scale: linear size of a focal lesion over its usual one; displacing lesions take no notice.
        contrast: how much denser, or thinner, than lung its filling is over its usual difference.
    """

    kind: LesionKind
    seed: int
    scale: float = 1.0
    contrast: float = 1.0


@dataclass(frozen=True)
class PlacedLesion:
    """A lesion in a thorax.

    Attributes:
        kind: which finding.
        side: which lung.
        mu: attenuation of what fills the lesion, 1/mm.
        bodies: a focal lesion is their union, inside the lung.
        remaining: what is left of the lung with a displacing lesion.
        vessels: the lung's vessels as the lesion leaves them visible.
        lung_gain: density of the remaining lung over normal.
        size_mm: diameter, or extent of the collection.
    """

    kind: LesionKind
    side: Side
    mu: float
    bodies: tuple[Quadric, ...]
    remaining: Quadric | None
    vessels: VesselTree
    lung_gain: float
    size_mm: float


def place(lesion: Lesion, thorax: Thorax) -> PlacedLesion:
    """Return the lesion at its place in the thorax, the same for the same arguments."""
    rng = np.random.default_rng([lesion.seed, LESION_KINDS.index(lesion.kind), 2])
    side = SIDES[int(rng.integers(2))]
    planters = {
        "nodule": _nodule,
        "consolidation": _consolidation,
        "effusion": _effusion,
        "pneumothorax": _pneumothorax,
    }
    placed = planters[lesion.kind](thorax, side, rng)
    if (lesion.scale, lesion.contrast) == (1.0, 1.0):
        return placed
    return _altered(placed, lesion.scale, lesion.contrast)


def _altered(placed: PlacedLesion, scale: float, contrast: float) -> PlacedLesion:
    bodies = placed.bodies
    if bodies:
        middle = np.stack([body.center for body in bodies]).mean(axis=0)
        bodies = tuple(body.contracted(middle, np.full(3, scale, np.float32)) for body in bodies)
    size_mm = placed.size_mm * (scale if bodies else 1.0)
    return replace(placed, mu=MU_LUNG + contrast * (placed.mu - MU_LUNG), bodies=bodies, size_mm=size_mm)


def _nodule(thorax: Thorax, side: Side, rng: np.random.Generator) -> PlacedLesion:
    """A solid sphere with two lobulations, 28-38 mm."""
    radius = float(rng.uniform(14, 19))
    center = _open_lung(thorax, side, rng, radius + 4)
    bodies = [ellipsoid(center, (radius, radius, radius))]
    for _ in range(2):
        bump = rng.normal(size=3)
        bump *= 0.45 * radius / np.linalg.norm(bump)
        bodies.append(ellipsoid(center + bump, (0.7 * radius,) * 3))
    return PlacedLesion("nodule", side, 1.8 * MU_SOFT, tuple(bodies), None, thorax.vessels[side], 1.0, 2 * radius)


def _consolidation(thorax: Thorax, side: Side, rng: np.random.Generator) -> PlacedLesion:
    """A cluster of four overlapping patches of fluid-filled alveoli; vessels inside lose their contrast."""
    center = _open_lung(thorax, side, rng, 16)
    bodies: list[Quadric] = []
    for _ in range(4):
        offset = rng.normal(0, 1, 3) * (11, 10, 11)
        bodies.append(ellipsoid(center + offset, rng.uniform((18, 20, 17), (28, 31, 26)), float(rng.uniform(-40, 40))))
    tree = thorax.vessels[side]
    hidden = np.zeros(len(tree.radius), bool)
    for body in bodies:
        hidden |= contains(body, (tree.start + tree.end) / 2)
    return PlacedLesion(
        "consolidation", side, 1.4 * MU_SOFT, tuple(bodies), None, _without(tree, hidden), 1.0, 2 * _spread(bodies)
    )


def _effusion(thorax: Thorax, side: Side, rng: np.random.Generator) -> PlacedLesion:
    """Free fluid of an upright patient: the lung floats on it, its convex base makes the meniscus."""
    lung = thorax.lungs[side]
    dome_top = float(thorax.organs[side][0].center[2]) + 92
    rise = float(rng.uniform(-5, 25))
    level = dome_top + rise
    x = float(lung.center[0]) * 0.62
    remaining = ellipsoid((x, float(lung.center[1]), level + 160), (145, 260, 160))
    tree = thorax.vessels[side]
    drowned = ~contains(remaining, (tree.start + tree.end) / 2)
    return PlacedLesion("effusion", side, MU_SOFT, (), remaining, _without(tree, drowned), 1.0, 60 + rise)


def _pneumothorax(thorax: Thorax, side: Side, rng: np.random.Generator) -> PlacedLesion:
    """Air over the apex and the side; the lung shrinks towards hilum and base with its vessels.

    It still reaches the chest wall in front and behind, so the air is a crescent seen from the front.
    """
    lung = thorax.lungs[side]
    sign = 1.0 if side == "left" else -1.0
    pivot = np.array([sign * 22, float(lung.center[1]), float(thorax.organs[side][0].center[2]) + 60], np.float32)
    factors = np.array([rng.uniform(0.64, 0.74), 1.0, rng.uniform(0.76, 0.86)], np.float32)
    volume = float(factors.prod())
    return PlacedLesion(
        "pneumothorax",
        side,
        MU_AIR,
        (),
        lung.contracted(pivot, factors * np.array([1.0, 1.4, 1.0], np.float32)),
        thorax.vessels[side].contracted(pivot, factors),
        min(1.0 / volume, 1.35),
        float(1 - factors[0]) * 140,
    )


def _without(tree: VesselTree, hidden: np.ndarray) -> VesselTree:
    return VesselTree(tree.start[~hidden], tree.end[~hidden], tree.radius[~hidden])


def _spread(bodies: list[Quadric]) -> float:
    centers = np.stack([body.center for body in bodies])
    return float(np.linalg.norm(centers - centers.mean(axis=0), axis=1).mean()) + 22


def _open_lung(thorax: Thorax, side: Side, rng: np.random.Generator, margin_mm: float) -> Array:
    """Draw a point of the lung whose surroundings are lung on a frontal view: not behind heart or diaphragm."""
    lung, organs = thorax.lungs[side], thorax.organs[side]
    axes = np.linalg.inv(lung.matrix.astype(np.float64))
    around = margin_mm * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    for _ in range(400):
        unit = rng.uniform(-1, 1, 3)
        if np.linalg.norm(unit) > 0.78:
            continue
        point = lung.center + axes @ unit
        probes = np.stack([point[0] + around[:, 0], np.full(5, point[1]), point[2] + around[:, 1]]).astype(np.float32)
        rays = Rays(probes, np.broadcast_to(np.array([[0], [-1], [0]], np.float32), (3, 5)))
        if all(not length(cross(organ, rays)).any() for organ in organs) and length(cross(lung, rays)).min() > 70:
            return point.astype(np.float32)
    raise AssertionError("no open lung in this thorax")
