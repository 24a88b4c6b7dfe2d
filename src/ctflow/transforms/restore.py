"""The network's grid back to the source's, slab by slab."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ctflow.core.volume import FloatArray, Size3
from ctflow.transforms.resample import Slabs
from ctflow.transforms.state import Prepared
from ctflow.transforms.tilt import restore_tilt


def restore_slabs(prepared: Prepared, probabilities: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Bring probabilities back to the source grid, a few source slices at a time.

    Args:
        prepared: From `prepare_volume`.
        probabilities: (C, X, Y, Z) float32 on the network's grid.

    Yields:
        The source slices d and their (C, slices, H, W) float32 probabilities, as `SourceSlabs.slab` gives them.
    """
    slabs = SourceSlabs(prepared, len(probabilities), probabilities.device)
    for rows, used in slabs.rows:
        yield rows, slabs.slab(probabilities.narrow(1 + slabs.axis, used.start, used.stop - used.start), rows)


class SourceSlabs:
    """The way back to the source grid, a few source slices at a time, each from the network's voxels that it needs.

    Args:
        prepared: From `prepare_volume`.
        channels: Of the probabilities.
        device: Theirs.

    Attributes:
        axis: The network's axis along which the source's slices lie.
        rows: The source slices d of each slab, and the voxels along that axis that they are made from.
    """

    def __init__(self, prepared: Prepared, channels: int, device: torch.device) -> None:
        self._order = [prepared.source_axes.index(axis) for axis in range(3)]
        self._slabs = Slabs([prepared.back[axis] for axis in self._order], channels, device)
        self._untilted = prepared.untilted
        self.axis, self.rows = self._order[0], self._slabs.rows

    def slab(self, part: Tensor, rows: slice) -> Tensor:
        """Bring a slab back.

        Args:
            part: (C, X, Y, Z) float32 on the network's grid; along `axis` only the voxels that the slab needs.
            rows: The slab's source slices.

        Returns:
            (C, slices, H, W) float32: linear between the network's voxels, the border value beyond them, 0 where a
            crop removed the volume. It may share the memory of `part`.

        Source: MONAI 1.6.1 `Invertd(nearest_interp=False)`.
        """
        slab = self._slabs.slab(part.permute(0, *(1 + axis for axis in self._order)), rows)
        untilted = self._untilted
        if untilted is None:
            return slab
        _, height, width = untilted.geometry.shape
        size = height - math.ceil(untilted.rows.max()), width - math.ceil(untilted.columns.max())
        return restore_tilt(slab, rows, untilted, size)


def restore_labels(prepared: Prepared, labels: Tensor) -> Tensor:
    """Bring labels back to the source grid: each source voxel gets the nearest network voxel's, or 0 outside a crop.

    Args:
        prepared: From `prepare_volume`.
        labels: (X, Y, Z) uint8 on the network's grid.

    Returns:
        (D, H, W) uint8 on the same device.

    Source: MONAI 1.6.1 `Invertd(nearest_interp=True)`; a tilt, which MONAI does not remove, shifts by whole pixels.
    """
    if prepared.picks is None:
        raise ValueError("the volume was prepared without the way back for labels")
    order = [prepared.source_axes.index(axis) for axis in range(3)]
    found = labels.permute(order)
    for axis, picks in enumerate(prepared.picks[index] for index in order):
        voxels = torch.from_numpy(np.maximum(picks, 0)).to(labels.device)
        found = found.index_select(axis, voxels)
        if (picks < 0).any():
            shape = [-1 if each == axis else 1 for each in range(3)]
            found = found * torch.from_numpy(picks >= 0).to(labels.device).view(shape)
    untilted = prepared.untilted
    if untilted is None:
        return found
    height = untilted.geometry.shape[1] - math.ceil(untilted.rows.max())
    width = untilted.geometry.shape[2] - math.ceil(untilted.columns.max())
    shifts = zip(np.rint(untilted.rows).astype(int), np.rint(untilted.columns).astype(int), strict=True)
    return torch.stack(
        [found[d, row : row + height, column : column + width] for d, (row, column) in enumerate(shifts)]
    )


def source_boxes(prepared: Prepared, size: Size3) -> Callable[[Size3], tuple[slice, slice, slice]]:
    """Find the source voxels to which a box of the network's grid contributes.

    Args:
        prepared: From `prepare_volume`.
        size: Voxels of the boxes.

    Returns:
        A function from a box's first voxel (it, or the whole box, may lie outside the grid) to slices of the source
        array (D, H, W) that hold all of them, and for a tilted source some more.
    """

    @cache
    def along(axis: int, start: int) -> slice:
        weights = prepared.back[axis][:, max(start, 0) : max(start + size[axis], 0)]
        used = np.flatnonzero(weights.any(axis=1))
        return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)

    def box(start: Size3) -> tuple[slice, slice, slice]:
        d, h, w = (along(axis, start[axis]) for axis in (prepared.source_axes.index(source) for source in range(3)))
        untilted = prepared.untilted
        if untilted is None or d.start == d.stop:
            return d, h, w
        return d, _before_tilt_was_removed(h, untilted.rows[d]), _before_tilt_was_removed(w, untilted.columns[d])

    return box


def _before_tilt_was_removed(voxels: slice, starts: FloatArray) -> slice:
    """The rows (columns) of tilted slices that contributed to untilted ones; `starts` has each slice's start."""
    first, last = voxels.start - math.ceil(starts.max()), voxels.stop - math.floor(starts.min())
    return slice(max(first, 0), max(last, 0))
