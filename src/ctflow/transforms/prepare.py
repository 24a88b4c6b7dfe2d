"""A CT volume to the network's input, and the exact inverse to the source grid.

Every spatial step (orient, resample, crop) acts on each axis separately, so the inverse is one small matrix per axis:
it maps the network's grid to the source's. `restore_slabs` applies the three matrices slab by slab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import (
    ClipNormalize,
    ClipPercentiles,
    CropCenter,
    CropForeground,
    CropNonzero,
    Linear,
    Normalize,
    Orient,
    Pad,
    Resample,
    ResampleSpline,
    Resize,
    ScaleMinMax,
    ScalePercentiles,
    ScaleRange,
    Step,
    Threshold,
    Turn,
    ZScore,
)
from ctflow.core.volume import FloatArray, Volume
from ctflow.transforms.crop import crop_center, crop_foreground, pad
from ctflow.transforms.intensity import (
    clip_percentiles,
    linear,
    normalize,
    range_from_percentiles,
    scale,
    scale_min_max,
    threshold,
)
from ctflow.transforms.nnunet import clip_and_normalize, crop_nonzero, resample_spline, zscore
from ctflow.transforms.orient import orient, turned
from ctflow.transforms.resample import resample, resize
from ctflow.transforms.state import GridState, Prepared
from ctflow.transforms.tilt import remove_tilt, untilted_grid
from ctflow.transforms.upload import uploaded


def unseen(source: Tensor) -> None:
    """An `on_uploaded` that does nothing."""


def prepare_volume(
    volume: Volume, steps: Sequence[Step], device: str, on_uploaded: Callable[[Tensor], None] = unseen
) -> Prepared:
    """Prepare a volume as the bundle requires.

    Args:
        volume: CT in HU.
        steps: The bundle's preprocessing, in order.
        device: torch device; the volume is uploaded once, unchanged.
        on_uploaded: Gets the volume's array in HU on the device, before any step; must not change or keep it.

    Returns:
        The network's input and the inverse mapping.

    Raises:
        UnsupportedPixels: A step leaves nothing of the volume, or values that are not finite.

    Source: MONAI 1.6.1 `Orientation`, `Spacing`, `ScaleIntensityRange(Percentiles)`, `NormalizeIntensity`,
    `CropForeground`, applied to the image as MONAI's readers load it: axes (W, H, D), RAS affine; and nnU-Net 2.8.1
    `DefaultPreprocessor`.
    """
    untilted = untilted_grid(volume.geometry)
    source = uploaded(volume.array, torch.device(device))
    on_uploaded(source)
    if untilted is None:
        state = _state(source, volume.geometry.affine_mm)
    else:
        state = _state(remove_tilt(source, untilted), untilted.geometry.affine_mm)
    del source  # one volume on the device is enough
    for step in steps:
        state = _apply(state, step)
    image = state.image.to(torch.float32)
    if not bool(torch.isfinite(image).all()):
        raise UnsupportedPixels(
            "preprocessing gave non-finite values: the bundle's scaling does not suit CT", reason="scaling"
        )
    x_mm, y_mm, z_mm = np.linalg.norm(state.affine[:3, :3], axis=0).tolist()
    return Prepared(image.contiguous()[None, None], state.axes, state.back, (x_mm, y_mm, z_mm), untilted, state.picks)


def _state(array: Tensor, affine_mm: FloatArray) -> GridState:
    """The initial state: (D, H, W) with its LPS affine, in the layout of MONAI's readers."""
    image = array.permute(2, 1, 0)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_mm[:, [2, 1, 0, 3]]
    x, y, z = (np.eye(size) for size in image.shape)
    i, j, k = (np.arange(size) for size in image.shape)
    return GridState(image, affine, (2, 1, 0), (x, y, z), (i, j, k))


def _apply(state: GridState, step: Step) -> GridState:
    if type(step) in _SPATIAL:
        return _SPATIAL[type(step)](state, step)
    return replace(state, image=_INTENSITY[type(step)](state.image.to(torch.float32), step))


_SPATIAL: Mapping[type, Callable[[GridState, Any], GridState]] = {
    Orient: lambda state, step: orient(state, step.axcodes),
    Turn: lambda state, step: turned(state, step.axes, step.flipped, moves_affine=step.moves_affine),
    Resample: resample,
    Resize: resize,
    CropForeground: crop_foreground,
    CropCenter: crop_center,
    Pad: pad,
    CropNonzero: lambda state, _: crop_nonzero(state),
    ResampleSpline: resample_spline,
}
_INTENSITY: Mapping[type, Callable[[Tensor, Any], Tensor]] = {
    ScaleRange: scale,
    ScalePercentiles: lambda image, step: scale(image, range_from_percentiles(image, step)),
    Normalize: normalize,
    ScaleMinMax: scale_min_max,
    ClipPercentiles: clip_percentiles,
    Threshold: threshold,
    Linear: linear,
    ClipNormalize: clip_and_normalize,
    ZScore: zscore,
}
