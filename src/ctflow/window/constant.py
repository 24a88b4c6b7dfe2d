"""Windows with a single value: computed once per value, and never a reason to mark anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctflow.core.volume import Box
from ctflow.window.cells import CellMask

_STRIDE = 16  # of the first check of a box: noise shows in the first few voxels


def alike_windows(volume: Tensor, places: Sequence[Box]) -> list[list[Box]]:
    """Group windows that have the same content, without comparing every pair.

    Args:
        volume: (C, D, H, W) on any device; the host waits for a GPU once.
        places: Windows of one size in the volume, at least one.

    Returns:
        All places, in groups in the order of their first windows: windows with the same single value in each channel
        form one group, every other window its own.
    """
    starts = [sorted({place[axis].start for place in places}) for axis in range(3)]
    sizes = [part.stop - part.start for part in places[0]]
    low = high = volume
    for axis, (firsts, size) in enumerate(zip(starts, sizes, strict=True), start=1):
        low = torch.stack([low.narrow(axis, first, size).amin(axis) for first in firsts], axis)
        high = torch.stack([high.narrow(axis, first, size).amax(axis) for first in firsts], axis)
    lowest, highest = torch.stack([low, high]).cpu().numpy()
    constant = (lowest == highest).all(axis=0)  # NaN equals nothing: a window with NaN gets its own group
    number = [{first: index for index, first in enumerate(firsts)} for firsts in starts]
    groups: dict[object, list[Box]] = defaultdict(list)
    for index, place in enumerate(places):
        d, h, w = (numbers[part.start] for numbers, part in zip(number, place, strict=True))
        groups[tuple(lowest[:, d, h, w].tolist()) if constant[d, h, w] else index].append(place)
    return list(groups.values())


class ConstantWindows:
    """Find windows with a single HU value, and voxels that lie in no other window.

    A window of a body has noise, so a scanner never gives it a single value: it is padding, and a network's output
    there comes from its weights alone.

    Args:
        array: (D, H, W) in HU, the source's.

    Attributes:
        count: Such windows so far.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.count = 0
        self._array = array
        self._others: list[Box] = []

    def look_at(self, box: Box) -> None:
        """Check a window.

        Args:
            box: The source voxels that it contributes to (`ctflow.transforms.restore.source_boxes`); empty if there
                are none.
        """
        # One more voxel on each side: the window's outermost voxels may have been interpolated with it.
        part = self._array[tuple(slice(max(axis.start - 1, 0), axis.stop + 1) for axis in box)]
        if any(axis.start == axis.stop for axis in box) or _is_constant(part):
            self.count += 1
        else:
            self._others.append(box)

    def seen(self, device: torch.device) -> CellMask | None:
        """The voxels in any other window; None if no window was constant so far, so none is excluded."""
        return seen_from_boxes(self._others, self._array.shape, device) if self.count else None


def _is_constant(part: npt.NDArray[Any]) -> bool:
    first = part[0, 0, 0]
    return bool((part[::_STRIDE, ::_STRIDE, ::_STRIDE] == first).all() and (part == first).all())


def seen_from_boxes(boxes: Sequence[Box], shape: Sequence[int], device: torch.device) -> CellMask:
    """The union of boxes.

    Args:
        boxes: None of them empty.
        shape: Voxels of the volume (D, H, W).
        device: Device of masks.
    """
    cuts = [
        sorted({0, count, *(box[axis].start for box in boxes), *(box[axis].stop for box in boxes)})
        for axis, count in enumerate(shape)
    ]
    cells = np.zeros([len(each) - 1 for each in cuts], bool)
    for box in boxes:
        d, h, w = (
            slice(int(np.searchsorted(each, part.start)), int(np.searchsorted(each, part.stop)))
            for each, part in zip(cuts, box, strict=True)
        )
        cells[d, h, w] = True
    of_voxel = [torch.from_numpy(np.repeat(np.arange(len(each) - 1), np.diff(each))).to(device) for each in cuts]
    return CellMask(torch.from_numpy(cells).to(device), (of_voxel[0], of_voxel[1], of_voxel[2]))
