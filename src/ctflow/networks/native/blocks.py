"""The blocks that MONAI's 3D networks share, with the names of its parameters, for inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SLOPE = 0.01  # of MONAI's leaky ReLU
_NORMS: Mapping[str, frozenset[str]] = {
    "instance": frozenset({"affine", "eps"}),
    "batch": frozenset({"affine", "eps"}),
    "group": frozenset({"num_groups", "affine", "eps"}),
}


def named(kind: Any) -> tuple[str, dict[str, Any]]:
    """A layer's kind in lower case and its arguments, of a name or a pair as MONAI takes them; else ("", {})."""
    name, arguments = kind if isinstance(kind, list | tuple) and len(kind) == 2 else (kind, {})
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return "", {}
    return name.lower(), dict(arguments)


def takes_norm(kind: Any) -> bool:
    """Whether `norm` makes this kind."""
    name, arguments = named(kind)
    if name == "group" and not isinstance(arguments.get("num_groups"), int):
        return False
    return name in _NORMS and arguments.keys() <= _NORMS[name]


def norm(kind: Any, channels: int) -> nn.Module:
    """A normalization of MONAI's name, or of its name and arguments."""
    name, arguments = named(kind)
    if name == "group":
        return nn.GroupNorm(num_channels=channels, **arguments)
    return (nn.InstanceNorm3d if name == "instance" else nn.BatchNorm3d)(channels, **arguments)


def convolution(cin: int, cout: int, kernel: int, *, bias: bool = False) -> nn.Sequential:
    """A convolution that keeps the size, in the container that MONAI's `Convolution` is."""
    return _contained(nn.Conv3d(cin, cout, kernel, padding=kernel // 2, bias=bias))


def upsampling(cin: int, cout: int, factor: int) -> nn.Sequential:
    """A transposed convolution whose kernel is its stride."""
    return _contained(nn.ConvTranspose3d(cin, cout, factor, stride=factor, bias=False))


def _contained(layer: nn.Module) -> nn.Sequential:
    container = nn.Sequential()
    container.add_module("conv", layer)
    return container


class UnetResBlock(nn.Module):
    """Two convolutions beside an identity, or beside a convolution of one voxel if the channels change."""

    def __init__(self, cin: int, cout: int, kind: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = convolution(cin, cout, 3), convolution(cout, cout, 3)
        self.lrelu = nn.LeakyReLU(SLOPE, inplace=True)
        self.norm1, self.norm2 = norm(kind, cout), norm(kind, cout)
        self.downsample = cin != cout
        if self.downsample:
            self.conv3, self.norm3 = convolution(cin, cout, 1), norm(kind, cout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, C_out, D, H, W)."""
        y = self.lrelu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.norm3(self.conv3(x)) if self.downsample else x
        result: Tensor = self.lrelu(y)
        return result


class UnetrBasicBlock(nn.Module):
    """MONAI's container of a residual block."""

    def __init__(self, cin: int, cout: int, kind: Any) -> None:
        super().__init__()
        self.layer = UnetResBlock(cin, cout, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, C_out, D, H, W)."""
        result: Tensor = self.layer(x)
        return result


class UnetrUpBlock(nn.Module):
    """Twice the size, joined with the encoder's volume of that size."""

    def __init__(self, cin: int, cout: int, kind: Any) -> None:
        super().__init__()
        self.transp_conv = upsampling(cin, cout, 2)
        self.conv_block = UnetResBlock(2 * cout, cout, kind)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, C_in, D, H, W) and (B, C_out, 2 D, 2 H, 2 W) -> the latter's shape."""
        result: Tensor = self.conv_block(torch.cat((self.transp_conv(x), skip), dim=1))
        return result


class UnetOutBlock(nn.Module):
    """The logits of each voxel."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = convolution(cin, cout, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, C_out, D, H, W)."""
        result: Tensor = self.conv(x)
        return result
