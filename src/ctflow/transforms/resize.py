"""Resize to a number of voxels, as torch interpolates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.model import Resize
from ctflow.core.volume import FloatArray
from ctflow.transforms.resample import interpolated
from ctflow.transforms.state import LARGEST_VOXELS, AxisReturn, GridState, IndexArray, returned

_EVEN = "nearest"


def resize(state: GridState, step: Resize) -> GridState:
    """Resize the image; every mode of torch acts on each axis separately.

    Source: MONAI 1.6.1 `Resize` (`torch.nn.functional.interpolate`) and `scale_affine`.
    """
    before = list(state.image.shape)
    after = _sizes(before, step)
    if math.prod(after) > LARGEST_VOXELS:
        raise UnsupportedPixels("Resized gives an absurdly large volume", reason="scaling")
    forward = [_weights(old, new, step) for old, new in zip(before, after, strict=True)]
    backward = [AxisReturn(_weights(new, old, step), _picks(new, old)) for old, new in zip(before, after, strict=True)]
    image = interpolated(state.image, forward)
    return returned(state, backward, image, state.affine @ _scale(before, after, align_corners=step.align_corners))


def _sizes(before: Sequence[int], step: Resize) -> list[int]:
    if len(step.sizes) == 1:
        scale = step.sizes[0] / max(before)
        return [round(size * scale) for size in before]
    return [size if wanted <= 0 else wanted for size, wanted in zip(before, step.sizes, strict=True)]


def _weights(old: int, new: int, step: Resize) -> FloatArray:
    """(new, old) float64: what torch makes of each single voxel."""
    if step.mode in ("nearest", "nearest-exact"):
        return np.eye(old)[_picks(old, new, step.mode)]
    mode = {"area": "area", "linear": "linear"}[step.mode]
    corners = step.align_corners if mode == "linear" else None
    single = torch.eye(old, dtype=torch.float64)[None]
    found: FloatArray = functional.interpolate(single, size=new, mode=mode, align_corners=corners)[0].T.numpy()
    return found


def _picks(old: int, new: int, mode: str = _EVEN) -> IndexArray:
    """(new,) the voxel of the old grid that torch takes; `Invertd(nearest_interp=True)` takes "nearest"."""
    numbered = torch.arange(old, dtype=torch.float32)[None, None]
    found: IndexArray = functional.interpolate(numbered, size=new, mode=mode)[0, 0].to(torch.int64).numpy()
    return found


def _scale(before: Sequence[int], after: Sequence[int], *, align_corners: bool) -> FloatArray:
    matrix = np.eye(4)
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if align_corners:
            matrix[axis, axis] = (old - 1) / (new - 1) if new > 1 else 0.0
        else:
            matrix[axis, axis] = old / new
            matrix[axis, 3] = (old / new - 1) / 2
    return matrix if list(before) != list(after) else np.eye(4)
