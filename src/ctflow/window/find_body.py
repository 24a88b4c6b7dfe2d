"""Find the body, in cells of a few millimetres, on the volume's device from its HU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ctflow.window.body import Body, Cells
from ctflow.window.cells import CellMask

BODY_HU = -500  # midway between air and water; a table's foam, blankets and clothes lie below
_SAMPLE_MM = 2.0  # sampling distance; everything relevant is several times as thick
_CELL_MM = 4.0
_THIN_MM = 8.0  # anything thinner is removed: a table's shell, cables, folds of cloth
_LEAST_MM = 16.0  # a part that is nowhere this thick in all directions at once is not a body
_MARGIN_MM = 15.0  # anything dense this near is added again: skin, its folds, ears, fingers near the trunk


def find_body(volume: Tensor, spacing_mm: tuple[float, float, float]) -> Body | None:
    """Find the body in a CT.

    The result is a superset, not an outline: all parts that are not thin are kept, each slice is filled between its
    outermost parts (lungs, the space between trunk and arms), and adjacent tissue denser than air is added. A thick
    object next to the body is also kept, which is harmless.

    Args:
        volume: (D, H, W) in HU on any device, slices first.
        spacing_mm: Distance of the voxels' centres along each axis.

    Returns:
        The body; None where the volume holds nothing thick enough.
    """
    stride = [max(int(_SAMPLE_MM / mm), 1) for mm in spacing_mm]
    samples = [max(round(_CELL_MM / (mm * step)), 1) for mm, step in zip(spacing_mm, stride, strict=True)]
    cell_mm = [step * count * mm for step, count, mm in zip(stride, samples, spacing_mm, strict=True)]
    coarse = [2 * count for count in samples]
    dense = _as_it_ends(volume[:: stride[0], :: stride[1], :: stride[2]] > BODY_HU, coarse)
    opened = _opened(functional.avg_pool3d(dense, samples)[0] >= 0.5, _in_cells(_THIN_MM, cell_mm))
    thick = _opened_at_edges(opened, _in_cells(_LEAST_MM, cell_mm))
    parts = functional.max_pool3d(torch.stack([opened, thick]).to(torch.float32), 2)
    near = functional.max_pool3d(functional.pad(dense, (1,) * 6), [count + 2 for count in coarse], stride=coarse)
    # Some 10,000 cells of each remain; the only wait for a GPU.
    found, seeds, beside = (torch.cat([parts, near]) > 0).cpu().numpy()
    if not seeds.any():
        return None
    # By SciPy: threads of torch would wait for CPUs that read and write other cases.
    filled = _filled(_components_with(found, seeds))
    margin = _in_cells(_MARGIN_MM, [2 * mm for mm in cell_mm])
    around = ndimage.maximum_filter(filled, [2 * count + 1 for count in margin], mode="constant")
    cells = filled | (around & beside)
    d, h, w = (step * count for step, count in zip(stride, coarse, strict=True))
    return Body(cells, (d, h, w), (volume.shape[0], volume.shape[1], volume.shape[2]))


def mask_of_body(body: Body, device: torch.device) -> CellMask:
    """The body's voxels as a mask on a device."""
    d, h, w = (
        torch.arange(count, device=device) // size for count, size in zip(body.shape, body.cell_size, strict=True)
    )
    return CellMask(torch.from_numpy(body.cells).to(device), (d, h, w))


def _as_it_ends(dense: Tensor, multiple: Sequence[int]) -> Tensor:
    """(D, H, W) bool -> (1, D', H', W') float32: each axis repeats its edge, up to a multiple of a cell."""
    d, h, w = (-count % cell for count, cell in zip(dense.shape, multiple, strict=True))
    return functional.pad(dense.to(torch.float32)[None], (0, w, 0, h, 0, d), mode="replicate")


def _in_cells(length_mm: float, cell_mm: Sequence[float]) -> list[int]:
    return [max(round(length_mm / mm), 1) for mm in cell_mm]


def _opened(cells: Tensor, lengths: Sequence[int]) -> Tensor:
    """Morphological opening with boxes of so many cells; a box is no longer than the volume."""
    lengths = [min(length, count) for length, count in zip(lengths, cells.shape, strict=True)]
    others = ~cells
    for axis, length in enumerate(lengths):
        others = _any_of_run(others, axis, length)
    return _spread(~others, lengths)


def _opened_at_edges(cells: Tensor, lengths: Sequence[int]) -> Tensor:
    """Opening of the volume with its edges repeated: the field of view may cut a thick part."""
    wider = cells
    for axis, length in enumerate(lengths):
        index = torch.arange(1 - length, cells.shape[axis] + length - 1, device=cells.device)
        wider = wider.index_select(axis, index.clamp(0, cells.shape[axis] - 1))
    d, h, w = (slice(length - 1, length - 1 + count) for length, count in zip(lengths, cells.shape, strict=True))
    return _opened(wider, lengths)[d, h, w]


def _spread(starts: Tensor, lengths: Sequence[int]) -> Tensor:
    """The cells of all boxes that begin at `starts` and are so many cells long; the array grows accordingly."""
    spread = starts
    for axis, length in enumerate(lengths):
        spread = functional.pad(spread, [n for each in (2, 1, 0) for n in [(length - 1) * (each == axis)] * 2])
        spread = _any_of_run(spread, axis, length)
    return spread


def _any_of_run(cells: Tensor, axis: int, length: int) -> Tensor:
    """Whether any of `length` neighbours along an axis is true; there are length - 1 fewer runs than cells."""
    count = cells.shape[axis] - length + 1
    found = cells.narrow(axis, 0, count).clone()
    for first in range(1, length):
        found |= cells.narrow(axis, first, count)
    return found


def _components_with(cells: Cells, seeds: Cells) -> Cells:
    """The connected components of `cells` that hold a seed."""
    numbers, count = ndimage.label(cells)
    kept = np.zeros(count + 1, bool)
    kept[numbers[seeds]] = True
    kept[0] = False
    chosen: Cells = kept[numbers]
    return chosen


def _filled(cells: Cells) -> Cells:
    """Each slice filled, along its rows and its columns, between the outermost cells.

    Where the field of view cuts the body, its edge counts as body: a lung may be open to it.
    """
    walls = cells.copy()
    for rows, walled in ((cells, walls), (cells.swapaxes(1, 2), walls.swapaxes(1, 2))):
        used = _between(np.any(rows, axis=2), axis=1)  # from the slice's first row with a cell to its last
        for edge in (0, -1):
            walled[:, :, edge] |= np.any(rows[:, :, edge], axis=1, keepdims=True) & used
    return _between(walls, axis=1) | _between(walls, axis=2)


def _between(cells: Cells, axis: int) -> Cells:
    """From the first to the last cell of each line along an axis."""
    before = np.logical_or.accumulate(cells, axis=axis)
    after = np.flip(np.logical_or.accumulate(np.flip(cells, axis), axis=axis), axis)
    between: Cells = before & after
    return between
