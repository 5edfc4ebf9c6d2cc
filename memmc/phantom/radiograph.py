"""From a thorax to a 12-bit radiograph for presentation: beam, scatter, detector, noise, processing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from memmc.phantom.lesions import MASK_PATH_MM, Lesion, PlacedLesion, place
from memmc.phantom.projection import (
    Array,
    Camera,
    Rays,
    cross,
    intersect,
    join,
    length,
    project_tubes,
    uncovered_length,
    union_length,
)
from memmc.phantom.thorax import MU_AIR, MU_LUNG, MU_SOFT, SIDES, Side, Thorax, build_thorax

BITS_STORED = 12
FIELD_MM = 400.0
SOURCE_TO_DETECTOR_MM = 1800.0
PATIENT_TO_DETECTOR_MM = 150.0


@dataclass(frozen=True)
class Radiograph:
    """A simulated exposure.

    Attributes:
        image_HW: uint16, 12 bit, MONOCHROME2 (bone bright).
        mask_HW: bool, pixels whose ray crosses the lesion; all False for a normal.
        info: what was drawn: pixel_mm, breath_mm, photons, sex, and the lesion's kind, side and size.
    """

    image_HW: npt.NDArray[np.uint16]
    mask_HW: npt.NDArray[np.bool_]
    info: dict[str, Any]


def simulate(
    patient_seed: int,
    exposure_seed: int,
    lesion: Lesion | None = None,
    size_px: int = 256,
    view: Literal["PA", "LL"] = "PA",
) -> Radiograph:
    """Expose a patient once.

    Args:
        patient_seed: anatomy; the same seed is the same patient.
        exposure_seed: breath, pose, dose and noise.
        lesion: what to plant, or None for a normal.
        size_px: side of the square image.
        view: (0018,5101) View Position; PA from behind, LL from the right side.
    """
    rng = np.random.default_rng([patient_seed, exposure_seed, 3])
    breath_mm = float(rng.uniform(0, 5))
    camera = _camera(rng, size_px, 90.0 if view == "LL" else 0.0)
    thorax = build_thorax(patient_seed, breath_mm)
    placed = place(lesion, thorax) if lesion is not None else None
    attenuation_HW, path_HW = line_integrals(thorax, placed, camera)
    photons = float(np.exp(rng.uniform(np.log(3e4), np.log(6e4)))) * (camera.pixel_mm / 1.6) ** 2
    counts_HW = expose(attenuation_HW, photons, camera.pixel_mm, rng)
    info: dict[str, Any] = {"pixel_mm": camera.pixel_mm, "breath_mm": breath_mm, "photons": photons, "sex": thorax.sex}
    mask_HW = np.zeros(attenuation_HW.shape, bool)
    if placed is not None:
        mask_HW = path_HW > MASK_PATH_MM[placed.kind]
        info |= {"lesion": placed.kind, "side": placed.side, "size_mm": placed.size_mm}
    return Radiograph(present(counts_HW, photons, camera.pixel_mm), mask_HW, info)


def _camera(rng: np.random.Generator, size_px: int, turn_degrees: float) -> Camera:
    """Upright stand with small errors of positioning; no turn is posterior-anterior."""
    turn, lean = np.radians(turn_degrees + rng.normal(0, 0.8)), np.radians(rng.normal(0, 1.0))
    shift = np.array([rng.normal(0, 5), 0, rng.normal(-14, 5)])
    right = np.array([np.cos(turn) * np.cos(lean), np.sin(turn) * np.cos(lean), np.sin(lean)])
    beam = np.array([np.sin(turn), -np.cos(turn), 0.0])
    down = np.cross(right, beam)
    down /= np.linalg.norm(down)
    beam = np.cross(down, right)
    right, down, beam = (vector.astype(np.float32) for vector in (right, down, beam))
    center = shift.astype(np.float32)
    return Camera(
        source=center - beam * np.float32(SOURCE_TO_DETECTOR_MM - PATIENT_TO_DETECTOR_MM),
        origin=center + beam * np.float32(PATIENT_TO_DETECTOR_MM),
        right=right,
        down=down,
        size_px=size_px,
        pixel_mm=FIELD_MM * float(rng.uniform(0.98, 1.02)) / size_px,
    )


def line_integrals(thorax: Thorax, placed: PlacedLesion | None, camera: Camera) -> tuple[Array, Array]:
    """Return the attenuation integral of each ray, dimensionless, and the path inside the lesion, mm, both (H, W)."""
    rays = camera.rays()
    total = np.float32(MU_SOFT) * union_length([cross(part, rays) for part in thorax.body])
    total += np.float32(MU_AIR - MU_SOFT) * union_length([cross(part, rays) for part in thorax.gas])
    path = np.zeros_like(total)
    trees = []
    for side in SIDES:
        mine = placed if placed is not None and placed.side == side else None
        change, inside = _lung(thorax, side, mine, rays)
        total += change
        path += inside
        trees.append((mine.vessels if mine else thorax.vessels[side]).tubes())
    for plate, weight in thorax.plates:
        total += np.float32(weight) * length(cross(plate, rays))
    total += project_tubes(join([thorax.bones, thorax.airways, *trees]), camera, rays)
    shape = (camera.size_px, camera.size_px)
    return np.maximum(total, np.float32(0)).reshape(shape), path.reshape(shape)


def _lung(thorax: Thorax, side: Side, placed: PlacedLesion | None, rays: Rays) -> tuple[Array, Array]:
    """Return what one lung changes in the attenuation of solid soft tissue, and the lesion's path, both (N,)."""
    cavity = cross(thorax.lungs[side], rays)
    organs = [cross(organ, rays) for organ in thorax.organs[side]]
    whole = uncovered_length(cavity, organs)
    aerated, lung_gain = whole, 1.0
    if placed is not None:
        lung_gain = placed.lung_gain
        if placed.remaining is not None:
            aerated = uncovered_length(intersect(cavity, cross(placed.remaining, rays)), organs)
        else:
            aerated = uncovered_length(cavity, [*organs, *(cross(body, rays) for body in placed.bodies)])
    lesion = np.maximum(whole - aerated, np.float32(0))
    texture = _texture(thorax.texture_seed + (side == "left"), round(len(whole) ** 0.5)).ravel()
    change = np.float32(MU_LUNG * lung_gain - MU_SOFT) * aerated + texture * np.sqrt(aerated)
    if placed is not None:
        change += np.float32(placed.mu - MU_SOFT) * lesion
    return change, lesion


def _texture(seed: int, size_px: int) -> Array:
    """Return (H, W) noise with the power law of unresolved lung markings; times sqrt(path in mm) it is attenuation."""
    rng = np.random.default_rng([seed, 4])
    field = np.zeros((size_px, size_px), np.float32)
    for width_mm, strength in ((2.0, 0.0010), (5.0, 0.0014), (11.0, 0.0012)):
        cells = max(8, round(FIELD_MM / width_mm))
        coarse = rng.standard_normal((cells, cells), dtype=np.float32)
        field += np.float32(strength) * _stretch(_stretch(coarse, size_px).T, size_px).T
    return field


def expose(attenuation_HW: Array, photons: float, pixel_mm: float, rng: np.random.Generator) -> Array:
    """Return detected counts, (H, W): Beer-Lambert primary, scatter behind the grid, detector blur, noise.

    Args:
        attenuation_HW: line integrals.
        photons: counts of a pixel without patient.
        pixel_mm: pixel pitch.
        rng: source of the quantum and electronic noise.
    """
    primary = np.exp(-attenuation_HW)
    wide = _blur(primary, 45.0 / pixel_mm)
    mean = np.float32(photons) * (_blur(primary, 0.9 / pixel_mm) + np.float32(0.10) * wide)
    return np.maximum(rng.poisson(mean).astype(np.float32) + rng.normal(0, 6, mean.shape).astype(np.float32), 1)


def present(counts_HW: Array, photons: float, pixel_mm: float) -> npt.NDArray[np.uint16]:
    """Return the image for presentation, 12 bit: log, exposure normalisation, tissue equalisation, grey curve.

    Source: PS3.3 C.8.11.3.1.5 (Pixel Intensity Relationship LOG, sign -1) names the first step.
    """
    log_HW = np.log(np.float32(photons) / counts_HW)
    dark, bright = np.quantile(log_HW[log_HW > 0.35], [0.10, 0.90])
    level = (log_HW - dark) / max(float(bright - dark), 0.3)
    level = np.clip(level, -0.9, 1.6)
    broad = _blur(level, 32.0 / pixel_mm)
    fine = _blur(level, 2.2 / pixel_mm)
    level = 0.62 * broad + 1.30 * (level - broad) + 0.40 * (level - fine)
    grey = 1.0 / (1.0 + np.exp(-3.6 * (level - 0.32)))
    return np.rint(np.clip(grey, 0, 1) * ((1 << BITS_STORED) - 1)).astype(np.uint16)


def _blur(image_HW: Array, sigma_px: float) -> Array:
    """Return the image under a Gaussian, mirrored at its edges."""
    for axis in (0, 1):
        size = image_HW.shape[axis]
        mirrored = np.concatenate([image_HW, np.flip(image_HW, axis)], axis=axis)
        shape = (-1, 1) if axis == 0 else (1, -1)
        spectrum = np.fft.rfft(mirrored, axis=axis) * _gaussian_response(2 * size, float(sigma_px)).reshape(shape)
        image_HW = np.take(np.fft.irfft(spectrum, n=2 * size, axis=axis), range(size), axis=axis)
    return image_HW.astype(np.float32)


@functools.lru_cache(maxsize=16)
def _gaussian_response(length_px: int, sigma_px: float) -> Array:
    """Return the transfer function of a Gaussian at the frequencies of a real FFT."""
    return np.exp(-2 * (np.pi * sigma_px * np.fft.rfftfreq(length_px)) ** 2).astype(np.float32)


def _stretch(coarse: Array, size_px: int) -> Array:
    """Return the first axis interpolated to `size_px`, unit variance for white cells."""
    cells = len(coarse)
    place_cells = (np.arange(size_px) + 0.5) * cells / size_px - 0.5
    nearest = np.rint(place_cells).astype(int)
    taps = np.stack([nearest + step for step in (-1, 0, 1)])
    weights = np.exp(-0.5 * ((taps - place_cells) / 0.55) ** 2)
    weights /= np.sqrt((weights**2).sum(axis=0))
    rows = coarse[np.clip(taps, 0, cells - 1)]
    return np.einsum("tpc,tp->pc", rows, weights.astype(np.float32))
