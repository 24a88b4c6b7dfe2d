"""Find the lungs of a CT and their vessels, where tumours may be placed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctflow.phantom.grid import FloatVolume, Grid
from ctflow.phantom.paint import Tubes

Spacing = tuple[float, float, float]


def lung_distance(hu: FloatVolume, spacing_mm: Spacing) -> FloatVolume:
    """Signed distance to the lungs of a CT, in mm, negative inside; vessels count as lung."""
    air = ndimage.binary_opening(hu < -450, iterations=1)
    parts, _ = ndimage.label(air)
    # Air outside the body reaches a side of the image; lungs may reach the first and last slice.
    faces = np.concatenate([parts[:, 0].ravel(), parts[:, -1].ravel(), parts[:, :, 0].ravel(), parts[:, :, -1].ravel()])
    sizes = np.bincount(parts.ravel())
    sizes[np.unique(faces)] = 0
    sizes[0] = 0
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    # Bowel gas is less dense than lung.
    means = ndimage.mean(hu, parts, np.arange(len(sizes)))
    lungs = np.isin(parts, np.flatnonzero((sizes * voxel_ml > 60) & (np.nan_to_num(means) > -965)))
    lungs &= ~wide_airways(hu, lungs, spacing_mm)
    closing = ndimage.distance_transform_edt(~np.pad(lungs, 8), sampling=spacing_mm) < 8.0
    lungs = (ndimage.distance_transform_edt(closing, sampling=spacing_mm) > 8.0)[8:-8, 8:-8, 8:-8] | lungs
    if not lungs.any():
        return np.full(hu.shape, 1e3, np.float32)
    outside = ndimage.distance_transform_edt(~lungs, sampling=spacing_mm)
    distance: FloatVolume = (outside - ndimage.distance_transform_edt(lungs, sampling=spacing_mm)).astype(np.float32)
    return distance


def wide_airways(hu: FloatVolume, lungs: npt.NDArray[np.bool_], spacing_mm: Spacing) -> npt.NDArray[np.bool_]:
    """Trachea and main bronchi, (D, H, W) bool: nothing is placed there. Empty if emphysema looks the same."""
    air = ndimage.gaussian_filter(hu, [1.5 / mm for mm in spacing_mm]) < -945
    rounds = max(1, round(4.0 / spacing_mm[1]))
    airways = ndimage.binary_dilation(ndimage.binary_opening(air, iterations=rounds), iterations=rounds)
    few = (airways & lungs).sum() < 0.1 * lungs.sum()
    return airways if few else np.zeros_like(airways)


def coarse_lung_distance(hu: FloatVolume, spacing_mm: Spacing) -> FloatVolume:
    """`lung_distance` from voxels about 3 mm apart: eight times as fast, accurate to 3 mm."""
    steps = [max(1, round(3.0 / mm)) for mm in spacing_mm]
    few = hu[:: steps[0], :: steps[1], :: steps[2]]
    spacing = (spacing_mm[0] * steps[0], spacing_mm[1] * steps[1], spacing_mm[2] * steps[2])
    distance = lung_distance(few, spacing)
    for axis, step in enumerate(steps):
        distance = np.repeat(distance, step, axis=axis)
    d, h, w = hu.shape
    return distance[:d, :h, :w]


def vessels_of(hu: FloatVolume, lung: FloatVolume, grid: Grid, rng: np.random.Generator) -> Tubes:
    """Points on the vessels of real lungs, to place tumours on."""
    points = np.argwhere((hu > -150) & (lung < -6))
    if not len(points):
        return Tubes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 2)))
    points = points[rng.integers(0, len(points), 400)]
    at = np.stack([line[index] for line, index in zip(grid.lines_mm, points.T, strict=True)], axis=1).astype(np.float64)
    return Tubes(at, at, np.full((len(at), 2), 1.5))
