"""Linear interpolation of each axis by itself, slab by slab."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctflow.core.volume import FloatArray, Size3
from ctflow.transforms.upload import uploaded

_SLAB = 8  # slices handled at once; keeps 14 classes of 512 x 512 below 120 MB
_GPU_SLAB_BYTES = 2**28  # a GPU is quicker with more slices; each step of a slab takes at most this much


def linear_weights(positions: npt.ArrayLike, size: int) -> FloatArray:
    """Weights of linear interpolation along an axis.

    Args:
        positions: (n,) positions in voxels; those outside take the border's value.
        size: Voxels of the axis.

    Returns:
        (n, size) float64; each row sums to 1.
    """
    inside = np.clip(np.asarray(positions, dtype=np.float64), 0, size - 1)
    lower = np.minimum(np.floor(inside).astype(np.int64), max(size - 2, 0))
    fraction = inside - lower
    weights = np.zeros((len(inside), size))
    rows = np.arange(len(inside))
    weights[rows, lower] = 1 - fraction
    weights[rows, np.minimum(lower + 1, size - 1)] += fraction
    return weights


def interpolated(image: Tensor, weights: Sequence[FloatArray]) -> Tensor:
    """(X, Y, Z) -> float32 of the weights' rows; walks along the axis that lies outermost in memory."""
    outer = int(np.argmax(image.stride()))
    rest = [axis for axis in range(3) if axis != outer]
    order = [outer, *rest]
    result = torch.empty([len(weights[axis]) for axis in order], device=image.device)
    for rows, slab in slabs_of(image.permute(order)[None], [weights[axis] for axis in order]):
        result[rows] = slab[0]
    inverse = [order.index(axis) for axis in range(3)]
    return result.permute(inverse)


class _Axis:
    """The weights of one axis, on the device; where each row is one voxel as it is, no product is made.

    Args:
        weights: (rows, columns), on the host: which columns are used is known without asking the device.
        device: Where they are applied.
    """

    def __init__(self, weights: FloatArray, device: torch.device) -> None:
        self._host = weights
        self._weights: Tensor | None = None
        self._voxels: Tensor | None = None
        voxels = weights.argmax(axis=1)
        taken = weights[np.arange(len(weights)), voxels]
        if not ((taken == 1) & (np.count_nonzero(weights, axis=1) == 1)).all():
            self._weights = uploaded(np.ascontiguousarray(weights, dtype=np.float32), device)
        elif not np.array_equal(voxels, np.arange(weights.shape[1])):
            self._voxels = uploaded(voxels, device)  # turned round, or cut out

    def __len__(self) -> int:
        return len(self._host)

    def some(self, image: Tensor, rows: slice) -> Tensor:
        """(C, X, Y, Z) -> (C, rows, Y, Z) float32."""
        if self._weights is not None:
            used = np.flatnonzero(self._host[rows].any(axis=0))
            low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            part = image[:, low:high].to(torch.float32)
            return torch.einsum("rx,cxyz->cryz", self._weights[rows, low:high], part)
        part = image[:, rows] if self._voxels is None else image.index_select(1, self._voxels[rows])
        return part.to(torch.float32)

    def across(self, part: Tensor) -> Tensor:
        """(C, X, Y, Z) -> (C, X, rows, Z) float32."""
        if self._weights is not None:
            return torch.matmul(self._weights, part)
        return part if self._voxels is None else part.index_select(2, self._voxels)

    def along(self, part: Tensor) -> Tensor:
        """(C, X, Y, Z) -> (C, X, Y, rows) float32."""
        if self._weights is not None:
            return torch.matmul(part, self._weights.T)
        return part if self._voxels is None else part.index_select(3, self._voxels)


def slabs_of(image: Tensor, weights: Sequence[FloatArray]) -> Iterator[tuple[slice, Tensor]]:
    """Apply the weights of each axis to (C, X, Y, Z), some rows of the first axis at a time; nothing waits for a GPU.

    A slab may share the image's memory.
    """
    first, second, third = (_Axis(matrix, image.device) for matrix in weights)
    at_once = _rows_at_once(image, (len(first), len(second), len(third)))
    for start in range(0, len(first), at_once):
        rows = slice(start, min(start + at_once, len(first)))
        yield rows, third.along(second.across(first.some(image, rows)))


def _rows_at_once(image: Tensor, wanted: Size3) -> int:
    """Rows of a slab, such that no step of it takes more than `_GPU_SLAB_BYTES`."""
    if not image.is_cuda:
        return _SLAB
    channels, x, y, z = image.shape
    read = max(math.ceil(x / wanted[0]), 1) * y * z  # where rows are left out, more are read than made
    return max(_GPU_SLAB_BYTES // (4 * channels * max(read, wanted[1] * z, wanted[1] * wanted[2])), 1)
