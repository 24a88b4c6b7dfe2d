"""The grid of a phantom: coordinates in mm, and smooth fields, computed coarsely and interpolated finely."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ctflow.core.volume import Box, Geometry, Size3

FloatVolume = npt.NDArray[np.floating[Any]]  # float32 wherever it is large
Axes = tuple[FloatVolume, FloatVolume, FloatVolume]  # z, y, x in mm, shaped to broadcast over (D, H, W)

# A signed distance is nearly linear between points 3 mm apart, so edges are exact to a fraction of a voxel.
COARSE_MM = 3.0
WHOLE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Grid:
    """An axial grid: z to superior, y to posterior, x to the patient's left, 0 in the middle of the chest.

    Attributes:
        shape: Voxels along (D, H, W).
        spacing_mm: Their distances.
        centre_mm: Middle of the grid (z, y, x).
    """

    shape: Size3
    spacing_mm: tuple[float, float, float]
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @cached_property
    def lines_mm(self) -> tuple[FloatVolume, FloatVolume, FloatVolume]:
        """Coordinates along z, y and x, each one-dimensional."""
        z, y, x = (
            ((np.arange(n) - (n - 1) / 2) * mm + middle).astype(np.float32)
            for n, mm, middle in zip(self.shape, self.spacing_mm, self.centre_mm, strict=True)
        )
        return z, y, x

    @property
    def axes(self) -> Axes:
        """Coordinates, shaped to broadcast over (D, H, W)."""
        return self.axes_in(WHOLE)

    def axes_in(self, box: Box) -> Axes:
        """Coordinates inside a box."""
        z, y, x = self.lines_mm
        return z[box[0], None, None], y[None, box[1], None], x[None, None, box[2]]

    @property
    def geometry(self) -> Geometry:
        """The same grid as an affine to LPS mm: head first, supine."""
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2] = self.spacing_mm
        affine[:3, 3] = [float(line[0]) for line in reversed(self.lines_mm)]
        affine[3, 3] = 1.0
        return Geometry(self.shape, affine)

    def coarse(self, spacing_mm: float = COARSE_MM) -> Grid:
        """A grid over the same space with points at most about `spacing_mm` apart, a little larger on every side."""
        lengths = [(n - 1) * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True)]
        d, h, w = (int(np.ceil(length / spacing_mm)) + 3 for length in lengths)
        return Grid((d, h, w), (spacing_mm, spacing_mm, spacing_mm), self.centre_mm)

    def box_around(self, low_mm: npt.ArrayLike, high_mm: npt.ArrayLike) -> Box | None:
        """The voxels between two corners (z, y, x); None if there are none."""
        slices = []
        for line, low, high in zip(self.lines_mm, np.asarray(low_mm), np.asarray(high_mm), strict=True):
            step = float(line[1] - line[0])
            first = max(0, int(np.ceil((low - line[0]) / step)))
            last = min(len(line), int(np.floor((high - line[0]) / step)) + 1)
            if first >= last:
                return None
            slices.append(slice(first, last))
        return slices[0], slices[1], slices[2]


def interpolation_matrix(target_mm: FloatVolume, source_mm: FloatVolume) -> tuple[slice, FloatVolume]:
    """Linear interpolation along one axis as a matrix.

    Args:
        target_mm: (n,) coordinates to interpolate at.
        source_mm: (m,) evenly spaced coordinates of known values.

    Returns:
        The source points involved, and the (n, k) matrix over them.
    """
    place = (target_mm - source_mm[0]) / (source_mm[1] - source_mm[0])
    left = np.clip(np.floor(place).astype(int), 0, len(source_mm) - 2)
    first, last = int(left.min()), int(left.max()) + 2
    matrix = np.zeros((len(target_mm), last - first), np.float32)
    rows = np.arange(len(target_mm))
    right_weight = np.clip(place - left, 0.0, 1.0).astype(np.float32)
    matrix[rows, left - first] = 1.0 - right_weight
    matrix[rows, left - first + 1] += right_weight
    return slice(first, last), matrix


class Field:
    """A smooth field on a coarse grid, read in any box of a finer one by linear interpolation.

    Args:
        values: (d, h, w) on `coarse`.
        coarse: Its grid.
        fine: The grid to read it on.

    Attributes:
        coarse_values: The field on its own grid, float32.
        coarse_grid: Its own grid.
    """

    def __init__(self, values: FloatVolume, coarse: Grid, fine: Grid) -> None:
        self.coarse_values: FloatVolume = values.astype(np.float32, copy=False)
        self.coarse_grid, self._fine = coarse, fine

    def in_box(self, box: Box) -> FloatVolume:
        """Values in a box of the fine grid.

        It uses three small matrix products, many times faster than a general resampler.
        """
        (rows, a), (columns, b), (planes, c) = (
            interpolation_matrix(fine[part], coarse)
            for fine, part, coarse in zip(self._fine.lines_mm, box, self.coarse_grid.lines_mm, strict=True)
        )
        part = self.coarse_values[rows, columns, planes]
        plane: FloatVolume = np.matmul(b, np.matmul(part, c.T))
        values: FloatVolume = np.tensordot(a, plane, axes=(1, 0))
        return values

    def at(self, points_mm: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Values at (n, 3) points (z, y, x), by the nearest coarse point."""
        index = [
            np.clip(np.rint((points_mm[:, axis] - line[0]) / (line[1] - line[0])).astype(int), 0, len(line) - 1)
            for axis, line in enumerate(self.coarse_grid.lines_mm)
        ]
        values: npt.NDArray[np.float64] = self.coarse_values[index[0], index[1], index[2]].astype(np.float64)
        return values

    def box_of(self, below: float) -> Box | None:
        """The box of the fine grid outside which no value is below this; None if no value is."""
        low = self.coarse_values < below
        if not low.any():
            return None
        ends = []
        for axis, line in enumerate(self.coarse_grid.lines_mm):
            seen = np.flatnonzero(low.any(axis=tuple(other for other in range(3) if other != axis)))
            ends.append((line[max(0, seen[0] - 1)], line[min(len(line) - 1, seen[-1] + 1)]))
        low_mm, high_mm = zip(*ends, strict=True)
        return self._fine.box_around(low_mm, high_mm)
