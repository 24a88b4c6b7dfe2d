"""Simulate another acquisition of the same anatomy: slices, kernel, noise, field of view, range, contrast medium.

Everything works on cubic voxels and keeps image and label on one grid. The result may have thicker slices, like a
site's series before it is resampled to the model's spacing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctflow.core.volume import Labels
from ctflow.phantom.grid import FloatVolume

_PADDING_HU = (-1024.0, -2000.0, -3024.0)
_SMALLEST_MM = 110.0  # three quarters of a window


@dataclass(frozen=True, eq=False)
class Sample:
    """A volume and its labels on one grid.

    Attributes:
        hu: (D, H, W) float32.
        labels: (D, H, W) uint8.
        spacing_mm: Along (D, H, W).
        start_mm: Position of the first voxel along (D, H, W), from the corner of the whole volume.
    """

    hu: FloatVolume
    labels: Labels
    spacing_mm: tuple[float, float, float]
    start_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def affine_lps(self) -> npt.NDArray[np.float64]:
        """Array index (d, h, w) to LPS mm: head first, supine."""
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2] = self.spacing_mm
        affine[:3, 3] = self.start_mm[::-1]
        affine[3, 3] = 1.0
        return affine


def acquire(rng: np.random.Generator, sample: Sample, *, native_mm: float) -> Sample:
    """Draw a scanner and a protocol, and simulate their acquisition of the sample.

    Args:
        rng: Draws.
        sample: Cubic voxels; its arrays are not changed.
        native_mm: Thickness of the slices that it was made from: they do not get thinner.
    """
    sample = _cropped(rng, sample)
    hu = sample.hu.copy()
    if rng.random() < 0.3:
        _contrast(rng, hu)
    if rng.random() < 0.5:
        hu = _kernel(rng, hu)
    if rng.random() < 0.5:
        _noise(rng, hu)
    if rng.random() < 0.35:
        _scan_circle(rng, hu)
    shown = Sample(hu, sample.labels, sample.spacing_mm, sample.start_mm)
    thickness = float(rng.choice([0.0, 0.0, 2.0, 2.5, 3.0, 5.0]))
    return _thick(shown, thickness) if thickness > max(native_mm, sample.spacing_mm[0]) else shown


def _cropped(rng: np.random.Generator, sample: Sample) -> Sample:
    """Crop to a range with arbitrary ends, or to a field of view that cuts off skin and table."""
    box = [slice(0, n) for n in sample.hu.shape]
    for axis, probability in ((0, 0.4), (1, 0.15), (2, 0.15)):
        count, mm = sample.hu.shape[axis], sample.spacing_mm[axis]
        least = int(np.ceil(_SMALLEST_MM / mm))
        if rng.random() < probability and count > least:
            keep = int(rng.integers(least, count + 1))
            first = int(rng.integers(0, count - keep + 1))
            box[axis] = slice(first, first + keep)
    start = tuple(at + part.start * mm for at, part, mm in zip(sample.start_mm, box, sample.spacing_mm, strict=True))
    d, h, w = box
    return Sample(sample.hu[d, h, w], sample.labels[d, h, w], sample.spacing_mm, (start[0], start[1], start[2]))


def _contrast(rng: np.random.Generator, hu: FloatVolume) -> None:
    """Change the contrast medium: HU of soft tissue above muscle are stretched or shrunk, bone follows."""
    factor = np.float32(rng.uniform(0.3, 2.0))
    above = np.clip(hu - 60, 0, 300)
    hu += (factor - 1) * above * (hu < 700)


def _kernel(rng: np.random.Generator, hu: FloatVolume) -> FloatVolume:
    """Apply a kernel: a softer one blurs, a sharper one overshoots at edges."""
    if rng.random() < 0.5:
        width = float(rng.uniform(0.3, 0.9))
        soft: FloatVolume = ndimage.gaussian_filter(hu, (0.3 * width, width, width))
        return soft
    blurred = ndimage.gaussian_filter(hu, (0.0, 0.9, 0.9))
    sharp: FloatVolume = hu + np.float32(rng.uniform(0.2, 0.9)) * (hu - blurred)
    return sharp


def _noise(rng: np.random.Generator, hu: FloatVolume) -> None:
    """Add correlated noise of a lower dose, less in air."""
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(white, (0.3, *(float(rng.uniform(0.4, 0.9)),) * 2))
    grain *= np.float32(rng.uniform(5, 45)) / max(float(grain.std()), 1e-6)
    hu += grain * np.where(hu < -950, np.float32(0.4), np.float32(1.0))


def _scan_circle(rng: np.random.Generator, hu: FloatVolume) -> None:
    """A constant outside the reconstruction circle."""
    _, height, width = hu.shape
    y = np.arange(height)[:, None] - (height - 1) / 2 + rng.normal(0, 4)
    x = np.arange(width)[None, :] - (width - 1) / 2 + rng.normal(0, 4)
    radius = rng.uniform(0.92, 1.08) * max(height, width) / 2
    hu[:, y**2 + x**2 > radius**2] = np.float32(rng.choice(_PADDING_HU))


def _thick(sample: Sample, thickness_mm: float) -> Sample:
    """Slices of another thickness: means over it, with edge slices shared, and the label of its middle."""
    mm = sample.spacing_mm[0]
    count = int(len(sample.hu) * mm / thickness_mm)
    summed = np.cumsum(np.concatenate([np.zeros_like(sample.hu[:1]), sample.hu]), axis=0, dtype=np.float64)
    edges = np.arange(count + 1) * thickness_mm / mm
    low = np.minimum(edges.astype(int), len(sample.hu) - 1)
    share = (edges - low)[:, None, None]
    at_edges = summed[low] * (1 - share) + summed[low + 1] * share
    hu = (np.diff(at_edges, axis=0) * (mm / thickness_mm)).astype(np.float32)
    middle = np.minimum(((np.arange(count) + 0.5) * thickness_mm / mm).astype(int), len(sample.hu) - 1)
    z, y, x = sample.start_mm
    return Sample(
        hu, sample.labels[middle], (thickness_mm, *sample.spacing_mm[1:]), (z + (thickness_mm - mm) / 2, y, x)
    )
