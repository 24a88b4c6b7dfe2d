"""State passed between transforms: an image with its affine, and the mapping back to the source grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ctflow.core.volume import FloatArray, Geometry

IndexArray = npt.NDArray[np.int64]
OUTSIDE = -1  # no voxel

SAME_SPACING_MM = 1e-3  # MONAI's AFFINE_TOL: an axis this close to the wanted spacing keeps its own
LARGEST_VOXELS = 2**31  # of the network's grid: 8 GB as float32


@dataclass(frozen=True, eq=False)
class Prepared:
    """The network's input and the inverse mapping.

    Attributes:
        tensor: (1, 1, X, Y, Z) float32 on the device, in the network's axes.
        source_axes: For each axis of the tensor, the axis of the source array (D, H, W) = (0, 1, 2).
        back: For each axis of the tensor, (source voxels, network voxels) float64 weights.
        picks: For each axis of the tensor, (source voxels,) the network voxel whose label a source voxel gets, or
            `OUTSIDE`.
        spacing_mm: Distance of the tensor's voxel centres along each of its axes.
        untilted: The grid of a tilted source without its tilt; the source voxels above are this grid's. None if the
            source's axes are orthogonal.
    """

    tensor: Tensor
    source_axes: tuple[int, int, int]
    back: tuple[FloatArray, FloatArray, FloatArray]
    spacing_mm: tuple[float, float, float]
    untilted: Untilted | None = None
    picks: tuple[IndexArray, IndexArray, IndexArray] | None = None


@dataclass(frozen=True, eq=False)
class GridState:
    """An image between two steps."""

    image: Tensor  # (X, Y, Z), int16 until the first step that needs floats
    affine: FloatArray  # index (x, y, z) -> RAS mm
    axes: tuple[int, int, int]  # source axis of each image axis
    back: tuple[FloatArray, FloatArray, FloatArray]  # (source voxels, image voxels) of each axis
    picks: tuple[IndexArray, IndexArray, IndexArray]  # (source voxels,) the nearest image voxel of each axis


@dataclass(frozen=True, eq=False)
class AxisReturn:
    """The way back over one step along one axis.

    Attributes:
        weights: (voxels before, voxels after) float64.
        picks: (voxels before,) the voxel after the step whose label each takes, or `OUTSIDE`.
    """

    weights: FloatArray
    picks: IndexArray


def returned(state: GridState, steps: Sequence[AxisReturn], image: Tensor, affine: FloatArray) -> GridState:
    """The state after a step that keeps the order of the axes."""
    back = [earlier @ step.weights for earlier, step in zip(state.back, steps, strict=True)]
    picks = [composed(earlier, step.picks) for earlier, step in zip(state.picks, steps, strict=True)]
    return GridState(image, affine, state.axes, (back[0], back[1], back[2]), (picks[0], picks[1], picks[2]))


def composed(earlier: IndexArray, later: IndexArray) -> IndexArray:
    """Which voxel after two steps each source voxel takes."""
    return np.where(earlier >= 0, later[np.maximum(earlier, 0)], OUTSIDE)


def shifted(before: int, after: int, start: int) -> AxisReturn:
    """The way back where the image was cropped or padded: its voxel 0 was voxel `start` before."""
    picks = np.arange(before) - start
    return AxisReturn(np.eye(before, after, -start), np.where((picks >= 0) & (picks < after), picks, OUTSIDE))


@dataclass(frozen=True, eq=False)
class Untilted:
    """An orthogonal grid around a tilted one, with the same slices: each is displaced within its own plane.

    Attributes:
        geometry: The orthogonal grid.
        rows: (D,) how many rows each tilted slice begins below the grid's first row.
        columns: The same for columns.
    """

    geometry: Geometry
    rows: FloatArray
    columns: FloatArray
