"""State passed between transforms: an image with its affine, and the mapping back to the source grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctflow.core.volume import FloatArray, Geometry

SAME_SPACING_MM = 1e-3  # MONAI's AFFINE_TOL: an axis this close to the wanted spacing keeps its own
LARGEST_VOXELS = 2**31  # of the network's grid: 8 GB as float32


@dataclass(frozen=True, eq=False)
class Prepared:
    """The network's input and the inverse mapping.

    Attributes:
        tensor: (1, 1, X, Y, Z) float32 on the device, in the network's axes.
        source_axes: For each axis of the tensor, the axis of the source array (D, H, W) = (0, 1, 2).
        back: For each axis of the tensor, (source voxels, network voxels) float64 weights.
        spacing_mm: Distance of the tensor's voxel centres along each of its axes.
        untilted: The grid of a tilted source without its tilt; the source voxels above are this grid's. None if the
            source's axes are orthogonal.
    """

    tensor: Tensor
    source_axes: tuple[int, int, int]
    back: tuple[FloatArray, FloatArray, FloatArray]
    spacing_mm: tuple[float, float, float]
    untilted: Untilted | None = None


@dataclass(frozen=True, eq=False)
class GridState:
    """An image between two steps."""

    image: Tensor  # (X, Y, Z), int16 until the first step that needs floats
    affine: FloatArray  # index (x, y, z) -> RAS mm
    axes: tuple[int, int, int]  # source axis of each image axis
    back: tuple[FloatArray, FloatArray, FloatArray]  # (source voxels, image voxels) of each axis


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
