"""A network in half precision whose tensors say so themselves, and norms written out in plain arithmetic.

Engines that follow the types of a graph ("strongly typed": TensorRT from 11 on, and 10 and RTX when asked) compute
exactly what is written here: weights and products in half precision, statistics, softmax and the sums along a
transformer's tokens in fp32, where half precision would overflow or be too coarse.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_Norm = nn.LayerNorm | nn.InstanceNorm3d | nn.GroupNorm
_NORMS = (nn.LayerNorm, nn.InstanceNorm3d, nn.GroupNorm)
_LEAKY = (nn.LeakyReLU, nn.PReLU)
_Kinds = tuple[type[nn.Module], ...]
_RUNNING = "track_running_stats"
WRITTEN_NORMS_VERSION = 4  # in the keys of engines made from them: raise it when they are written otherwise


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
    _replace(half, _IN_FULL, lambda _, name: FullPrecisionNorm(kept.get_submodule(name), dtype))
    return HalfNetwork(half, dtype).eval()


def with_written_norms(network: nn.Module) -> nn.Module:
    """A copy whose norms are means, products and roots, for engines that have no operation for them.

    Variances and the activations that follow norms, leaky ReLUs, are written as choices (`where`): what lies around a
    choice TensorRT 8.5 hands to its second compiler as one piece. Step by step it compiles some hundred kernels for
    each norm, to measure them: the build of a SwinUNETR then does not end within ten minutes.

    Args:
        network: In evaluation mode; stays as it is.
    """
    written = copy.deepcopy(network)
    _replace(written, _LEAKY, lambda activation, _: WrittenLeakyReLU(activation))
    # A norm with running statistics is an affine map already.
    _replace(written, _NORMS, lambda norm, _: norm if getattr(norm, _RUNNING, False) else WrittenNorm(norm))
    return written.eval()


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
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else None
        # The axes of tokens; voxels become one long axis, for which TensorRT 8.5 has fewer memory formats to measure.
        self.axes = tuple(range(-len(norm.normalized_shape), 0)) if isinstance(norm, nn.LayerNorm) else None
        self.scale = None if norm.weight is None else nn.Parameter(norm.weight.detach(), False)
        self.shift = None if norm.bias is None else nn.Parameter(norm.bias.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, in the shape of x."""
        if self.axes:
            result = _normalized_tokens(x, self.axes, self.eps)
        else:
            grouped = x.reshape(x.shape[0], self.groups or x.shape[1], -1)
            result = _normalized(grouped, self.eps).reshape(x.shape)
        if self.scale is not None:
            result = result * self._placed(self.scale, x)
        return result if self.shift is None else result + self._placed(self.shift, x)

    def _placed(self, numbers: Tensor, x: Tensor) -> Tensor:
        """A layer norm has a number for each place that it norms over, the others one for each channel."""
        return numbers if self.axes else _of_channels(numbers, x)


class WrittenLeakyReLU(nn.Module):
    """`LeakyReLU` or `PReLU` as a choice."""

    def __init__(self, activation: nn.LeakyReLU | nn.PReLU) -> None:
        super().__init__()
        if isinstance(activation, nn.PReLU):  # one slope, or one for each channel
            slopes = activation.weight.detach()
        else:
            slopes = torch.tensor([activation.negative_slope])
        self.slopes = nn.Parameter(slopes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        return torch.where(x > 0, x, x * _of_channels(self.slopes, x))


def _of_channels(numbers: Tensor, x: Tensor) -> Tensor:
    """(C,) or (1,) -> the shape in which it meets the channels of x, (B, C, ...)."""
    return numbers.reshape([-1] + [1] * (x.dim() - 2))


def _normalized(x: Tensor, eps: float) -> Tensor:
    """What is above the mean along the last axis, in units of the deviation.

    The variance is that of centred values: TensorRT 8.5 errs as if it rounded statistics to half precision, whatever it
    is asked for, and a mean of squares less a squared mean loses more than twice as much then (docs/performance.md).
    """
    centred = x - x.mean(-1, keepdim=True)
    return centred / _deviation((centred * centred).mean(-1, keepdim=True), eps)


def _normalized_tokens(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """The same along a token's few numbers, with sums that half precision holds.

    A sum of squares grows with the count and leaves half precision above a variance of 21 for the 3072 numbers of a
    SwinUNETR's last merging. Scaled by about the root of the count, a power of two that rounds nothing, squares and
    sums stay near the variance. The voxels of a channel are too many for that: their squares would vanish instead.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    scale = 2.0 ** -round(math.log2(count) / 2)
    centred = x - (x * scale).sum(axes, keepdim=True) * (1 / (count * scale))
    scaled = centred * scale
    return centred / _deviation((scaled * scaled).sum(axes, keepdim=True) * (1 / (count * scale**2)), eps)


def _deviation(variance: Tensor, eps: float) -> Tensor:
    """Written with the choice that keeps a norm in one piece."""
    return torch.sqrt(torch.where(variance > 0, variance, 0.0) + eps)


_IN_FULL = (*_NORMS, nn.BatchNorm3d, WrittenNorm)


def _replace(network: nn.Module, kinds: _Kinds, replacement: Callable[[Any, str], nn.Module]) -> None:
    """Each module of these kinds replaced by what is made of it and its name; one that is used twice stays one."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if isinstance(module, kinds) and name:
            if module not in made:
                made[module] = replacement(module, name)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, made[module])
