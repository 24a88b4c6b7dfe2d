"""nnU-Net's preprocessing: crop to what is not 0, normalize, resample with splines.

Spline interpolation of any order is linear in the values and acts on each axis separately, so it is a matrix per axis,
as every other spatial step here, and runs on the engine's device. scipy, which nnU-Net calls through scikit-image,
gives the matrices' entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes, map_coordinates, zoom
from torch import Tensor

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import ClipNormalize, ResampleSpline, Spline, ZScore
from ctflow.core.volume import FloatArray
from ctflow.transforms.crop import boxed
from ctflow.transforms.resample import interpolated
from ctflow.transforms.state import LARGEST_VOXELS, AxisReturn, GridState, returned

_ANISOTROPIC = 3.0  # from this ratio of spacings on nnU-Net resamples the axis with the largest one apart
_LEAST_DEVIATION = 1e-8
_LEAST_WEIGHT = 1e-10  # of a spline's endless tails; float32 ends at 6e-8


def crop_nonzero(state: GridState) -> GridState:
    """Crop the image to the bounding box of what is not 0; an image of zeros stays as it is."""
    starts, ends, nonzero = [], [], state.image != 0
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        marked = torch.nonzero(nonzero.any(dim=others[1]).any(dim=others[0])).flatten()
        if not len(marked):
            return state
        starts.append(int(marked[0]))
        ends.append(int(marked[-1]) + 1)
    return boxed(state, starts, ends)


def clip_and_normalize(image: Tensor, step: ClipNormalize) -> Tensor:
    """Clip and normalize by figures of the training set."""
    return (image.clamp(step.lower, step.upper) - step.mean) / max(step.deviation, _LEAST_DEVIATION)


def zscore(image: Tensor, step: ZScore) -> Tensor:
    """Normalize by the image's own mean and deviation."""
    if not step.masked:
        return (image - image.mean()) / image.std(correction=0).clamp(min=_LEAST_DEVIATION)
    mask = torch.from_numpy(binary_fill_holes((image != 0).cpu().numpy())).to(image.device)
    inside = image[mask]
    if not inside.numel():
        return image
    return torch.where(mask, (image - inside.mean()) / inside.std(correction=0).clamp(min=_LEAST_DEVIATION), image)


def resample_spline(state: GridState, step: ResampleSpline) -> GridState:
    """Resample the image; the way back interpolates logits.

    Raises:
        UnsupportedPixels: The new grid would be too large, or have no voxel along an axis.

    Source: nnU-Net 2.8.1 `compute_new_shape` and `resample_data_or_seg_to_shape`.
    """
    # The last bits, which rotations of the axes change, must not decide how half a voxel is rounded.
    old = [float(f"{np.linalg.norm(state.affine[:3, axis]):.9g}") for axis in range(3)]
    new, size = step.spacing_mm, tuple(state.image.shape)
    shape = tuple(round(a / b * n) for a, b, n in zip(old, new, size, strict=True))
    if not 0 < math.prod(shape) <= LARGEST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise UnsupportedPixels(
            f"at the model's spacing the volume has {sizes} voxels: its PixelSpacing is implausible",
            reason="implausible-spacing",
        )
    if shape == size:
        return state
    image = _resampled(state.image, shape, step.forward, axis_apart(step.forward.apart, old, new))
    apart = axis_apart(step.back.apart, new, old)
    weights = [spline_weights(shape[axis], size[axis], step.back, apart=axis == apart) for axis in range(3)]
    affine = state.affine.copy()
    for axis in range(3):  # both grids begin at the same edge, not with the same voxel centre
        ratio = size[axis] / shape[axis]
        affine[:, 3] += affine[:, axis] * (ratio - 1) / 2
        affine[:, axis] *= ratio
    return returned(state, [AxisReturn(each, each.argmax(axis=1)) for each in weights], image, affine)


def _resampled(image: Tensor, shape: Sequence[int], spline: Spline, apart: int | None) -> Tensor:
    """The image on a grid of another shape, within the values of what each resampling was given."""
    weights = [
        spline_weights(n, m, spline, apart=axis == apart)
        for axis, (n, m) in enumerate(zip(image.shape, shape, strict=True))
    ]
    if apart is None:
        return interpolated(image, weights).clamp(float(image.min()), float(image.max()))
    dims = [axis for axis in range(3) if axis != apart]
    low, high = image.amin(dims, keepdim=True), image.amax(dims, keepdim=True)
    same = [np.eye(n) for n in image.shape]
    in_plane = interpolated(image, [same[axis] if axis == apart else weights[axis] for axis in range(3)])
    in_plane = torch.maximum(torch.minimum(in_plane, high), low)
    same = [np.eye(n) for n in in_plane.shape]
    return interpolated(in_plane, [weights[axis] if axis == apart else same[axis] for axis in range(3)])


def axis_apart(wanted: bool | None, first_mm: Sequence[float], second_mm: Sequence[float]) -> int | None:
    """The axis that nnU-Net resamples apart from the others; None if all are resampled together.

    Args:
        wanted: See `Spline.apart`.
        first_mm: Spacing of the grid that has the values.
        second_mm: Spacing of the grid that gets them.

    Source: nnU-Net 2.8.1 `determine_do_sep_z_and_axis`.
    """
    if wanted is False:
        return None
    grids = [first_mm] if wanted else [mm for mm in (first_mm, second_mm) if max(mm) / min(mm) > _ANISOTROPIC]
    if not grids:
        return None
    largest = [axis for axis, mm in enumerate(grids[0]) if mm == max(grids[0])]
    return largest[0] if len(largest) == 1 else None


def spline_weights(size: int, new_size: int, spline: Spline, *, apart: bool) -> FloatArray:
    """Weights of interpolation along an axis whose ends stay where they are.

    Args:
        size: Voxels of the axis.
        new_size: Voxels wanted.
        spline: Its order.
        apart: Whether the axis is resampled apart from the others.

    Returns:
        (new_size, size) float64; each row sums to 1.

    Source: `skimage.transform.resize(mode="edge", anti_aliasing=False)`, which calls `scipy.ndimage.zoom`.
    """
    return _weights(size, new_size, spline.order_z if apart else spline.order, apart)


@lru_cache(maxsize=8)  # 2 MB each
def _weights(size: int, new_size: int, order: int, apart: bool) -> FloatArray:
    if size == new_size:
        return np.eye(size)
    if apart:
        places = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
        columns = [map_coordinates(voxel, [places], order=order, mode="nearest") for voxel in np.eye(size)]
    else:
        columns = [zoom(voxel, new_size / size, order=order, mode="nearest", grid_mode=True) for voxel in np.eye(size)]
    weights = np.stack(columns, axis=1)
    weights[np.abs(weights) < _LEAST_WEIGHT] = 0
    weights.flags.writeable = False  # shared by all who ask for it
    return weights
