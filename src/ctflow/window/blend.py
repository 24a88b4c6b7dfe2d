"""Weights of overlapping windows: exactly MONAI's `compute_importance_map`, or exactly nnU-Net's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from ctflow.core.model import Blend
from ctflow.core.volume import Size3

SIGMA_SCALE = (0.125, 0.125, 0.125)  # MONAI's default
LEAST_WEIGHT = 1e-3
_PEAK_OF_NNUNET = 10.0


def importance_map(
    roi: Size3, blend: Blend, device: torch.device, sigma_scale: tuple[float, float, float] = SIGMA_SCALE
) -> Tensor:
    """Weight of each voxel of a window.

    Args:
        roi: Voxels of the window.
        blend: "constant", "gaussian", or nnU-Net's "nnunet", a Gaussian cut off at the window's edge.
        device: Device of the map.
        sigma_scale: Standard deviation of the gaussian along each axis, as a fraction of the window.

    Returns:
        (D, H, W) float32, all above 0.

    Raises:
        ValueError: The blend is unknown.

    Source: `monai.data.utils.compute_importance_map`, MONAI 1.6.1; `compute_gaussian`, nnU-Net 2.8.1.
    """
    if blend == "constant":
        return torch.ones(roi, device=device)
    if blend == "nnunet":
        return _map_of_nnunet(roi).to(device)
    if blend != "gaussian":
        raise ValueError(f"unknown blend {blend!r}")
    d, h, w = (_gaussian(size, scale, device) for size, scale in zip(roi, sigma_scale, strict=True))
    weights = (d[:, None] * h[None, :])[:, :, None] * w
    # The least weight stays on the device: reading it would wait for a GPU.
    return torch.maximum(weights, weights.min().clamp(min=LEAST_WEIGHT))


def _map_of_nnunet(roi: Size3) -> Tensor:
    """Half-precision values, as nnU-Net blends with; what half precision makes 0 gets its least value above 0."""
    d, h, w = (gaussian_filter1d(np.eye(size)[size // 2], size * SIGMA_SCALE[0], mode="constant") for size in roi)
    weights = d[:, None, None] * h[:, None] * w
    half = torch.from_numpy(weights / weights.max() * _PEAK_OF_NNUNET).to(torch.float16).to(torch.float32)
    return torch.where(half == 0, half[half > 0].min(), half)


def _gaussian(size: int, scale: float, device: torch.device) -> Tensor:
    offset = torch.arange(-(size - 1) / 2.0, (size - 1) / 2.0 + 1, dtype=torch.float32, device=device)
    return torch.exp(offset**2 / (-2 * (size * scale) ** 2))


def total_weight(weight: Tensor, axis_starts: Sequence[Sequence[int]], size: Size3) -> Tensor:
    """Sum of all windows' weights at each voxel, independent of the volume's content.

    The windows are every combination of the axes' starts, so their weights can be added one axis after another: some
    tens of additions instead of one per window.

    Args:
        weight: (D, H, W) float32 of a window, from `importance_map`.
        axis_starts: First voxel of the windows along each axis.
        size: Voxels of the volume.

    Returns:
        (D, H, W) float32 of the volume's size on the weight's device.
    """
    total = weight
    for axis in (2, 1, 0):  # the small arrays first
        shape = list(total.shape)
        shape[axis] = size[axis]
        added = total.new_zeros(shape)
        for start in axis_starts[axis]:
            added.narrow(axis, start, weight.shape[axis]).add_(total)
        total = added
    return total
