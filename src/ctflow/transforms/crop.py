"""Crop and pad: to the foreground, to the middle, to a size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import CropCenter, CropForeground, Pad, PadMode
from ctflow.transforms.state import LARGEST_VOXELS, GridState, returned, shifted

_BY_TORCH = {"constant": "constant", "edge": "replicate", "reflect": "reflect", "wrap": "circular"}


def crop_foreground(state: GridState, step: CropForeground) -> GridState:
    """Crop the image to the foreground and its margin."""
    starts, ends = [], []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        seen = (state.image > step.above).any(dim=others[1]).any(dim=others[0])
        marked = torch.nonzero(seen).flatten()
        if not len(marked):
            raise UnsupportedPixels(
                f"CropForegroundd found no voxel above {step.above:g}: the bundle's scaling does not suit this CT",
                reason="scaling",
            )
        start, end = int(marked[0]) - step.margin, int(marked[-1]) + 1 + step.margin
        if step.within:
            start, end = max(start, 0), min(end, state.image.shape[axis])
        k = step.divisible[axis]
        size = -(-(end - start) // k) * k
        starts.append(start - (size - (end - start)) // 2)
        ends.append(starts[-1] + size)
    return boxed(state, starts, ends, step.mode, step.value)


def crop_center(state: GridState, step: CropCenter) -> GridState:
    """Crop the image to its middle."""
    starts, ends = [], []
    for size, given in zip(state.image.shape, step.sizes, strict=True):
        wanted = size if given <= 0 else given
        starts.append(max(size // 2 - wanted // 2, 0))
        ends.append(min(starts[-1] + wanted, size))
    return boxed(state, starts, ends)


def pad(state: GridState, step: Pad) -> GridState:
    """Pad the image."""
    starts, ends = [], []
    for axis, size in enumerate(state.image.shape):
        if step.kind == "border":
            before, after = step.sizes[2 * axis : 2 * axis + 2]
        else:
            given = step.sizes[axis]
            wanted = size if given <= 0 else given if step.kind == "size" else -(-size // given) * given
            missing = max(wanted - size, 0)
            before = 0 if step.at_end else missing // 2
            after = missing - before
        starts.append(-before)
        ends.append(size + after)
    return boxed(state, starts, ends, step.mode, step.value)


def boxed(
    state: GridState, starts: Sequence[int], ends: Sequence[int], mode: PadMode = "constant", value: float = 0.0
) -> GridState:
    """The image in a box, which may exceed it."""
    if math.prod(end - start for start, end in zip(starts, ends, strict=True)) > LARGEST_VOXELS:
        raise UnsupportedPixels("padding gives an absurdly large volume", reason="scaling")
    image, affine, back, missing = state.image, state.affine.copy(), [], []
    for axis, (start, end) in enumerate(zip(starts, ends, strict=True)):
        size = image.shape[axis]
        image = image.narrow(axis, max(start, 0), min(end, size) - max(start, 0))
        missing.append((max(-start, 0), max(end - size, 0)))
        affine[:, 3] += affine[:, axis] * start
        back.append(shifted(size, end - start, start))
    return returned(state, back, _padded(image, missing, mode, value), affine)


def _padded(image: Tensor, missing: Sequence[tuple[int, int]], mode: PadMode, value: float) -> Tensor:
    flat = [n for pair in reversed(missing) for n in pair]
    if not any(flat):
        return image
    if mode not in _BY_TORCH:
        padded = np.pad(image.to(torch.float32).cpu().numpy(), list(missing), mode=mode)
        return torch.from_numpy(padded).to(image.device)
    if mode == "constant":
        return functional.pad(image if _holds(image.dtype, value) else image.to(torch.float32), flat, value=value)
    fits = all(max(pair) < size or mode == "edge" for pair, size in zip(missing, image.shape, strict=True))
    if not fits:
        raise UnsupportedPixels(f"the volume is too small to be padded by {mode!r}", reason="scaling")
    return functional.pad(image.to(torch.float32)[None, None], flat, mode=_BY_TORCH[mode])[0, 0]


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether a value has its place among those of an element type."""
    if dtype.is_floating_point:
        return True
    limits = torch.iinfo(dtype)
    return value == int(value) and limits.min <= value <= limits.max
