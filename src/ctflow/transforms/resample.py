"""Another spacing, on the grid that MONAI would take."""

from __future__ import annotations

import math

import numpy as np

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.volume import FloatArray
from ctflow.transforms.interpolate import interpolated, linear_weights
from ctflow.transforms.state import LARGEST_VOXELS, SAME_SPACING_MM, GridState


def resample(state: GridState, spacing_mm: tuple[float, float, float]) -> GridState:
    """The image at another spacing."""
    affine, grid = _new_grid(state, spacing_mm)
    forward, back = [], []
    for axis, (old, new, new_size) in enumerate(grid):
        size = state.image.shape[axis]
        forward.append(linear_weights(np.arange(new_size) * (new / old), size))
        back.append(state.back[axis] @ linear_weights(np.arange(size) * (old / new), new_size))
    image = interpolated(state.image, forward)
    return GridState(image, affine, state.axes, (back[0], back[1], back[2]))


def _new_grid(
    state: GridState, spacing_mm: tuple[float, float, float]
) -> tuple[FloatArray, list[tuple[float, float, int]]]:
    """The new grid's affine, and of each axis its old spacing, its new spacing and its new size."""
    spacings = []
    for axis, wanted in enumerate(spacing_mm):
        old = float(np.linalg.norm(state.affine[:3, axis]))
        spacings.append((old, old if wanted <= 0 or abs(old - wanted) <= SAME_SPACING_MM else wanted))
    affine, shape = _zoomed(state, [new for _, new in spacings])
    if math.prod(shape) > LARGEST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise UnsupportedPixels(
            f"at the model's spacing the volume has {sizes} voxels: its PixelSpacing is implausible",
            reason="implausible-spacing",
        )
    return affine, [(old, new, size) for (old, new), size in zip(spacings, shape, strict=True)]


def _zoomed(state: GridState, spacing_mm: list[float]) -> tuple[FloatArray, list[int]]:
    """The affine and shape of a grid with another spacing and the same first voxel.

    A size is often exactly between two numbers of voxels (each second series of 5 mm slices at 2 mm). Which of them
    MONAI takes hangs on its arithmetic's last bit, so that this is MONAI's arithmetic step for step.

    Source: MONAI 1.6.1 `zoom_affine` and `compute_shape_offset`.
    """
    old = state.affine[:3, :3]
    upper = np.linalg.cholesky(old.T @ old).T
    affine = state.affine.copy()
    affine[:3, :3] = (old @ np.linalg.inv(upper)) @ np.diag(np.sign(np.diag(upper)) * spacing_mm)
    unmoved = np.eye(4)
    unmoved[:3, :3] = affine[:3, :3]
    ends = np.meshgrid(*[(0.0, size - 1.0) for size in state.image.shape], indexing="ij")
    corners = np.concatenate((np.asarray(ends).reshape(3, -1), np.ones((1, 8))))
    corners = np.linalg.solve(unmoved, state.affine) @ corners
    return affine, [int(size) for size in np.round(np.ptp(corners[:3] / corners[3], axis=1) + 1.0)]
