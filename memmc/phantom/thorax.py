"""A patient's thorax as convex bodies and tubes, drawn from one seed.

Sizes are those of an adult chest (mm); attenuation coefficients are near those of water, lung at
0.26 g/cm3, and bone at the mean energy of a 120 kV beam behind a patient, about 65 keV.
Source of the coefficients: NIST X-ray mass attenuation tables, rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from memmc.phantom.projection import (
    Array,
    Quadric,
    Tubes,
    contains,
    ellipsoid,
    join,
    mirrored,
    separate_tubes,
    tube_chain,
)

Side = Literal["right", "left"]
SIDES: tuple[Side, Side] = ("right", "left")

MU_SOFT = 0.0195
MU_LUNG = 0.0042
MU_MARROW = 0.0290
MU_CORTEX = 0.0480
MU_AIR = 0.0

# Position of the hila, where the vessels enter and a collapsing lung stays attached, mm.
HILUM = (36.0, 8.0, -4.0)


@dataclass(frozen=True)
class VesselTree:
    """Branches of one lung.

    Attributes:
        start, end: (S, 3) mm.
        radius: (S,) mm.
    """

    start: Array
    end: Array
    radius: Array

    def tubes(self, keep_S: npt.NDArray[np.bool_] | None = None) -> Tubes:
        """Return the branches as blood that displaces lung, optionally a part of them."""
        chosen = slice(None) if keep_S is None else keep_S
        radii = np.stack([self.radius[chosen]] * 2, axis=1)
        return separate_tubes(self.start[chosen], self.end[chosen], radii, MU_SOFT - MU_LUNG)

    def contracted(self, pivot: Array, factors: Array) -> VesselTree:
        """Return the tree after the lung has shrunk by x -> pivot + factors * (x - pivot)."""
        return VesselTree(pivot + factors * (self.start - pivot), pivot + factors * (self.end - pivot), self.radius)


@dataclass(frozen=True)
class Thorax:
    """Everything the beam meets.

    Attributes:
        body: soft tissue; the patient is their union.
        lungs: one per side, before organs are taken out.
        organs: soft tissue that displaces lung, per side.
        gas: air inside soft tissue (stomach).
        plates: flat bones that add attenuation, with the coefficient, 1/mm.
        bones: ribs, clavicles, spine, humeri.
        airways: trachea and main bronchi; negative attenuation.
        vessels: one tree per side.
        texture_seed: seed of the unresolved lung texture.
        sex: (0010,0040) Patient's Sex.
    """

    body: tuple[Quadric, ...]
    lungs: dict[Side, Quadric]
    organs: dict[Side, tuple[Quadric, ...]]
    gas: tuple[Quadric, ...]
    plates: tuple[tuple[Quadric, float], ...]
    bones: Tubes
    airways: Tubes
    vessels: dict[Side, VesselTree]
    texture_seed: int
    sex: Literal["F", "M"]


@dataclass(frozen=True)
class Build:
    """The handful of numbers in which patients differ.

    Attributes:
        wide, deep, tall: scale factors of the rib cage along x, y, z.
        tissue_mm: thickness of muscle and fat around the cage.
        heart: scale factor of the heart.
        heart_roll: lean of the heart's long axis, degrees.
        dome_mm: height of the right dome of the diaphragm, z.
        dome_gap_mm: how much lower the left dome stands.
        slope_mm: fall of a rib from back to front.
        knob: scale factor of the aortic knob.
        female: breasts are present.
    """

    wide: float
    deep: float
    tall: float
    tissue_mm: float
    heart: float
    heart_roll: float
    dome_mm: float
    dome_gap_mm: float
    slope_mm: float
    knob: float
    female: bool


def draw_build(rng: np.random.Generator) -> Build:
    """Draw a patient's build."""
    spread = rng.standard_normal(9).clip(-2, 2)
    size = 0.025 * spread[0]
    return Build(
        wide=1.0 + size + 0.03 * spread[1],
        deep=1.0 + size + 0.04 * spread[2],
        tall=1.0 + size + 0.025 * spread[3],
        tissue_mm=24.0 + 5.0 * spread[4],
        heart=1.0 + 0.07 * spread[5],
        heart_roll=44.0 + 4.0 * spread[6],
        dome_mm=-82.0 + 5.0 * spread[7],
        dome_gap_mm=11.0 + 3.0 * spread[8],
        slope_mm=float(rng.uniform(64, 86)),
        knob=float(rng.uniform(0.8, 1.15)),
        female=bool(rng.random() < 0.5),
    )


def build_thorax(patient_seed: int, breath_mm: float = 0.0) -> Thorax:
    """Return the thorax of a patient.

    Args:
        patient_seed: the same seed gives the same anatomy.
        breath_mm: height of the diaphragm over the patient's deep inspiration.
    """
    rng = np.random.default_rng([patient_seed, 1])
    build = draw_build(rng)
    lungs = _lungs(build)
    organs = _organs(build, breath_mm)
    return Thorax(
        body=_body(build),
        lungs=lungs,
        organs=organs,
        gas=_stomach_gas(build, breath_mm, rng),
        plates=_plates(build),
        bones=join([_ribs(build), _clavicles(build), _spine(build), _shoulder_girdle(build)]),
        airways=_airways(),
        vessels={side: _vessels(side, build, lungs[side], rng) for side in SIDES},
        texture_seed=int(rng.integers(1 << 31)),
        sex="F" if build.female else "M",
    )


def _lungs(build: Build) -> dict[Side, Quadric]:
    left = ellipsoid(
        (67 * build.wide, -6, -62 * build.tall),
        (70 * build.wide, 92 * build.deep, 186 * build.tall),
        roll_degrees=-6.5,
    )
    return {"right": mirrored(left), "left": left}


def _organs(build: Build, breath_mm: float) -> dict[Side, tuple[Quadric, ...]]:
    """Heart, great vessels, mediastinum and diaphragm, the parts that border each lung."""
    dome, scale = build.dome_mm + breath_mm, build.heart
    domes: dict[Side, Quadric] = {
        "right": ellipsoid((-66 * build.wide, -8, dome - 92), (100 * build.wide, 122, 92)),
        "left": ellipsoid((70 * build.wide, -4, dome - build.dome_gap_mm - 92), (100 * build.wide, 122, 92)),
    }
    heart_z = -62 + 0.5 * breath_mm
    ventricles = ellipsoid((27 * build.wide, -38, heart_z), (48 * scale, 46, 66 * scale), -build.heart_roll)
    atrium = ellipsoid((-11, -22, heart_z + 4), (35 * scale, 38, 47 * scale))
    column = ellipsoid((0, 0, 0), (22, 66 * build.deep, np.inf))
    spine = ellipsoid((0, 60 * build.deep, 0), (24, 30, np.inf))
    cava = ellipsoid((-18, -8, 44), (14, 20, 70))
    knob = ellipsoid((21, 8, 50 * build.tall), (18 * build.knob, 24, 19 * build.knob))
    trunk = ellipsoid((24, -20, 8), (18, 22, 34))
    return {
        "right": (domes["right"], ventricles, atrium, column, spine, cava),
        "left": (domes["left"], ventricles, column, spine, knob, trunk),
    }


def _body(build: Build) -> tuple[Quadric, ...]:
    wide = 142 * build.wide + build.tissue_mm
    deep = 92 * build.deep + 0.9 * build.tissue_mm
    trunk = ellipsoid((0, 0, -110), (wide, deep, 330))
    neck = ellipsoid((0, 10, 0), (56, 58, np.inf))
    shoulder = ellipsoid((88, 14, 92 * build.tall), (118, 62, 62), roll_degrees=14)
    arm = ellipsoid((192 * build.wide, 8, 26), (46, 48, 150), roll_degrees=-13)
    parts = [trunk, neck, shoulder, mirrored(shoulder), arm, mirrored(arm)]
    if build.female:
        breast = ellipsoid((74 * build.wide, -deep + 46, -82), (66, 62, 64))
        parts += [breast, mirrored(breast)]
    return tuple(parts)


def _stomach_gas(build: Build, breath_mm: float, rng: np.random.Generator) -> tuple[Quadric, ...]:
    top = build.dome_mm + breath_mm - build.dome_gap_mm - 16
    size = float(rng.uniform(0.6, 1.2))
    return (ellipsoid((58 + float(rng.uniform(-12, 12)), 0, top - 14 * size), (26 * size, 26 * size, 13 * size), -8),)


def _plates(build: Build) -> tuple[tuple[Quadric, float], ...]:
    """Scapular blades, humeral heads and the sternum."""
    blade = ellipsoid((152 * build.wide, 70, 34), (30, 4, 74), roll_degrees=-10)
    head = ellipsoid((176 * build.wide, 8, 96 * build.tall), (23, 23, 24))
    sternum = ellipsoid((0, -90 * build.deep, -5), (17, 6, 88))
    gain = MU_MARROW - MU_SOFT
    blades = [(part, gain * 1.2) for part in (blade, mirrored(blade))]
    heads = [(part, gain * 1.3) for part in (head, mirrored(head))]
    return (*blades, *heads, (sternum, gain * 0.8))


def _cage_mm(build: Build, z: Array) -> tuple[Array, Array]:
    """Return the half width and half depth of the rib cage at heights z: just outside the lungs."""
    level = (z / build.tall + 62) / 186
    waist = np.sqrt(np.clip(1 - level * level, 0.02, 1))
    return build.wide * (68 - 0.114 * (z + 62) + 70 * waist) + 3, build.deep * (34 + 60 * waist) + 2


def _ribs(build: Build) -> Tubes:
    """Ribs 1 to 12 of both sides: half rings that fall from back to front."""
    parts: list[Tubes] = []
    for number in range(1, 13):
        top = (122 - 23.0 * (number - 1)) * build.tall
        end = {1: 2.3, 11: 1.35, 12: 0.95}.get(number, 2.4 - 0.07 * max(0, number - 6))
        angle = np.linspace(0.22, end, 34 if number < 11 else 20, dtype=np.float32)
        fall = build.slope_mm * (0.72 + 0.035 * number) * (1 - np.cos(angle)) / 2
        z = top - fall + 7 * np.sin(angle) ** 2
        half_width, half_depth = _cage_mm(build, z)
        shrink = np.float32(0.8 if number == 1 else 1.0)
        line = np.stack([shrink * half_width * np.sin(angle), shrink * half_depth * np.cos(angle) - 6, z], axis=1)
        taper = 0.9 if number in (1, 11, 12) else 1.0
        parts.append(_bone(line, (3.3 * taper, 6.4 * taper), 0.68))
    return _both_sides(parts)


def _bone(line: Array, radii_mm: tuple[float, float], core: float) -> Tubes:
    """Return a long bone: cortex, and marrow inside `core` of its section."""
    return tube_chain(line, radii_mm, MU_CORTEX - MU_SOFT, (core, MU_MARROW - MU_CORTEX))


def _both_sides(parts: list[Tubes]) -> Tubes:
    left = join(parts)
    return join([left, left.mirrored()])


def _clavicles(build: Build) -> Tubes:
    u = np.linspace(0, 1, 18, dtype=np.float32)
    line = np.stack(
        [
            (16 + 142 * u) * build.wide,
            -72 * build.deep + 84 * u,
            (84 + 34 * u + 9 * np.sin(2 * np.pi * u)) * build.tall,
        ],
        axis=1,
    )
    return _both_sides([_bone(line, (5.5, 6.2), 0.75)])


def _shoulder_girdle(build: Build) -> Tubes:
    """Humeral shafts, and the lateral borders and spines of the scapulae."""
    u = np.linspace(0, 1, 10, dtype=np.float32)[:, None]
    wide = build.wide
    shaft = np.array([183 * wide, 8, 79]) * (1 - u) + np.array([236 * wide, 6, -190]) * u
    border = np.array([158 * wide, 40, 84]) * (1 - u) + np.array([142 * wide, 78, -34]) * u
    spine = np.array([164 * wide, 40, 112]) * (1 - u) + np.array([112 * wide, 84, 84]) * u
    bend = np.sin(np.pi * u) * np.array([7, 0, 0])
    return _both_sides([_bone(shaft, (11, 11), 0.7), _bone(border + bend, (4, 4), 0.7), _bone(spine, (3.6, 3.6), 0.7)])


def _spine(build: Build) -> Tubes:
    """Vertebral bodies with end plates, pedicles and spinous processes, from the lower neck to L3."""
    number = np.arange(-4, 15)
    pitch = 24.5 * build.tall
    z = 126 * build.tall - pitch * number
    wide, back = 15.0 + 0.4 * number, 58 * build.deep
    gain = 0.5 * (MU_MARROW - MU_SOFT)
    # Each row: offset x (in body half widths), y and z, height, semi-axes x (0: the body's) and y, gain.
    shapes = (
        (0.0, 0, 0, 0.82 * pitch, 0, 14.0, 1.0),
        (0.0, 0, 0.37 * pitch, 2.0, 0, 14.5, 0.7),
        (0.0, 0, -0.37 * pitch, 2.0, 0, 14.5, 0.7),
        (0.68, 18, 4, 8.0, 3.4, 6.0, 1.7),
        (-0.68, 18, 4, 8.0, 3.4, 6.0, 1.7),
        (0.0, 36, -10, 12.0, 2.2, 9.0, 1.6),
    )
    centers, heights, radii, gains = [], [], [], []
    for x, y, lift, height, semi_x, semi_y, strength in shapes:
        centers.append(np.stack([x * wide, np.full_like(z, back + y), z + lift], axis=1))
        heights.append(np.full_like(z, height / 2))
        radii.append(np.stack([wide if semi_x == 0 else np.full_like(z, semi_x), np.full_like(z, semi_y)], axis=1))
        gains.append(np.full_like(z, strength * gain))
    center = np.concatenate(centers)
    rise = np.concatenate(heights)[:, None] * np.array([0, 0, 1])
    start, end, radii_S2 = ((part).astype(np.float32) for part in (center - rise, center + rise, np.concatenate(radii)))
    return separate_tubes(start, end, radii_S2, np.concatenate(gains).astype(np.float32))


def _airways() -> Tubes:
    """Trachea and main bronchi."""
    carina = np.array([2.0, 10.0, 30.0])
    trachea = np.linspace([0, 2, 240], carina, 8)
    right = np.linspace(carina, [-34, 14, -2], 4)
    left = np.linspace(carina, [42, 18, 2], 4)
    line = np.concatenate([trachea[:-1], right[:-1], left[:-1]]).astype(np.float32)
    ends = np.concatenate([trachea[1:], right[1:], left[1:]]).astype(np.float32)
    radius = np.repeat(np.array([8.5, 6.5, 5.5], np.float32), [7, 3, 3])
    return separate_tubes(line, ends, np.stack([radius, radius], axis=1), MU_AIR - MU_SOFT)


def _vessels(side: Side, build: Build, lung: Quadric, rng: np.random.Generator) -> VesselTree:
    """Grow pulmonary arteries and veins from the hilum: each branch bends, thins and divides in two."""
    limit = lung.contracted(lung.center, np.full(3, 0.97, np.float32))
    sign = 1.0 if side == "left" else -1.0
    hilum = np.array([sign * HILUM[0], HILUM[1], HILUM[2] + (4 if side == "left" else -4)])
    fan = np.radians([-72, -58, -42, -22, 0, 24, 48, 70, -64, 34])
    depth = rng.uniform(-0.75, 0.75, fan.shape)
    heading = np.stack([sign * np.cos(fan), depth, np.sin(fan)], axis=1)
    point = np.repeat(hilum[None], len(fan), axis=0) + rng.normal(0, 4, (len(fan), 3))
    radius = np.where(fan < -0.3, 4.4, 3.5) * rng.uniform(0.85, 1.1, fan.shape)
    starts, ends, radii = [], [], []
    for generation in range(6):
        stretch = (15.0, 13.0, 11.0, 10.0, 8.0, 7.0)[generation] * build.tall
        for _ in range(2):
            heading = heading + rng.normal(0, 0.16, heading.shape)
            heading /= np.linalg.norm(heading, axis=1, keepdims=True)
            goal = point + stretch * heading
            inside = contains(limit, goal.astype(np.float32))
            point, goal, heading, radius = point[inside], goal[inside], heading[inside], radius[inside]
            starts.append(point)
            ends.append(goal)
            radii.append(radius)
            point = goal
        turn = rng.normal(0, 1, heading.shape)
        turn -= np.einsum("ij,ij->i", turn, heading)[:, None] * heading
        turn *= (rng.uniform(0.3, 0.65, len(turn)) / np.linalg.norm(turn, axis=1))[:, None]
        heading = np.concatenate([heading + turn, heading - turn])
        point = np.concatenate([point, point])
        radius = np.concatenate([radius * 0.82, radius * rng.uniform(0.6, 0.8)])
    start, end, width = (np.concatenate(part).astype(np.float32) for part in (starts, ends, radii))
    return VesselTree(start, end, width)
