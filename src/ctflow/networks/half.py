"""A network in half precision, stated in its tensors' types.

Engines that follow the types of a graph ("strongly typed": TensorRT 11, and 10 and RTX when asked) compute
exactly what is written here: weights and products in half precision, statistics, softmax and the sums along a
transformer's tokens in fp32, where half precision would overflow or be too coarse.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_IN_FULL = (nn.LayerNorm, nn.InstanceNorm3d, nn.GroupNorm, nn.BatchNorm3d)


def with_half_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes in half precision, with norms in fp32.

    Args:
        network: In evaluation mode; is not changed.
        dtype: torch.float16 or torch.bfloat16.

    Returns:
        A module with float32 input and output.
    """
    kept = copy.deepcopy(network)
    half = copy.deepcopy(network).to(dtype)
    # The norms keep their original numbers: a running variance may exceed half precision.
    made: dict[nn.Module, nn.Module] = {}  # a shared norm stays shared
    for name, module in list(half.named_modules(remove_duplicate=False)):
        if isinstance(module, _IN_FULL) and name:
            if module not in made:
                made[module] = FullPrecisionNorm(kept.get_submodule(name), dtype)
            half.set_submodule(name, made[module])
    return HalfNetwork(half, dtype).eval()


class HalfNetwork(nn.Module):
    """A network of half precision between a float32 input and a float32 output."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) float32 -> (B, C_out, D, H, W) float32."""
        logits: Tensor = self.network(windows.to(self.dtype))
        return logits.float()


class FullPrecisionNorm(nn.Module):
    """A norm in fp32 between tensors of half precision."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that the norm takes, in half precision or float32 -> the same shape in half precision."""
        normalized: Tensor = self.norm(x.float())
        return normalized.to(self.dtype)
