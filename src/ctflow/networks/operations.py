"""The operations of networks with channels last, and their reference in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.volume import Size3
from ctflow.networks.swin_windows import MASKED, WindowTable

CHANNEL_STEP = 16  # input channels are padded with zeros to a multiple of this, which one matrix instruction takes
EPS = 1e-5  # of every norm
SLOPE = 0.01  # of every leaky ReLU
LOG2E = math.log2(math.e)  # queries come multiplied by it: an exponential to base 2 is one instruction of a GPU

Affine = tuple[Tensor, Tensor]  # (C,) float32 scale and shift of a norm
LinearLayer = tuple[Tensor, "Tensor | None"]  # (C_out, C_in) weights and (C_out,) shift
Convolution = Callable[[Sequence[Tensor], "Tensor | None"], tuple[Tensor, Tensor]]
BlockEnding = Callable[[Tensor, Tensor], tuple[Tensor, "Tensor | None"]]


class Attention(Protocol):
    """Attention within windows, prepared for one table of windows."""

    def __call__(self, qkv: Tensor) -> Tensor:
        """(B, windows * n, 3 C) queries times `LOG2E`, keys and values, heads side by side -> (B, windows * n, C)."""


@dataclass(frozen=True, eq=False)
class BlockEnd:
    """What follows the attention of a transformer's block.

    Attributes:
        proj: Of the attention's result, before it is added.
        norm: Of the sum.
        up: Then, before a GELU.
        down: After it.
    """

    proj: LinearLayer
    norm: Affine
    up: LinearLayer
    down: LinearLayer


@dataclass(frozen=True, eq=False)
class BlockBegin:
    """What precedes the attention of a transformer's block.

    Attributes:
        norm: Of the tokens.
        qkv: Then, at their places in windows.
        fetch: (places,) int32, the token of each place; as many as there are tokens names a place of zeros.
        places: int32, the place of each token, and then the places of zeros. Both are None where places are tokens.
    """

    norm: Affine
    qkv: LinearLayer
    fetch: Tensor | None = None
    places: Tensor | None = None


class Operations(Protocol):
    """The operations of the networks in `ctflow.networks.channels_last`.

    Statistics of an instance norm travel as sums, (B, parts, 2, C) float32: the sums and the sums of squares over each
    part of the voxels. A norm is (B, 2, C) float32: scale and shift.
    """

    def filled(self, windows: Tensor, channels: int) -> Tensor:
        """(B, C_in, D, H, W) float32 as a volume of so many channels, the last ones zeros."""

    def spread(self, windows: Tensor) -> Tensor:
        """(B, 1, D, H, W) float32 as a volume of `CHANNEL_STEP` channels: 3 x 3 voxels of each one's plane, and zeros.

        A 3 x 3 x 3 convolution of the windows is one of 3 x 1 x 1 of these channels.
        """

    def convolution(self, weight: Tensor, shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> Convolution:
        """A convolution, its border filled with zeros.

        Args:
            weight: (C_out, C_in, kd, kh, kw) float32, of odd sizes.
            shares: How the input's channels are given: one tensor for each.
            size: (D, H, W) of the input, multiples of the stride.
            stride: Along each axis.

        Returns:
            A function of the shares and of the norm that, with a leaky ReLU, is applied first to the last of them, to
            as many as it has channels for (or None); it returns the volume and its sums.
        """

    def normalizes(self, weight: Sequence[int], shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> bool:
        """Whether `convolution`, of weights of this shape, applies norms while it reads.

        If it does not, what several read is better stored after its norm.
        """

    def upsampling(self, weight: Tensor, shift: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """A transposed convolution with the stride of its kernel: (C_in, C_out, kd, kh, kw) weights, (C_out,) shift."""

    def attention(self, bias: Tensor, table: WindowTable, width: int) -> Attention:
        """Attention of heads of `width` channels with (heads, n, n) `bias`.

        Keys of another region than the query get `MASKED` added.
        """

    def norm_of(self, sums: Tensor, count: int, affine: Affine | None = None) -> Tensor:
        """The instance norm of `count` voxels from their sums, and then its own scale and shift, if it has these."""

    def activated(self, x: Tensor, norm: Tensor) -> Tensor:
        """Leaky ReLU of the normalised volume."""

    def activated_head(self, x: Tensor, norm: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
        """A head's output for the leaky ReLU of the normalised volume, as in `pointwise_residual`."""

    def pointwise_sums(self, shares: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Sums of a 1 x 1 x 1 convolution, which itself is not kept; weights are (C_share, C_out)."""

    def residual(self, x: Tensor, norm: Tensor, other: Tensor) -> Tensor:
        """Leaky ReLU of the normalised volume plus another of the same shape."""

    def channel_residual(self, x: Tensor, norm: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
        """The same, the other being a normalised 1 x 1 x 1 convolution of (B, 1, D, H, W) windows, with (C,) weights.

        Both are float32. Its norm follows from the sums of the windows alone.
        """

    def pointwise_residual(
        self,
        x: Tensor,
        norm: Tensor,
        shares: Sequence[Tensor],
        weights: Sequence[Tensor],
        other_norm: Tensor,
        head: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The same, the other being a normalised 1 x 1 x 1 convolution.

        With a head, (C_out, C) weights and (C_out,) bias in float32, the head's output replaces
        the volume: (B, C_out, D, H, W) float32.
        """

    def layer_norm(self, tokens: Tensor, scale: Tensor | None, shift: Tensor | None, fetch: Tensor | None) -> Tensor:
        """Normalised tokens in half precision, fetched by (places,) indices; `tokens` of them is a place of zeros."""

    def merge(self, tokens: Tensor, size: Size3, scale: Tensor, shift: Tensor) -> Tensor:
        """Eight neighbours side by side, in the array's order, zeros beyond odd sizes, and normalised."""

    def add(self, tokens: Tensor, x: Tensor, back: Tensor | None) -> Tensor:
        """float32 tokens plus their values at (tokens,) places of x."""

    def block_begin(self, begin: BlockBegin) -> Callable[[Tensor], Tensor]:
        """From (B, tokens, C) to (B, places, 3 C) queries, keys and values."""

    def embedding(self, layer: LinearLayer, begin: BlockBegin) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """From (B, C_in, D, H, W) float32 windows to tokens of patches of 2 x 2 x 2 voxels, and what follows these.

        Args:
            layer: Of the patches' numbers, (C, C_in 8).
            begin: Of the first block.

        Returns:
            A function that returns the tokens, `begin` of them, and their layer norm without scale and shift.
        """

    def block_end(self, end: BlockEnd, places: Tensor | None, following: BlockBegin | None) -> BlockEnding:
        """What follows the attention, and what precedes the next one.

        Args:
            end: The layers.
            places: Of the block, as in its `BlockBegin`.
            following: The begin of the next block, if there is one.

        Returns:
            A function of the block's tokens and its attention's result, at places, that returns float32 tokens and
            `following` of them.
        """


class TorchOperations:
    """The operations in plain PyTorch: the reference of every other.

    Args:
        dtype: Of volumes and weights; sums, norms, softmax and the tokens that blocks add to are float32.
        device: torch device.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device

    def filled(self, windows: Tensor, channels: int) -> Tensor:
        """See `Operations.filled`."""
        x = windows.movedim(1, -1).to(self.dtype)
        return functional.pad(x, (0, channels - x.shape[-1])).contiguous()

    def spread(self, windows: Tensor) -> Tensor:
        """See `Operations.spread`."""
        rows, columns = windows.shape[-2:]
        padded = functional.pad(windows[:, 0], (1,) * 4)
        parts = [padded[..., h : h + rows, w : w + columns] for h in range(3) for w in range(3)]
        return functional.pad(torch.stack(parts, -1), (0, CHANNEL_STEP - 9)).to(self.dtype)

    def convolution(self, weight: Tensor, shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> Convolution:
        """See `Operations.convolution`."""
        kept = weight.to(self.device, self.dtype)

        def convolve(parts: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
            x = torch.cat(list(parts), dim=-1) if len(parts) > 1 else parts[0]
            if norm is not None:
                start = x.shape[-1] - norm.shape[-1]
                x = torch.cat([x[..., :start], self.activated(x[..., start:], norm)], dim=-1)
            y = functional.conv3d(x.movedim(-1, 1), kept, stride=stride, padding=around(weight))
            y = y.movedim(1, -1).contiguous()
            return y, self.sums(y)

        return convolve

    def normalizes(self, weight: Sequence[int], shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> bool:
        """Always."""
        return True

    def upsampling(self, weight: Tensor, shift: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """See `Operations.upsampling`."""
        return upsampling_by_torch(weight.to(self.device, self.dtype), shift)

    def attention(self, bias: Tensor, table: WindowTable, width: int) -> Attention:
        """See `Operations.attention`."""
        added, regions = bias.to(self.device), regions_of(table).to(self.device)
        heads, n, _ = bias.shape

        def attend(qkv: Tensor) -> Tensor:
            batch, places, channels = qkv.shape
            split = qkv.reshape(batch, places // n, n, 3, heads, width)
            q, k, v = split.permute(3, 0, 1, 4, 2, 5).float()
            mask = (regions[:, None, :, None] != regions[:, None, None, :]).float() * MASKED
            seen: Tensor = torch.softmax(q @ k.transpose(-1, -2) / LOG2E + added + mask, -1) @ v
            return seen.transpose(2, 3).reshape(batch, places, channels // 3).to(qkv.dtype)

        return attend

    @staticmethod
    def sums(x: Tensor) -> Tensor:
        """(B, ..., C) -> (B, 1, 2, C) sums and sums of squares."""
        flat = x.flatten(1, -2).float()
        return torch.stack([flat.sum(1), flat.square().sum(1)], 1)[:, None]

    def norm_of(self, sums: Tensor, count: int, affine: Affine | None = None) -> Tensor:
        """See `Operations.norm_of`."""
        mean, square = (sums.double().sum(1) / count).unbind(1)
        scale = torch.rsqrt((square - mean * mean).clamp_min(0) + EPS)
        if affine is None:
            return torch.stack([scale, -mean * scale], 1).float()
        scale = scale * affine[0]
        return torch.stack([scale, affine[1] - mean * scale], 1).float()

    def activated(self, x: Tensor, norm: Tensor) -> Tensor:
        """See `Operations.activated`."""
        return functional.leaky_relu(_normalized(x, norm), SLOPE).to(x.dtype)

    def activated_head(self, x: Tensor, norm: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
        """See `Operations.activated_head`."""
        y = functional.leaky_relu(_normalized(x, norm), SLOPE)
        return functional.linear(y, *head).movedim(-1, 1).contiguous()

    def pointwise_sums(self, shares: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """See `Operations.pointwise_sums`."""
        return self.sums(_pointwise(shares, weights))

    def residual(self, x: Tensor, norm: Tensor, other: Tensor) -> Tensor:
        """See `Operations.residual`."""
        return functional.leaky_relu(_normalized(x, norm) + other.float(), SLOPE).to(x.dtype)

    def channel_residual(self, x: Tensor, norm: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
        """See `Operations.channel_residual`."""
        other = windows.movedim(1, -1) * weight
        return self.residual(x, norm, _normalized(other, self.norm_of(self.sums(other), other[0, ..., 0].numel())))

    def pointwise_residual(
        self,
        x: Tensor,
        norm: Tensor,
        shares: Sequence[Tensor],
        weights: Sequence[Tensor],
        other_norm: Tensor,
        head: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """See `Operations.pointwise_residual`."""
        other = _normalized(_pointwise(shares, weights), other_norm)
        y = functional.leaky_relu(_normalized(x, norm) + other, SLOPE)
        return y.to(x.dtype) if head is None else functional.linear(y, *head).movedim(-1, 1).contiguous()

    def layer_norm(self, tokens: Tensor, scale: Tensor | None, shift: Tensor | None, fetch: Tensor | None) -> Tensor:
        """See `Operations.layer_norm`."""
        y = functional.layer_norm(tokens.float(), tokens.shape[-1:], scale, shift, EPS).to(self.dtype)
        return y if fetch is None else functional.pad(y, (0, 0, 0, 1)).index_select(1, fetch)

    def merge(self, tokens: Tensor, size: Size3, scale: Tensor, shift: Tensor) -> Tensor:
        """See `Operations.merge`."""
        batch, _, channels = tokens.shape
        d, h, w = (length + length % 2 for length in size)
        x = tokens.reshape(batch, *size, channels)
        x = functional.pad(x, (0, 0, 0, w - size[2], 0, h - size[1], 0, d - size[0]))
        x = x.reshape(batch, d // 2, 2, h // 2, 2, w // 2, 2 * channels).permute(0, 1, 3, 5, 2, 4, 6)
        return self.layer_norm(x.reshape(batch, -1, 8 * channels), scale, shift, None)

    def add(self, tokens: Tensor, x: Tensor, back: Tensor | None) -> Tensor:
        """See `Operations.add`."""
        return tokens.float() + (x if back is None else x.index_select(1, back)).float()

    def block_begin(self, begin: BlockBegin) -> Callable[[Tensor], Tensor]:
        """See `Operations.block_begin`."""
        return block_begin_by_steps(self, begin)

    def embedding(self, layer: LinearLayer, begin: BlockBegin) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """See `Operations.embedding`."""
        return embedding_by_steps(self, layer, begin)

    def block_end(self, end: BlockEnd, places: Tensor | None, following: BlockBegin | None) -> BlockEnding:
        """See `Operations.block_end`."""
        return block_end_by_steps(self, end, places, following)


def filled_weight(weight: Tensor, channels: int) -> Tensor:
    """Weights with zeros for the input channels that follow their own."""
    missing = channels - weight.shape[1]
    return torch.cat([weight, weight.new_zeros((len(weight), missing, *weight.shape[2:]))], 1) if missing else weight


def spread_weight(weight: Tensor) -> Tensor:
    """(C_out, 1, 3, 3, 3) weights as those of 3 x 1 x 1 for the channels of `Operations.spread`."""
    taps = weight[:, 0].flatten(2).movedim(2, 1)[..., None, None]
    return filled_weight(taps, CHANNEL_STEP)


def upsampling_by_torch(weight: Tensor, shift: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`Operations.upsampling` of any stride, with weights of the volume's type on its device."""
    added = None if shift is None else shift.to(weight.device, weight.dtype)

    def upsample(x: Tensor) -> Tensor:
        y = functional.conv_transpose3d(x.movedim(-1, 1), weight, added, stride=weight.shape[2:])
        return y.movedim(1, -1).contiguous()

    return upsample


def around(weight: Tensor) -> tuple[int, ...]:
    """Zeros around the input with which a convolution keeps its size."""
    return tuple(length // 2 for length in weight.shape[2:])


def block_begin_by_steps(ops: Operations, begin: BlockBegin) -> Callable[[Tensor], Tensor]:
    """`Operations.block_begin`, step by step."""
    return lambda tokens: functional.linear(ops.layer_norm(tokens, *begin.norm, begin.fetch), *begin.qkv)


def embedding_by_steps(
    ops: Operations, layer: LinearLayer, begin: BlockBegin
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`Operations.embedding`, step by step."""
    project = block_begin_by_steps(ops, begin)

    def embed(windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, d, h, w = windows.shape
        split = windows.to(layer[0].dtype).reshape(batch, channels, d // 2, 2, h // 2, 2, w // 2, 2)
        # A patch as a row: channel first, the layout of the embedding's weights.
        patches = split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, 8 * channels)
        tokens = functional.linear(patches, *layer)
        return tokens, project(tokens), ops.layer_norm(tokens, None, None, None)

    return embed


def block_end_by_steps(
    ops: Operations, end: BlockEnd, places: Tensor | None, following: BlockBegin | None
) -> BlockEnding:
    """`Operations.block_end`, step by step."""
    begin = None if following is None else block_begin_by_steps(ops, following)

    def finish(tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        back = None if places is None else places[: tokens.shape[1]]
        tokens = ops.add(tokens, functional.linear(x, *end.proj), back)
        x = functional.gelu(functional.linear(ops.layer_norm(tokens, *end.norm, None), *end.up))
        tokens = ops.add(tokens, functional.linear(x, *end.down), None)
        return tokens, None if begin is None else begin(tokens)

    return finish


def regions_of(table: WindowTable) -> Tensor:
    """(windows, n) int32: the region of each place; the first windows of a table have one region only."""
    return torch.from_numpy(np.repeat(table.regions, table.counts, axis=0).astype(np.int32))


def _normalized(x: Tensor, norm: Tensor) -> Tensor:
    return x.float() * norm[:, None, None, None, 0] + norm[:, None, None, None, 1]


def _pointwise(shares: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """(B, D, H, W, C_out) float32."""
    products = [x.float() @ weight.float() for x, weight in zip(shares, weights, strict=True)]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]
