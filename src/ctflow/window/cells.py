"""A part of a volume as a mask on a device, in cells of several voxels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class CellMask:
    """Some of a volume's voxels.

    Attributes:
        cells: (d, h, w) bool on the device.
        cell_of_voxel: The cell of every voxel along each axis, on the device.
    """

    cells: Tensor
    cell_of_voxel: tuple[Tensor, Tensor, Tensor]

    def mask_of_slices(self, rows: slice) -> Tensor:
        """(slices, H, W) bool for some slices, on the device."""
        d, h, w = self.cell_of_voxel
        return self.cells[d[rows]][:, h][:, :, w]
