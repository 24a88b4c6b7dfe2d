"""How overlapping windows are weighted: exactly MONAI's `compute_importance_map`."""

from __future__ import annotations

import torch
from torch import Tensor

from ctflow.model import Blend
from ctflow.volume import Size3

SIGMA_SCALE = 0.125  # MONAI's default; bundles that ask for another are refused
LEAST_WEIGHT = 1e-3


def importance_map(roi: Size3, blend: Blend, device: torch.device) -> Tensor:
    """Weight of each voxel of a window.

    Args:
        roi: Voxels of the window.
        blend: "constant" or "gaussian".
        device: Where the map is wanted.

    Returns:
        (D, H, W) float32, all above 0.

    Raises:
        ValueError: The blend is unknown.

    Source: `monai.data.utils.compute_importance_map`, MONAI 1.6.1.
    """
    if blend == "constant":
        return torch.ones(roi, device=device)
    if blend != "gaussian":
        raise ValueError(f"unknown blend {blend!r}")
    d, h, w = (_gaussian(size, device) for size in roi)
    weights = (d[:, None] * h[None, :])[:, :, None] * w
    return weights.clamp_(min=max(float(weights.min()), LEAST_WEIGHT))


def _gaussian(size: int, device: torch.device) -> Tensor:
    offset = torch.arange(-(size - 1) / 2.0, (size - 1) / 2.0 + 1, dtype=torch.float32, device=device)
    return torch.exp(offset**2 / (-2 * (size * SIGMA_SCALE) ** 2))
