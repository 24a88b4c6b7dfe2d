"""Where the body is: cells of a few millimetres, found on the volume's device from its HU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ctflow.volume import Size3

Box = tuple[slice, slice, slice]
Cells = npt.NDArray[np.bool_]

BODY_HU = -500  # half way between air and water; a table's foam, blankets and clothes lie below
_SAMPLE_MM = 2.0  # of what is looked at; everything that counts is several times as thick
_CELL_MM = 4.0
_THIN_MM = 8.0  # what is thinner is cut off: a table's shell, cables, folds of cloth
_LEAST_MM = 16.0  # what is nowhere as thick as this in all directions at once is no part of a body
_MARGIN_MM = 15.0  # gives back what was cut off: skin folds, ears, fingers beside the trunk


@dataclass(frozen=True, eq=False)
class Body:
    """Which voxels of a volume are the body, lungs and a margin of air around it included.

    Attributes:
        cells: (d, h, w) bool, on the host; cell (i, j, k) are the voxels from (i, j, k) * `cell_size` on.
        cell_size: Voxels of a cell; the last ones of an axis may have fewer.
        shape: Voxels of the volume (D, H, W).
        device: Where masks are wanted.
    """

    cells: Cells
    cell_size: Size3
    shape: Size3
    device: torch.device

    def touches(self, box: Box) -> bool:
        """Whether a voxel of the box is the body's."""
        inside = tuple(
            slice(part.start // size, -(-part.stop // size)) for part, size in zip(box, self.cell_size, strict=True)
        )
        return bool(self.cells[inside].any())

    def mask_of_slices(self, rows: slice) -> Tensor:
        """(slices, H, W) bool of some slices, on the device."""
        cells, (d, h, w) = self._on_device
        return cells[d[rows]][:, h][:, :, w]

    @cached_property
    def _on_device(self) -> tuple[Tensor, list[Tensor]]:
        """The cells, and for each axis the cell of every voxel."""
        cell_of_voxel = [
            torch.arange(count, device=self.device) // size
            for count, size in zip(self.shape, self.cell_size, strict=True)
        ]
        return torch.from_numpy(self.cells).to(self.device), cell_of_voxel


def find_body(volume: Tensor, spacing_mm: tuple[float, float, float]) -> Body | None:
    """Find the body in a CT.

    A superset is wanted, not an outline: all parts that are not thin are kept, each slice is filled between its
    outermost parts (lungs, and what lies between trunk and arms), and a margin is added. A thick thing beside the body
    is kept, too, and does no harm.

    Args:
        volume: (D, H, W) in HU on any device, slices first.
        spacing_mm: Distance of the voxels' centres along each axis.

    Returns:
        The body; None where the volume holds nothing thick enough.
    """
    stride = [max(int(_SAMPLE_MM / mm), 1) for mm in spacing_mm]
    samples = [max(round(_CELL_MM / (mm * step)), 1) for mm, step in zip(spacing_mm, stride, strict=True)]
    size = [step * count for step, count in zip(stride, samples, strict=True)]
    cell_mm = [count * mm for count, mm in zip(size, spacing_mm, strict=True)]
    dense = (volume[:: stride[0], :: stride[1], :: stride[2]] > BODY_HU).to(torch.float32)
    kernel = [min(count, most) for count, most in zip(samples, dense.shape, strict=True)]
    cells = functional.avg_pool3d(dense[None], kernel, ceil_mode=True)[0] >= 0.5
    opened = _opened(cells, _in_cells(_THIN_MM, cell_mm))
    thick = _opened_at_edges(opened, _in_cells(_LEAST_MM, cell_mm))
    found, seeds = _halved(torch.stack([opened, thick])).cpu().numpy()  # the one time that a GPU is waited for
    if not seeds.any():
        return None
    filled = torch.from_numpy(_filled(_components_with(found, seeds)))
    d, h, w = (2 * count for count in size)
    around = _in_cells(_MARGIN_MM, [2 * mm for mm in cell_mm])
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    return Body(_widened(filled, around).numpy(), (d, h, w), shape, volume.device)


def _in_cells(length_mm: float, cell_mm: Sequence[float]) -> list[int]:
    return [max(round(length_mm / mm), 1) for mm in cell_mm]


def _opened(cells: Tensor, lengths: Sequence[int]) -> Tensor:
    """What boxes of so many cells cover that hold nothing else; a box is no longer than the volume."""
    lengths = [min(length, count) for length, count in zip(lengths, cells.shape, strict=True)]
    others = ~cells
    for axis, length in enumerate(lengths):
        others = _any_of_run(others, axis, length)
    return _spread(~others, lengths)


def _opened_at_edges(cells: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same where the volume goes on behind its edges as it ends: the field of view may cut what is thick."""
    wider = cells
    for axis, length in enumerate(lengths):
        index = torch.arange(1 - length, cells.shape[axis] + length - 1, device=cells.device)
        wider = wider.index_select(axis, index.clamp(0, cells.shape[axis] - 1))
    d, h, w = (slice(length - 1, length - 1 + count) for length, count in zip(lengths, cells.shape, strict=True))
    return _opened(wider, lengths)[d, h, w]


def _halved(cells: Tensor) -> Tensor:
    """(N, d, h, w) -> (N, d / 2, h / 2, w / 2): whether one of eight cells is true; some 10,000 are left."""
    d, h, w = (count % 2 for count in cells.shape[1:])
    return functional.max_pool3d(functional.pad(cells.to(torch.float32), (0, w, 0, h, 0, d)), 2) > 0


def _widened(cells: Tensor, around: Sequence[int]) -> Tensor:
    """The cells and all that lie at most so many cells before or behind them along the axes."""
    spread = _spread(cells, [2 * count + 1 for count in around])
    return spread[tuple(slice(n, n + count) for n, count in zip(around, cells.shape, strict=True))]


def _spread(starts: Tensor, lengths: Sequence[int]) -> Tensor:
    """The cells of all boxes that begin at `starts` and are so many cells long; as much larger along each axis."""
    spread = starts
    for axis, length in enumerate(lengths):
        spread = functional.pad(spread, [n for each in (2, 1, 0) for n in [(length - 1) * (each == axis)] * 2])
        spread = _any_of_run(spread, axis, length)
    return spread


def _any_of_run(cells: Tensor, axis: int, length: int) -> Tensor:
    """Whether one of `length` neighbours along an axis is true; there are length - 1 runs fewer than cells."""
    count = cells.shape[axis] - length + 1
    found = cells.narrow(axis, 0, count).clone()
    for first in range(1, length):
        found |= cells.narrow(axis, first, count)
    return found


def _components_with(cells: Cells, seeds: Cells) -> Cells:
    """The connected parts of `cells` that hold a seed."""
    numbers, count = ndimage.label(cells)
    kept = np.zeros(count + 1, bool)
    kept[numbers[seeds]] = True
    kept[0] = False
    chosen: Cells = kept[numbers]
    return chosen


def _filled(cells: Cells) -> Cells:
    """Each slice filled, along its rows and its columns, between the outermost cells.

    Where the field of view cuts the body, its edge counts as the body's: a lung may lie open to it.
    """
    walls = cells.copy()
    for axis in (1, 2):
        used = _between(cells.any(axis=3 - axis), axis=1)  # rows (columns) from the slice's first cell to its last
        for edge in (0, -1):
            side = np.take(cells, edge, axis=3 - axis)
            walls[(np.s_[:], np.s_[:], edge) if axis == 1 else np.s_[:, edge]] |= side.any(axis=1)[:, None] & used
    return _between(walls, axis=1) | _between(walls, axis=2)


def _between(cells: Cells, axis: int) -> Cells:
    """From the first to the last cell of each line along an axis."""
    before = np.logical_or.accumulate(cells, axis=axis)
    after = np.flip(np.logical_or.accumulate(np.flip(cells, axis), axis=axis), axis)
    between: Cells = before & after
    return between
