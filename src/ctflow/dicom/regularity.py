"""How far slices, by their own headers, lie from their common grid.

Scanners and archives round: positions to 0.1 mm, cosines to four decimals, PixelSpacing in some slices. A series is
one volume if this shifts no voxel by more than a tenth of its size along any of its axes. Within a slice a shift is
linear in row and column, so it is largest in a corner: the bound is checked there, for every slice, against that
slice's own header. No border of a tumour is known to a tenth of a voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctflow.core.volume import FloatArray, Geometry, Size3

LARGEST_SHIFT = 0.1  # of a voxel, along each axis
_ROUNDING = 1e-9  # of float64


@dataclass(frozen=True, eq=False)
class Planes:
    """Slice positions and directions from headers, one row per slice.

    Attributes:
        positions: (n, 3) LPS mm of the first pixel's centre (ImagePositionPatient).
        rows: (n, 3) unit vectors along rows, to larger column indices.
        columns: (n, 3) unit vectors along columns, to larger row indices.
        pixels_mm: (n, 2) between rows, and between columns (PixelSpacing).
    """

    positions: FloatArray
    rows: FloatArray
    columns: FloatArray
    pixels_mm: FloatArray

    def ordered(self, order: Sequence[int]) -> Planes:
        """The same slices in another order."""
        keep = list(order)
        return Planes(self.positions[keep], self.rows[keep], self.columns[keep], self.pixels_mm[keep])

    @property
    def common(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Row and column direction (unit vectors) and pixel spacing: medians, which a few odd slices do not move."""
        row, column = np.median(self.rows, axis=0), np.median(self.columns, axis=0)
        return row / np.linalg.norm(row), column / np.linalg.norm(column), np.median(self.pixels_mm, axis=0)


@dataclass(frozen=True, eq=False)
class Shifts:
    """How far slices lie from a grid, for each cause and for all together.

    Attributes:
        causes: For each keyword (n,) the largest shift of a slice's voxels along any axis, in voxels.
        causes_mm: The same as distances.
        total: (n,) of all causes together, in voxels.
    """

    causes: dict[str, FloatArray]
    causes_mm: dict[str, FloatArray]
    total: FloatArray


def planes_from_numbers(positions: FloatArray, axes: FloatArray, pixels_mm: FloatArray) -> Planes:
    """Planes from (n, 3) positions, (n, 6) orientations, which are normalized, and (n, 2) pixel spacings."""
    rows, columns = (half / np.linalg.norm(half, axis=1, keepdims=True) for half in (axes[:, :3], axes[:, 3:]))
    return Planes(positions, rows, columns, pixels_mm)


def fitted_line(values: FloatArray, places: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The least-squares line through values at places: its value at place 0, and its step.

    Args:
        values: (n, ...) numbers.
        places: (n,) numbers, not all the same.
    """
    centre = places - places.mean()
    step = np.tensordot(centre, values - values[0], axes=1) / float(centre @ centre)
    return values[0] + (values - values[0]).mean(axis=0) - step * places.mean(), step


def unevenness(distances_mm: FloatArray, places: FloatArray) -> float:
    """The largest deviation of distances from even ones at these places, in steps."""
    origin, step = fitted_line(distances_mm, places)
    return float(np.abs(distances_mm - origin - step * places).max() / abs(float(step)))


def is_within(shift: float) -> bool:
    """Whether the grid may ignore a shift, in voxels."""
    return shift <= LARGEST_SHIFT + _ROUNDING


def fitted_grid(planes: Planes, places: FloatArray, shape: Size3) -> Geometry:
    """The grid along the line fitted through all slices; perpendicular to them if that shifts none too far.

    Args:
        planes: The slices.
        places: (n,) their d, which may be a fraction.
        shape: (D, H, W) of the grid.
    """
    row, column, pixel_mm = planes.common
    affine = np.eye(4)
    affine[:3, 3], affine[:3, 0] = fitted_line(planes.positions, places)
    affine[:3, 1], affine[:3, 2] = column * pixel_mm[0], row * pixel_mm[1]
    geometry = Geometry(shape, affine)
    if not geometry.is_tilted:
        return geometry
    normal = np.cross(row, column)
    level = affine.copy()
    level[:3, 0] = normal * (affine[:3, 0] @ normal)
    level[:3, 3] = (planes.positions - places[:, None] * level[:3, 0]).mean(axis=0)
    shifts = shifts_from_grid(planes, level, places, shape[1:])  # jitter of few slices looks like a tilt
    return Geometry(shape, level) if is_within(float(shifts.total.max())) else geometry


def distance_along_normal(geometry: Geometry) -> float:
    """From slice to slice along their normal, in mm."""
    normal = np.cross(geometry.directions[:, 2], geometry.directions[:, 1])
    return abs(float(geometry.affine_mm[:3, 0] @ normal)) / float(np.linalg.norm(normal))


def shifts_from_grid(planes: Planes, affine_mm: FloatArray, places: FloatArray, size: tuple[int, int]) -> Shifts:
    """Compare each slice's own header with a grid.

    Args:
        planes: The slices.
        affine_mm: (4, 4) of the grid: index (d, h, w) to LPS mm.
        places: (n,) the slices' d, which may be a fraction.
        size: Rows and columns.

    Source: DICOM PS3.3 C.7.6.2.1.1.
    """
    to_index = np.linalg.inv(affine_mm[:3, :3])
    corners = np.array([(h, w) for h in (0, size[0] - 1) for w in (0, size[1] - 1)], dtype=np.float64)
    spacing_mm = np.linalg.norm(affine_mm[:3, 1:3], axis=0)
    directions = (affine_mm[:3, 1:3] / spacing_mm).T
    own = np.stack([planes.columns, planes.rows], axis=1)  # (n, 2, 3), as h and w

    def on_corners(steps: FloatArray) -> FloatArray:
        moved: FloatArray = np.einsum("ch,nhx->ncx", corners, steps)
        return moved

    at = planes.positions - (places[:, None] * affine_mm[:3, 0] + affine_mm[:3, 3])
    parts = {
        "ImageOrientationPatient": on_corners((own - directions) * spacing_mm[:, None]),
        "PixelSpacing": on_corners(directions * (planes.pixels_mm - spacing_mm)[:, :, None]),
        "ImagePositionPatient": np.repeat(at[:, None], len(corners), axis=1),
    }
    total = at[:, None] + on_corners(own * planes.pixels_mm[:, :, None] - directions * spacing_mm[:, None])
    return Shifts(
        {keyword: np.abs(part @ to_index.T).max(axis=(1, 2)) for keyword, part in parts.items()},
        {keyword: np.linalg.norm(part, axis=2).max(axis=1) for keyword, part in parts.items()},
        np.abs(total @ to_index.T).max(axis=(1, 2)),
    )
