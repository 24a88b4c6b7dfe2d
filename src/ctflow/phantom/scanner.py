"""Effects of a scanner: reconstruction blur, and correlated, non-uniform noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctflow.phantom.grid import FloatVolume, Grid


@dataclass(frozen=True)
class Scanner:
    """Reconstruction of a series.

    Attributes:
        blur_mm: Standard deviation of the reconstruction's point spread, in the slice.
        noise_hu: Standard deviation of the noise in the middle of the body.
        grain_mm: Size of the noise's grain.
    """

    blur_mm: float
    noise_hu: float
    grain_mm: float


def scanner_from_rng(rng: np.random.Generator) -> Scanner:
    """Draw a kernel, from soft to sharp, and a dose."""
    blur = rng.uniform(0.45, 0.75)
    return Scanner(blur_mm=blur, noise_hu=rng.uniform(12, 38), grain_mm=rng.uniform(0.9, 1.2) * blur)


def scan(rng: np.random.Generator, hu: FloatVolume, grid: Grid, scanner: Scanner, skin: FloatVolume) -> None:
    """Blur and add noise, in place, slice by slice.

    Args:
        rng: Draws the noise.
        hu: (D, H, W).
        grid: Its grid.
        scanner: Blur and noise.
        skin: (D, h, w) signed distance to the skin on a coarser raster of each slice: noise grows with depth.
    """
    blur = [scanner.blur_mm / mm for mm in grid.spacing_mm[1:]]
    before: FloatVolume | None = None
    for index in range(len(hu)):
        ndimage.gaussian_filter(hu[index], blur, output=hu[index])
        fresh = _noise_slice(rng, hu.shape[1:], [scanner.grain_mm / mm for mm in grid.spacing_mm[1:]])
        # Neighbouring slices share part of their noise, as the slice profiles overlap.
        mixed = fresh if before is None else np.float32(0.87) * fresh + np.float32(0.49) * before
        before = fresh
        hu[index] += mixed * _strength(skin[index], hu.shape[1:], scanner.noise_hu)


def _noise_slice(rng: np.random.Generator, shape: tuple[int, ...], grain: list[float]) -> FloatVolume:
    """Noise of unit standard deviation with the band-pass spectrum of filtered back projection."""
    white = rng.standard_normal(shape, dtype=np.float32)
    fine = ndimage.gaussian_filter(white, grain, truncate=3.0, mode="wrap")
    coarse = ndimage.gaussian_filter(fine, [2.2 * size for size in grain], truncate=2.5, mode="wrap")
    band = fine - np.float32(0.75) * coarse
    unit: FloatVolume = band * np.float32(1.0 / max(float(band.std()), 1e-6))
    return unit


def _strength(skin: FloatVolume, shape: tuple[int, ...], noise_hu: float) -> npt.NDArray[np.float32]:
    """Noise level: lowest in air, highest deep in the body."""
    share = np.float32(0.35) + np.float32(0.65) * np.clip(-skin / 70, 0.0, 1.0)
    factors = [n / m for n, m in zip(shape, skin.shape, strict=True)]
    grown = ndimage.zoom(share, factors, order=1, mode="nearest", grid_mode=True)
    strength: npt.NDArray[np.float32] = (noise_hu * grown).astype(np.float32)
    return strength
