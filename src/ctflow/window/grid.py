"""Positions of the windows: exactly MONAI's `dense_patch_slices`, or exactly nnU-Net's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

from ctflow.core.model import Overlap, Placement
from ctflow.core.volume import Size3

_Item = TypeVar("_Item")


def starts_along_axis(size: int, window: int, overlap: float, placement: Placement = "dense") -> list[int]:
    """First voxel of each window along one axis.

    Args:
        size: Voxels of the volume, at least `window` (a smaller volume is padded first).
        window: Voxels of the window.
        overlap: 0 <= overlap < 1; between "even" windows the least one.
        placement: "dense" steps by whole intervals, "even" makes all steps about as long.

    Returns:
        Ascending starts; the last window ends at the volume's end.

    Source: `monai.inferers.utils._get_scan_interval` and `monai.data.utils.dense_patch_slices`, MONAI 1.6.1;
    `compute_steps_for_sliding_window`, nnU-Net 2.8.1.
    """
    if placement == "even":
        steps = math.ceil((size - window) / (window * (1 - overlap)))
        return [round((size - window) / steps * index) for index in range(steps + 1)] if steps else [0]
    interval = window if window == size else max(int(window * (1 - overlap)), 1)
    starts = [0]
    while starts[-1] + window < size:
        starts.append(min(starts[-1] + interval, size - window))
    return starts


def window_axes(
    size: Size3, roi: Size3, overlap: Overlap, placement: Placement = "dense"
) -> tuple[list[int], list[int], list[int]]:
    """First voxel of the windows along each axis; the windows are every combination of them.

    Args:
        size: Voxels of the volume, each axis at least the window's.
        roi: Voxels of the window.
        overlap: 0 <= overlap < 1, for all axes or each.
        placement: See `starts_along_axis`.

    Returns:
        Ascending starts along d, h and w.
    """
    shares = overlap if isinstance(overlap, tuple) else (overlap,) * 3
    d, h, w = (starts_along_axis(*axis, placement) for axis in zip(size, roi, shares, strict=True))
    return d, h, w


def window_starts(size: Size3, roi: Size3, overlap: Overlap, placement: Placement = "dense") -> list[Size3]:
    """First voxel of each window, in MONAI's order (the last axis runs fastest).

    Args:
        size: Voxels of the volume, each axis at least the window's.
        roi: Voxels of the window.
        overlap: 0 <= overlap < 1.
        placement: See `starts_along_axis`.

    Returns:
        (d, h, w) starts.
    """
    return list(itertools.product(*window_axes(size, roi, overlap, placement)))


def shares_of_windows(starts: Sequence[_Item], count: int) -> list[list[_Item]]:
    """Divide the windows among devices in contiguous runs, so that each device needs one slab of the volume.

    Args:
        starts: The windows, in MONAI's order, or groups of them.
        count: Devices.

    Returns:
        At most `count` runs, none empty, whose lengths differ by at most one.
    """
    count = min(count, len(starts))
    ends = [len(starts) * (index + 1) // count for index in range(count)]
    return [list(starts[first:end]) for first, end in zip([0, *ends], ends, strict=False)]


def roi_in_volume(roi: Size3, size: Size3) -> Size3:
    """A window's size in a volume: along an axis with 0 it is as long as the volume."""
    d, h, w = (window or n for window, n in zip(roi, size, strict=True))
    return d, h, w


def padding_for_window(size: Size3, roi: Size3) -> tuple[tuple[int, int], ...]:
    """Voxels to add before and after each axis so that a window fits; an odd one goes after."""
    missing = [max(window - n, 0) for n, window in zip(size, roi, strict=True)]
    return tuple((n // 2, n - n // 2) for n in missing)
