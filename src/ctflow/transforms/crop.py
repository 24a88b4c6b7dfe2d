"""Crop to the foreground."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from ctflow.core.errors import UnsupportedPixels
from ctflow.transforms.state import GridState


def crop(state: GridState, margin: int) -> GridState:
    """Crop the image to the foreground and its margin."""
    image = state.image
    starts, ends = [], []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        marked = torch.nonzero((image > 0).any(dim=others[1]).any(dim=others[0])).flatten()
        if not len(marked):
            raise UnsupportedPixels(
                "CropForegroundd found no voxel above 0: the bundle's scaling does not suit this CT", reason="scaling"
            )
        starts.append(int(marked[0]) - margin)
        ends.append(int(marked[-1]) + 1 + margin)
    affine, back, pad = state.affine.copy(), [], []
    for axis, (start, end) in enumerate(zip(starts, ends, strict=True)):
        size = image.shape[axis]
        image = image.narrow(axis, max(start, 0), min(end, size) - max(start, 0))
        pad.append((max(-start, 0), max(end - size, 0)))  # MONAI zero-pads a box that exceeds the image
        affine[:, 3] += affine[:, axis] * start
        back.append(state.back[axis] @ np.eye(size, end - start, -start))
    image = functional.pad(image, [n for pair in reversed(pad) for n in pair])
    return GridState(image, affine, state.axes, (back[0], back[1], back[2]))
