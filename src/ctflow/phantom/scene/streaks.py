"""Streaks and shadows: effects of beam hardening and photon starvation at metal, dense contrast medium and shoulders.

For each affected slice, rays through the dense material are summed, given a scanner's error there, and projected back
with the ramp filter, as the image was.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ctflow.phantom.grid import FloatVolume, Grid, interpolation_matrix

_ANGLES = 150
_RAY_MM = 2.0
_RASTER = 150  # pixels per side of the streaks' raster; streaks are smooth along their rays
_PER_MM = 0.019  # attenuation of water
_AT_ONCE = 20  # slices
_MOST = 40  # of the slices that streaks are computed for


def add_streaks(
    rng: np.random.Generator, hu: FloatVolume, grid: Grid, dense: list[tuple[int, FloatVolume]], strength: float
) -> None:
    """Add streaks of dense material to its slices, in place.

    Args:
        rng: Draws the photons' noise.
        hu: (D, H, W), scanned.
        grid: Its grid.
        dense: From `dense_in`.
        strength: 1 without metal artefact correction, less with it.
    """
    if not dense:
        return
    pixel = max(grid.shape[1] * grid.spacing_mm[1], grid.shape[2] * grid.spacing_mm[2]) / _RASTER
    raster = Grid((1, _RASTER, _RASTER), (1.0, pixel, pixel), (0.0, *grid.centre_mm[1:]))
    upwards, across = (_onto(grid.lines_mm[axis], raster.lines_mm[axis]) for axis in (1, 2))
    # Neighbouring slices of a long implant or vein have almost the same streaks.
    step = -(-len(dense) // _MOST)
    groups = [dense[first : first + step] for first in range(0, len(dense), step)]
    for first in range(0, len(groups), _AT_ONCE):
        part = groups[first : first + _AT_ONCE]
        errors = np.stack([_errors(rng, group[len(group) // 2][1], raster) for group in part])
        for group, image in zip(part, _back_projected(errors, raster), strict=True):
            streaks = np.float32(strength) * np.clip(upwards @ image @ across.T, -900, 1200)
            hu[[index for index, _ in group]] += streaks


def dense_in(hu: FloatVolume, grid: Grid, above_hu: float, back_mm: float) -> list[tuple[int, FloatVolume]]:
    """Slices with dense material: their index, and its (n, 3) y, x and extra attenuation times area.

    Args:
        hu: (D, H, W) before the scan.
        grid: Its grid.
        above_hu: Threshold of dense material.
        back_mm: End of the patient (y); rails and cables below are left out.
    """
    found = []
    area = grid.spacing_mm[1] * grid.spacing_mm[2]
    rows_in_patient = int((grid.lines_mm[1] < back_mm).sum())
    for index, image in enumerate(hu[:, :rows_in_patient]):
        if image.max() > above_hu:
            rows, columns = np.nonzero(image > above_hu)
            extra = image[rows, columns] * np.float32(_PER_MM / 1000 * area)
            points = [grid.lines_mm[1][rows], grid.lines_mm[2][columns], extra]
            found.append((index, np.column_stack(points).astype(np.float32)))
    return found


def add_starvation(rng: np.random.Generator, hu: FloatVolume, grid: Grid, width_mm: FloatVolume) -> None:
    """Add lateral noise lines where the patient is widest, as at the shoulders, in place.

    Args:
        rng: Draws the noise.
        hu: (D, H, W), scanned.
        grid: Its grid.
        width_mm: (D,) width of the patient in each slice.
    """
    x, strength = grid.lines_mm[2], rng.uniform(0.03, 0.16)
    # A line changes slowly from side to side: a few values along it suffice.
    knots = np.arange(x[0] - 70, x[-1] + 140, 70, dtype=np.float32)
    across = _onto(x, knots).T
    for index in np.flatnonzero(width_mm > 400):
        rays = rng.standard_normal((hu.shape[1], len(knots)), dtype=np.float32)
        lines = ndimage.gaussian_filter1d(rays, 0.9 / grid.spacing_mm[1], axis=0, mode="nearest") @ across
        lines *= np.float32(strength * min(float(width_mm[index]) - 400, 120) / max(float(lines.std()), 1e-6))
        hu[index] += lines * np.clip(hu[index] / 500 + np.float32(1.7), 0.3, 1)  # many rays arrive outside the patient


def _onto(fine_mm: FloatVolume, coarse_mm: FloatVolume) -> FloatVolume:
    """Interpolation from the raster to the pixels as a full matrix."""
    used, matrix = interpolation_matrix(fine_mm, coarse_mm)
    whole = np.zeros((len(fine_mm), len(coarse_mm)), np.float32)
    whole[:, used] = matrix
    return whole


def _rays(raster: Grid) -> tuple[FloatVolume, FloatVolume, int]:
    """Cosine and sine of each angle, and the number of rays per angle."""
    angles = (np.arange(_ANGLES, dtype=np.float32) + np.float32(0.5)) * np.float32(np.pi / _ANGLES)
    reach = raster.spacing_mm[1] * _RASTER * 1.45
    return np.cos(angles), np.sin(angles), 2 * int(reach / _RAY_MM / 2) + 1


def _errors(rng: np.random.Generator, points: FloatVolume, raster: Grid) -> FloatVolume:
    """(angles, rays): measurement error of each ray, filtered."""
    cosine, sine, count = _rays(raster)
    y, x = (points[:, axis] - np.float32(middle) for axis, middle in zip((0, 1), raster.centre_mm[1:], strict=True))
    place = (x[None] * cosine[:, None] + y[None] * sine[:, None]) / np.float32(_RAY_MM) + count / 2
    left = np.clip(place.astype(np.int32), 0, count - 2)
    share = np.clip(place - left, 0, 1)
    start = (np.arange(_ANGLES) * count)[:, None]
    weight = points[:, 2] / np.float32(_RAY_MM)
    total = np.bincount((start + left).ravel(), (weight * (1 - share)).ravel(), _ANGLES * count)
    total += np.bincount((start + left + 1).ravel(), (weight * share).ravel(), _ANGLES * count)
    path = total.reshape(_ANGLES, count).astype(np.float32)
    # Lateral rays cross more of the patient, so metal adds to more attenuation.
    body = np.float32(0.35) + np.float32(0.75) * sine[:, None] ** 2
    hardened = -np.float32(0.16) * path * (path + body) / (1 + np.float32(0.35) * path)
    noise = rng.standard_normal(path.shape, dtype=np.float32) * (np.exp(np.minimum(path, 4) * np.float32(0.7)) - 1)
    return _ramp(hardened + np.float32(0.03) * noise * body)


def _ramp(projections: FloatVolume) -> FloatVolume:
    """Filtered projections (Ram-Lak with a Hann window)."""
    count = projections.shape[-1]
    size = 2 ** int(np.ceil(np.log2(2 * count)))
    frequency = np.fft.rfftfreq(size)
    ramp = 2 * frequency * (0.5 + 0.5 * np.cos(2 * np.pi * frequency)) / (2 * _RAY_MM)
    filtered = np.fft.irfft(np.fft.rfft(projections, size, axis=-1) * ramp, size, axis=-1)[..., :count]
    return filtered.astype(np.float32)


def _back_projected(errors: FloatVolume, raster: Grid) -> FloatVolume:
    """(n, angles, rays) to (n, rows, columns) in HU."""
    cosine, sine, count = _rays(raster)
    _, y, x = raster.lines_mm
    y, x = y - np.float32(raster.centre_mm[1]), x - np.float32(raster.centre_mm[2])
    images = np.zeros((len(errors), _RASTER, _RASTER), np.float32)
    for angle in range(_ANGLES):
        place = (x[None] * cosine[angle] + y[:, None] * sine[angle]) / np.float32(_RAY_MM) + np.float32(count / 2)
        left = place.astype(np.int32)
        share = place - left
        rays = errors[:, angle]
        images += rays[:, left] * (1 - share) + rays[:, left + 1] * share
    return images * np.float32(np.pi / _ANGLES * 1000 / _PER_MM)
