"""Eight-bit floating point (e4m3): how a convolution's weights and inputs are rounded to it, and its plain reference.

An input is multiplied with a power of two, the same for all of a tensor, and rounded; weights are divided by a
factor of their output channel and rounded. Sums are float32 and are multiplied with that factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.volume import Size3
from ctflow.networks.operations import SLOPE, Convolution, TorchOperations

LARGEST = 448.0  # of e4m3
_AIM = 8  # the largest input of the calibration becomes at most 2 ** 8: another CT may have one 1.75 times as large
_MOST = 64  # of an exponent; float32 holds 2 ** 64

Takes = Callable[[Sequence[int], Sequence[int], Size3], bool]


def exponent_of(largest: float) -> int:
    """The power of two that a tensor is multiplied with, from the largest value that the calibration saw.

    A power of two leaves the numbers as they are, and hardly depends on the machine that calibrated.
    """
    if not 0 < largest < math.inf:
        return 0
    return max(-_MOST, min(_MOST, _AIM - math.ceil(math.log2(largest))))


def rounded_input(x: Tensor, exponent: int) -> Tensor:
    """A tensor in e4m3; what is too large becomes the largest number, and NaN stays NaN."""
    return (x.float() * 2.0**exponent).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """Weights in e4m3.

    Attributes:
        values: (C_out, C_in, 3, 3, 3) e4m3.
        factors: (C_out,) float32: what the sums of each output channel are multiplied with.
    """

    values: Tensor
    factors: Tensor


def rounded_weights(weight: Tensor, shares: Sequence[int], exponents: Sequence[int]) -> RoundedWeights:
    """Weights for inputs that are multiplied with powers of two, which the weights undo.

    Args:
        weight: (C_out, C_in, 3, 3, 3) float32.
        shares: Channels of each share of the input.
        exponents: Of each share.
    """
    powers = [torch.full((share,), 2.0**-exponent) for share, exponent in zip(shares, exponents, strict=True)]
    undoing = weight.detach().float().cpu() * torch.cat(powers)[:, None, None, None]
    factors = undoing.flatten(1).abs().amax(1) / LARGEST
    factors = torch.where(factors > 0, factors, 1.0)
    values = (undoing / factors[:, None, None, None, None]).clamp(-LARGEST, LARGEST)
    return RoundedWeights(values.to(torch.float8_e4m3fn), factors)


def convolve_rounded(parts: Sequence[Tensor], exponents: Sequence[int], weights: RoundedWeights) -> Tensor:
    """The convolution in plain PyTorch: the reference of the kernel.

    Args:
        parts: (B, D, H, W, C) of each share, normalised and rectified.
        exponents: Of each share.
        weights: On the same device.

    Returns:
        (B, D, H, W, C_out) float32.
    """
    x = torch.cat([rounded_input(part, each).float() for part, each in zip(parts, exponents, strict=True)], -1)
    y = functional.conv3d(x.movedim(-1, 1), weights.values.float(), padding=1).movedim(1, -1)
    return (y * weights.factors).contiguous()


def activated_in_full(x: Tensor, norm: Tensor) -> Tensor:
    """Leaky ReLU of the normalised volume in float32: it is rounded once, to e4m3."""
    y = x.float() * norm[:, None, None, None, 0] + norm[:, None, None, None, 1]
    return functional.leaky_relu(y, SLOPE)


class RecordingOperations(TorchOperations):
    """The reference operations, which also note how large the inputs of some convolutions are.

    Args:
        dtype: See `TorchOperations`.
        device: torch device.
        takes: Whether a convolution's inputs are noted: of its weights' shape, its shares and its volume's size.
    """

    def __init__(self, dtype: torch.dtype, device: str, takes: Takes) -> None:
        super().__init__(dtype, device)
        self._takes = takes
        # Of each such convolution, in the order in which they are made: channels and largest value of each share.
        self.channels: list[tuple[int, ...]] = []
        self.largest: list[list[float]] = []

    def convolution(self, weight: Tensor, shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> Convolution:
        """See `Operations.convolution`."""
        inner = super().convolution(weight, shares, size, stride)
        if stride != (1, 1, 1) or not self._takes(weight.shape, shares, size):
            return inner
        largest = [0.0] * len(shares)
        self.channels.append(tuple(shares))
        self.largest.append(largest)

        def convolve(parts: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
            for number, part in enumerate(_inputs(parts, norm)):
                value = float(part.abs().amax())
                largest[number] = value if math.isnan(value) else max(largest[number], value)  # NaN stays
            return inner(parts, norm)

        return convolve


class RoundingOperations(TorchOperations):
    """The reference operations with some convolutions in e4m3: what the kernels compute.

    Args:
        dtype: See `TorchOperations`.
        device: torch device.
        takes: As in `RecordingOperations`.
        exponents: Of each share of each such convolution.
    """

    def __init__(self, dtype: torch.dtype, device: str, takes: Takes, exponents: Sequence[Sequence[int]]) -> None:
        super().__init__(dtype, device)
        self._takes, self._exponents = takes, iter(exponents)

    def convolution(self, weight: Tensor, shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> Convolution:
        """See `Operations.convolution`."""
        if stride != (1, 1, 1) or not self._takes(weight.shape, shares, size):
            return super().convolution(weight, shares, size, stride)
        exponents = next(self._exponents)
        made = rounded_weights(weight, shares, exponents)
        kept = RoundedWeights(made.values.to(self.device), made.factors.to(self.device))

        def convolve(parts: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
            y = convolve_rounded(_inputs(parts, norm), exponents, kept)
            return y.to(self.dtype), self.sums(y)

        return convolve


def _inputs(parts: Sequence[Tensor], norm: Tensor | None) -> Sequence[Tensor]:
    """What is rounded: the shares, normalised and rectified where there is a norm, which is one of all channels."""
    if norm is None:
        return parts
    widths = [part.shape[-1] for part in parts]
    norms = torch.split(norm, widths, -1)
    return [activated_in_full(part, own) for part, own in zip(parts, norms, strict=True)]
