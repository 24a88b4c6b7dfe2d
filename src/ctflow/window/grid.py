"""Where the windows lie: exactly MONAI's `dense_patch_slices`."""

from __future__ import annotations

import itertools

from ctflow.volume import Size3


def starts_along_axis(size: int, window: int, overlap: float) -> list[int]:
    """First voxel of each window along one axis.

    Args:
        size: Voxels of the volume, at least `window` (a smaller volume is padded first).
        window: Voxels of the window.
        overlap: 0 <= overlap < 1.

    Returns:
        Ascending starts; the last window ends at the volume's end.

    Source: `monai.inferers.utils._get_scan_interval` and `monai.data.utils.dense_patch_slices`, MONAI 1.6.1.
    """
    interval = window if window == size else max(int(window * (1 - overlap)), 1)
    starts = [0]
    while starts[-1] + window < size:
        starts.append(min(starts[-1] + interval, size - window))
    return starts


def window_starts(size: Size3, roi: Size3, overlap: float) -> list[Size3]:
    """First voxel of each window, in MONAI's order (the last axis runs fastest).

    Args:
        size: Voxels of the volume, each axis at least the window's.
        roi: Voxels of the window.
        overlap: 0 <= overlap < 1.

    Returns:
        (d, h, w) starts.
    """
    axes = (starts_along_axis(n, window, overlap) for n, window in zip(size, roi, strict=True))
    return list(itertools.product(*axes))  # type: ignore[arg-type]  # a product of three


def padding_for_window(size: Size3, roi: Size3) -> tuple[tuple[int, int], ...]:
    """Voxels to add before and after each axis so that a window fits; half before, the odd one after."""
    missing = [max(window - n, 0) for n, window in zip(size, roi, strict=True)]
    return tuple((n // 2, n - n // 2) for n in missing)
