"""Which windows reveal most about an engine: of a phantom before a CT is available, and of a CT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.export.parity import marked
from ctflow.transforms.by_monai.case import prepared_for
from ctflow.transforms.state import Prepared
from ctflow.window.grid import padding_for_window, window_starts

if TYPE_CHECKING:
    from ctflow.phantom import Phantom

COUNT = 4  # windows that are compared: on two cores PyTorch computes them in 16 s (SwinUNETR, feature_size 12)
_PHANTOM: Size3 = (120, 128, 128)  # a whole chest of 3 mm voxels: drawn in a second or two
_PLANES = 16  # marked at once, so that labels of eight bytes per voxel never exist for a whole volume


def example_windows(model: Model, roi: Size3) -> list[Tensor]:
    """Windows of a synthetic chest, prepared as the model requires.

    Two have its largest tumours in the middle, two are the border windows of the grid with the most structure;
    mirror images replace duplicates.

    Returns:
        `COUNT` of (1, C_in, *roi) float32 on the CPU.
    """
    phantom = _phantom()
    prepared = prepared_for(model.spec, phantom.volume, "cpu")
    size: Size3 = tuple(prepared.tensor.shape[2:])  # type: ignore[assignment]  # a volume has three
    pads = [before for before, _ in padding_for_window(size, roi)]
    padded: Size3 = tuple(max(n, window) for n, window in zip(size, roi, strict=True))  # type: ignore[assignment]
    grid = [
        tuple(n - pad for n, pad in zip(start, pads, strict=True))
        for start in window_starts(padded, roi, model.spec.overlap, model.spec.placement)
    ]
    low, high = grid[0], grid[-1]
    border = [start for start in grid if any(n in ends for n, *ends in zip(start, low, high, strict=True))]
    border.sort(key=lambda start: -_structure(prepared.tensor, start, roi))  # type: ignore[arg-type]
    starts = list(dict.fromkeys([*_starts_of_tumours(phantom, prepared, low, high, roi)[:2], *border]))[:COUNT]
    windows = [window_at(prepared.tensor, start, roi) for start in starts]  # type: ignore[arg-type]
    while len(windows) < COUNT:
        windows.append(windows[-len(starts)].flip(2 + len(windows) % 3))
    return [window.expand(-1, model.spec.in_channels, -1, -1, -1).contiguous() for window in windows]


@cache
def _phantom() -> Phantom:
    """Drawn once per process: several engines may be compared in it."""
    from ctflow.phantom import phantom_from_seed  # noqa: PLC0415  # a run whose engine is in the cache draws none

    return phantom_from_seed(0, _PHANTOM, tumours=3)


def _starts_of_tumours(
    phantom: Phantom, prepared: Prepared, low: Sequence[int], high: Sequence[int], roi: Size3
) -> list[Size3]:
    """First voxels of windows with a tumour in their middle, the largest tumour first."""
    inverse = np.linalg.inv(phantom.volume.geometry.affine_mm)
    starts = []
    for tumour in sorted(phantom.tumours, key=lambda tumour: -tumour.diameter_mm):
        index = np.rint(inverse[:3, :3] @ tumour.centre_mm + inverse[:3, 3]).astype(int)
        middle = [int(prepared.back[axis][index[prepared.source_axes[axis]]].argmax()) for axis in range(3)]
        d, h, w = (
            min(max(n - window // 2, first), last)
            for n, window, first, last in zip(middle, roi, low, high, strict=True)
        )
        starts.append((d, h, w))
    return starts


def telling_windows(
    volume: Tensor, found: Tensor, starts: Sequence[Size3], roi: Size3, count: int = COUNT
) -> list[Size3]:
    """The windows of a volume in which most is marked, then those with the most structure.

    A voxel in a window already taken does not count again, so that several findings are seen. Windows of a single
    value are left out where there are others.

    Args:
        volume: (1, C_in, D, H, W) float32.
        found: (D, H, W) bool of the same grid, from `anything_marked`.
        starts: First voxel of each window that was computed; negative where the volume is smaller than a window.
        roi: Window size in voxels.
        count: How many are wanted.

    Returns:
        At most `count` of the starts, all different.
    """
    left = found.clone()
    taken: list[Size3] = []
    structure = {start: _structure(volume, start, roi) for start in starts}
    rest = [start for start in starts if structure[start]] or list(starts)
    while rest and len(taken) < count and left.any():
        sizes = torch.stack([left[_places(start, roi)].sum() for start in rest])
        if not sizes.any():
            break
        taken.append(rest.pop(int(sizes.argmax())))
        left[_places(taken[-1], roi)] = False
    if len(taken) < count:
        rest.sort(key=lambda start: -structure[start])
    return [*taken, *rest[: count - len(taken)]]


def window_at(volume: Tensor, start: Size3, roi: Size3) -> Tensor:
    """(1, C, *roi): the window that begins at a voxel of (1, C, D, H, W); zeros outside the volume, as in a run."""
    part = volume[(slice(None), slice(None), *_places(start, roi))]
    missing = [(max(-n, 0), window) for n, window in zip(start, roi, strict=True)]
    flat = [
        n
        for (before, window), have in reversed(list(zip(missing, part.shape[2:], strict=True)))
        for n in (before, window - before - have)
    ]
    return functional.pad(part, flat)


def _places(start: Size3, roi: Size3) -> tuple[slice, slice, slice]:
    d, h, w = (slice(max(n, 0), max(n + window, 0)) for n, window in zip(start, roi, strict=True))
    return d, h, w


def _structure(volume: Tensor, start: Size3, roi: Size3) -> float:
    """How much values vary within a window: little in air or padding."""
    return float(volume[0, 0][_places(start, roi)].std(correction=0))


def anything_marked(logits: Tensor, model: Model) -> Tensor:
    """(D, H, W) bool: where any segment is marked by (C, D, H, W) logits."""
    planes = [logits[:, first : first + _PLANES] for first in range(0, logits.shape[1], _PLANES)]
    return torch.cat([marked(some, model).any(0) for some in planes])
