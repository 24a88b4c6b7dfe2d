"""A network in half precision whose tensors say so themselves, and norms written out in plain arithmetic.

Engines that follow the types of a graph ("strongly typed": TensorRT from 11 on, and 10 and RTX when asked) compute
exactly what is written here: weights and products in half precision, statistics, softmax and the sums along a
transformer's tokens in fp32, where half precision would overflow or be too coarse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_Norm = nn.LayerNorm | nn.InstanceNorm3d | nn.GroupNorm
_NORMS = (nn.LayerNorm, nn.InstanceNorm3d, nn.GroupNorm)
_RUNNING = "track_running_stats"


def with_half_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes in half precision, with norms in fp32.

    Args:
        network: In evaluation mode; stays as it is.
        dtype: torch.float16 or torch.bfloat16.

    Returns:
        A module with float32 input and output.
    """
    kept = copy.deepcopy(network)
    half = copy.deepcopy(network).to(dtype)
    # The norms' own numbers are those of before: a running variance may be beyond half precision.
    half = _with_norms(half, _IN_FULL, lambda name: FullPrecisionNorm(kept.get_submodule(name), dtype))
    return HalfNetwork(half, dtype).eval()


def with_written_norms(network: nn.Module) -> nn.Module:
    """A copy whose norms are means, products and roots, for engines that have no operation for them.

    Args:
        network: In evaluation mode; stays as it is.
    """
    written = copy.deepcopy(network)
    return _with_norms(written, _NORMS, lambda name: WrittenNorm(written.get_submodule(name))).eval()  # type: ignore[arg-type]


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


class WrittenNorm(nn.Module):
    """`LayerNorm`, `InstanceNorm3d` or `GroupNorm` from means, products and a root.

    Args:
        norm: The module; without running statistics.
    """

    def __init__(self, norm: _Norm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        self.axes = tuple(range(-len(norm.normalized_shape), 0)) if isinstance(norm, nn.LayerNorm) else (-3, -2, -1)
        # A layer norm has a weight for each place that it norms over, the others one for each channel.
        shape = tuple(norm.normalized_shape) if isinstance(norm, nn.LayerNorm) else (-1, 1, 1, 1)
        self.scale = None if norm.weight is None else nn.Parameter(norm.weight.detach().reshape(shape), False)
        self.shift = None if norm.bias is None else nn.Parameter(norm.bias.detach().reshape(shape), False)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, in the shape of x."""
        grouped = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:]) if self.groups else x
        axes = (-4, *self.axes) if self.groups else self.axes
        centred = grouped - grouped.mean(axes, keepdim=True)
        variance = (centred * centred).mean(axes, keepdim=True)
        normalized = centred / torch.sqrt(variance + self.eps)
        result = normalized.flatten(1, 2) if self.groups else normalized
        if self.scale is not None:
            result = result * self.scale
        return result if self.shift is None else result + self.shift


_IN_FULL = (*_NORMS, nn.BatchNorm3d, WrittenNorm)


def _with_norms(
    network: nn.Module, kinds: tuple[type[nn.Module], ...], replacement: Callable[[str], nn.Module]
) -> nn.Module:
    """The network itself, each norm of these kinds replaced; one with running statistics has none to be written."""
    for name, module in list(network.named_modules()):
        if isinstance(module, kinds) and name and not (kinds is _NORMS and getattr(module, _RUNNING, False)):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, replacement(name))
    return network
