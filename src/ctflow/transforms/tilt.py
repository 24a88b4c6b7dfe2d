"""Remove a gantry tilt: a sheared grid to an orthogonal one, and back."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.volume import LEAST_SHARE, PADDING_HU, Geometry, Volume
from ctflow.transforms.resample import linear_weights, slabs_of
from ctflow.transforms.state import LARGEST_VOXELS, Untilted


def untilted_grid(geometry: Geometry) -> Untilted | None:
    """The smallest orthogonal grid that holds every slice of a tilted one; None if nothing is tilted.

    Args:
        geometry: Slices stacked at an angle to their normal (gantry tilt: a sheared affine).

    Raises:
        UnsupportedPixels: The grid would be absurdly large.
    """
    if not geometry.is_tilted:
        return None
    affine, (depth, height, width) = geometry.affine_mm.copy(), geometry.shape
    (down, across), *_ = np.linalg.lstsq(affine[:3, 1:3], affine[:3, 0], rcond=None)
    rows, columns = np.arange(depth) * down, np.arange(depth) * across
    first_row, first_column = math.floor(rows.min()), math.floor(columns.min())
    affine[:3, 0] -= affine[:3, 1:3] @ [down, across]
    affine[:3, 3] += affine[:3, 1:3] @ [first_row, first_column]
    rows, columns = rows - first_row, columns - first_column
    shape = (depth, height + math.ceil(rows.max()), width + math.ceil(columns.max()))
    if math.prod(shape) > LARGEST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise UnsupportedPixels(
            f"without its tilt the volume has {sizes} voxels: its PixelSpacing is implausible",
            reason="implausible-spacing",
        )
    return Untilted(Geometry(shape, affine), rows, columns)


def untilted_volume(volume: Volume) -> tuple[Volume, npt.NDArray[np.bool_]] | None:
    """A tilted volume on the smallest orthogonal grid that holds all its slices; None if nothing is tilted.

    Args:
        volume: CT in HU on a sheared grid.

    Returns:
        The volume without its tilt as in `prepare_volume`, float32, and (D, H, W) bool: the voxels that no slice
        reaches. They repeat the slice's border. A voxel that padding contributed to is padding.
    """
    untilted = untilted_grid(volume.geometry)
    if untilted is None:
        return None
    array = remove_tilt(torch.from_numpy(volume.array), untilted).numpy()
    depth, height, width = volume.array.shape
    outside = np.ones(array.shape, bool)
    for d in range(depth):
        outside[d, _reached(untilted.rows[d], height), _reached(untilted.columns[d], width)] = False
    padding = None
    if volume.padding is not None:
        padding = remove_tilt(torch.from_numpy(volume.padding.astype(np.float32)), untilted).numpy() > LEAST_SHARE
        array[padding] = PADDING_HU
    return Volume(array, untilted.geometry, padding), outside


def _reached(start: float, size: int) -> slice:
    """The voxels whose centres lie on one of `size` pixels, the first of them centred at `start` >= 0."""
    return slice(math.ceil(start - 0.5), math.floor(start + size - 0.5) + 1)


def remove_tilt(source: Tensor, untilted: Untilted) -> Tensor:
    """The slices on the orthogonal grid, float32; outside a slice its border repeats, as in MONAI's resampling."""
    _, height, width = untilted.geometry.shape
    result = torch.empty(untilted.geometry.shape, device=source.device)
    for d, image in enumerate(source):
        rows = linear_weights(np.arange(height) - untilted.rows[d], image.shape[0])
        columns = linear_weights(np.arange(width) - untilted.columns[d], image.shape[1])
        result[d] = next(slabs_of(image.to(torch.float32)[None, None], [np.eye(1), rows, columns]))[1][0, 0]
    return result


def restore_tilt(slab: Tensor, rows: slice, untilted: Untilted, size: tuple[int, int]) -> Tensor:
    """(C, slices, H', W') of the orthogonal grid -> (C, slices, H, W) of the tilted source."""
    result = torch.empty((*slab.shape[:2], *size), device=slab.device)
    for index, d in enumerate(range(rows.start, rows.stop)):
        weights = [
            linear_weights(np.arange(count) + start, wide)
            for count, start, wide in zip(size, (untilted.rows[d], untilted.columns[d]), slab.shape[2:], strict=True)
        ]
        result[:, index : index + 1] = next(slabs_of(slab[:, index : index + 1], [np.eye(1), *weights]))[1]
    return result
