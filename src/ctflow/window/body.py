"""A body in a volume, in cells of a few millimetres, without torch: a process that writes results needs no more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ctflow.core.volume import Box, Size3

Cells = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Body:
    """The voxels of a volume that are the body, including lungs.

    Attributes:
        cells: (d, h, w) bool, on the host; cell (i, j, k) starts at voxel (i, j, k) * `cell_size`.
        cell_size: Voxels of a cell; the last ones of an axis may have fewer.
        shape: Voxels of the volume (D, H, W).
    """

    cells: Cells
    cell_size: Size3
    shape: Size3

    def touches(self, box: Box) -> bool:
        """Whether the box contains a voxel of the body."""
        inside = tuple(
            slice(part.start // size, -(-part.stop // size)) for part, size in zip(box, self.cell_size, strict=True)
        )
        return bool(self.cells[inside].any())

    def count_in_runs(
        self, lines: npt.NDArray[np.int64], first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Count the body's voxels in runs.

        Args:
            lines: (n, 2) d and h of each run.
            first: (n,) w of its first voxel.
            last: (n,) w of its last.

        Returns:
            (n,) voxels.
        """
        d, h = lines[:, 0] // self.cell_size[0], lines[:, 1] // self.cell_size[1]
        before = self._voxels_before
        counts: npt.NDArray[np.int64] = before[d, h, last + 1] - before[d, h, first]
        return counts

    @cached_property
    def _voxels_before(self) -> npt.NDArray[np.int64]:
        """(d, h, W + 1): cumulative count of the body's voxels along each line of cells."""
        voxels = np.repeat(self.cells, self.cell_size[2], axis=2)[:, :, : self.shape[2]]
        before = np.zeros((*voxels.shape[:2], self.shape[2] + 1), np.int64)
        np.cumsum(voxels, axis=2, out=before[:, :, 1:])
        return before
