"""The operations of channels-last networks on a GPU: our kernels, and cuDNN and cuBLAS where they suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.volume import Size3
from ctflow.kernels.attention import CudaAttention, TritonAttention
from ctflow.kernels.convolution import HopperConvolution
from ctflow.kernels.gathered_convolution import GatheredConvolution
from ctflow.kernels.machine_code.launch import Kernels
from ctflow.kernels.portable_convolution import PortableConvolution
from ctflow.kernels.tokens import TokenLayers
from ctflow.networks.operations import (
    CHANNEL_STEP,
    EPS,
    Affine,
    Attention,
    BlockBegin,
    BlockEnd,
    BlockEnding,
    Convolution,
    LinearLayer,
    around,
    block_begin_by_steps,
    block_end_by_steps,
    embedding_by_steps,
    upsampling_by_torch,
)
from ctflow.networks.swin_windows import WindowTable

_TILE = 4096  # numbers that one program of a pointwise kernel holds
_PARTS = 1056  # programs of a sum: eight for each multiprocessor of an H200
_COLUMNS = 128  # of a product of the upsampling
_MOST_FUSED, _OUTPUTS = 128, 32  # channels whose leaky ReLU and head one program computes; and outputs at a time
_MANY = 100_000  # voxels of a batch, of which enough programs remain if each computes all four pairs of places


class HopperOperations:
    """See `ctflow.networks.operations.Operations`.

    Args:
        dtype: torch.float16, torch.bfloat16, or torch.float32, which is for comparison and takes cuDNN throughout.
        device: torch device.
        kernels: Launches kernels there.
    """

    def __init__(self, dtype: torch.dtype, device: str, kernels: Kernels) -> None:
        self.dtype, self.device, self.kernels = dtype, device, kernels
        self._is_half = dtype.itemsize == 2
        # Channels of a share in a product of one program: more fit neither the registers of a multiprocessor nor, in
        # float32, the shared memory of a block on every GPU.
        self._most_inputs = 128 if self._is_half else 64

    def filled(self, windows: Tensor, channels: int) -> Tensor:
        """See `Operations.filled`."""
        batch, given, *size = windows.shape
        out = torch.empty((batch, *size, channels), dtype=self.dtype, device=windows.device)
        held, voxels = _power(channels), math.prod(size)
        rows = max(_TILE // held, 1)
        self.kernels.triton(
            "fill_channels", (-(-voxels // rows), batch), windows.contiguous(), out, voxels, given, channels, held, rows
        )
        return out

    def spread(self, windows: Tensor) -> Tensor:
        """See `Operations.spread`."""
        batch, _, *size = windows.shape
        out = torch.empty((batch, *size, CHANNEL_STEP), dtype=self.dtype, device=windows.device)
        rows, voxels = _TILE // CHANNEL_STEP, math.prod(size)
        self.kernels.triton(
            "spread_neighbours", (-(-voxels // rows), batch),
            windows.contiguous(), out, voxels, *size[1:], CHANNEL_STEP, CHANNEL_STEP, rows,
        )  # fmt: skip
        return out

    def convolution(self, weight: Tensor, shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> Convolution:
        """Our kernels where they take the channels, one for large volumes and one for small ones, else cuDNN's."""
        if self.normalizes(weight.shape, shares, size, stride):
            return HopperConvolution(weight, shares, size, self.dtype, self.device, self.kernels, stride=stride[0])
        portable = self.kernels.target.portable and stride == (1, 1, 1)
        if portable and PortableConvolution.takes(weight.shape, shares, size, self.dtype):
            return PortableConvolution(weight, shares, self.dtype, self.device, self.kernels)
        gathers = not self.kernels.target.portable and stride == (1, 1, 1)
        if gathers and GatheredConvolution.takes(weight.shape, shares, size, self.dtype):
            gathered = GatheredConvolution(weight, shares, size, self.dtype, self.device, self.kernels)
            return lambda parts, norm: gathered(parts if norm is None else self._activated_shares(parts, norm))
        kept = weight.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last_3d)

        def convolve(parts: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
            x = _joined(parts if norm is None else self._activated_shares(parts, norm))
            y = functional.conv3d(x.movedim(-1, 1), kept, stride=stride, padding=around(weight))
            y = y.movedim(1, -1).contiguous()
            return y, self._sums(y)

        return convolve

    def normalizes(self, weight: Sequence[int], shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> bool:
        """Whether the kernel for large volumes computes it; the portable one applies norms to all shares or to none."""
        return not self.kernels.target.portable and HopperConvolution.takes(weight, shares, size, self.dtype, stride)

    def upsampling(self, weight: Tensor, shift: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """One product for each pair of places that lie side by side, stored there; other strides than 2 by cuDNN."""
        cin, cout, *stride = weight.shape
        if stride != [2, 2, 2]:
            return upsampling_by_torch(weight.to(self.device, self.dtype), shift)
        added = None if shift is None else shift.float().repeat(2).to(self.device)
        kept = weight.to(self.device, self.dtype).permute(0, 2, 3, 4, 1).reshape(cin, 8, cout).contiguous()

        def upsample(x: Tensor) -> Tensor:
            batch, d, h, w, k = x.shape
            out = torch.empty((batch, 2 * d, 2 * h, 2 * w, cout), dtype=x.dtype, device=x.device)
            most, held = min(_power(2 * cout), _COLUMNS), min(_power(k), 64)
            blocks, voxels = -(-2 * cout // most), d * h * w
            rows = 128 if most <= 64 else 64  # 71 instead of 75 us a window from 64 to 32 channels at 128^3
            many = k <= held and batch * voxels >= _MANY
            pairs = 4 if many and self._is_half else 1  # in float32 four take 20 s to compile
            grid = (-(-voxels // rows), 4 // pairs * blocks, batch)
            self.kernels.triton(
                "upsample", grid, x, kept, kept if added is None else added, out,
                voxels, d, h, w, k, 2 * cout, blocks, added is not None, k <= held, pairs, held, most, rows,
                stages=2,
            )  # fmt: skip
            return out

        return upsample

    def attention(self, bias: Tensor, table: WindowTable, width: int) -> Attention:
        """Our CUDA kernel where it takes the window and the head, else Triton's; scores are never stored."""
        if CudaAttention.takes(bias.shape[-1], width, self.dtype, self.kernels.target):
            return CudaAttention(bias, table, width, self.dtype, self.device, self.kernels)
        return TritonAttention(bias, table, width, self.dtype, self.device, self.kernels)

    def norm_of(self, sums: Tensor, count: int, affine: Affine | None = None) -> Tensor:
        """See `Operations.norm_of`."""
        batch, parts, _, channels = sums.shape
        norm = torch.empty((batch, 2, channels), dtype=torch.float32, device=sums.device)
        held = 16
        self.kernels.triton(
            "norm_from_sums", (batch, -(-channels // held)),
            sums, *(affine or (norm, norm)), norm, parts, channels, float(count), EPS,
            affine is not None, held, max(2048 // held, 1), warps=8,
        )  # fmt: skip
        return norm

    def activated(self, x: Tensor, norm: Tensor) -> Tensor:
        """See `Operations.activated`."""
        batch, voxels, channels = len(x), math.prod(x.shape[1:4]), x.shape[-1]
        out, held = torch.empty_like(x), _power(channels)
        rows = max(_TILE // held, 1)
        self.kernels.triton("activate", (-(-voxels // rows), batch), x, norm, out, voxels, channels, held, rows)
        return out

    def activated_head(self, x: Tensor, norm: Tensor, head: tuple[Tensor, Tensor]) -> Tensor:
        """See `Operations.activated_head`."""
        batch, size, channels = len(x), x.shape[1:4], x.shape[-1]
        outputs, voxels, held = len(head[0]), math.prod(size), _power(channels)
        if held > _MOST_FUSED:
            return functional.linear(self.activated(x, norm).float(), *head).movedim(-1, 1).contiguous()
        out = torch.empty((batch, outputs, *size), dtype=torch.float32, device=x.device)
        rows = max(_TILE // held, 16)
        self.kernels.triton(
            "activate_head", (-(-voxels // rows), batch),
            x, norm, *head, out, voxels, channels, outputs, held, min(_power(outputs), _OUTPUTS), rows,
        )  # fmt: skip
        return out

    def pointwise_sums(self, shares: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """See `Operations.pointwise_sums`."""
        x, y, w, other = _two(shares, weights)
        batch, voxels, cout = len(x), math.prod(x.shape[1:4]), w.shape[1]
        if _power(cout) > 64 or _power(x.shape[-1]) > self._most_inputs:
            return self._sums(_pointwise(shares, weights))
        per, parts = _parts_of(voxels, batch, 64)
        sums = torch.empty((batch, parts, 2, cout), dtype=torch.float32, device=x.device)
        self.kernels.triton(
            "sum_pointwise", (parts, batch),
            x, w, y, other, sums, voxels, cout, x.shape[-1], y.shape[-1], per,
            len(shares) > 1, _power(x.shape[-1]), _power(y.shape[-1]), _power(cout), 64,
            stages=4 if self._is_half else 2,
        )  # fmt: skip
        return sums

    def residual(self, x: Tensor, norm: Tensor, other: Tensor) -> Tensor:
        """See `Operations.residual`."""
        return self._residual(x, norm, other, None)

    def channel_residual(self, x: Tensor, norm: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
        """See `Operations.channel_residual`; sums of 16 voxels side by side are those of 16 channels.

        They are added in float64, as in `norm_from_sums`: the variance is a small difference where the mean is large.
        """
        batch, voxels, channels = len(x), math.prod(x.shape[1:4]), x.shape[-1]
        windows = windows.contiguous()
        side = math.gcd(voxels, CHANNEL_STEP)
        sums = self._sums(windows.reshape(batch, 1, 1, -1, side)).sum((1, 3), dtype=torch.float64)
        out, held = torch.empty_like(x), _power(channels)
        rows = max(2 * _TILE // held, 1)  # 41 us a window of 48 channels at 96^3; with half as many 49
        self.kernels.triton(
            "add_channel", (-(-voxels // rows), batch),
            x, norm, windows, sums, weight, out, voxels, channels, EPS, held, rows,
        )  # fmt: skip
        return out

    def _residual(self, x: Tensor, norm: Tensor, other: Tensor, other_norm: Tensor | None) -> Tensor:
        """One launch; see `volume_kernels.add_residual`."""
        batch, voxels, channels = len(x), math.prod(x.shape[1:4]), x.shape[-1]
        out, held = torch.empty_like(x), _power(channels)
        rows = max(_TILE // held, 1)
        self.kernels.triton(
            "add_residual", (-(-voxels // rows), batch),
            x, norm, other, norm if other_norm is None else other_norm, out, voxels, channels,
            other_norm is not None, held, rows,
        )  # fmt: skip
        return out

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
        if _power(x.shape[-1]) > 64 or _power(shares[0].shape[-1]) > self._most_inputs:
            # Few voxels here; a head stands only where they are many and their channels few.
            result = self._residual(x, norm, _pointwise(shares, weights), other_norm)
            return result if head is None else functional.linear(result.float(), *head).movedim(-1, 1).contiguous()
        return self._add_pointwise(x, norm, shares, weights, other_norm, head)

    def layer_norm(self, tokens: Tensor, scale: Tensor | None, shift: Tensor | None, fetch: Tensor | None) -> Tensor:
        """See `Operations.layer_norm`."""
        batch, count, channels = tokens.shape
        places = count if fetch is None else len(fetch)
        out = torch.empty((batch, places, channels), dtype=self.dtype, device=tokens.device)
        held = _power(channels)
        rows = max(_TILE // held // 2, 1)
        self.kernels.triton(
            "normalize_tokens", (-(-places // rows), batch),
            tokens, tokens if fetch is None else fetch, tokens if scale is None else scale,
            tokens if shift is None else shift, out, count, places, channels, EPS,
            fetch is not None, scale is not None, held, rows,
        )  # fmt: skip
        return out

    def merge(self, tokens: Tensor, size: Size3, scale: Tensor, shift: Tensor) -> Tensor:
        """See `Operations.merge`."""
        batch, _, channels = tokens.shape
        count, held = math.prod(-(-length // 2) for length in size), _power(8 * channels)
        out = torch.empty((batch, count, 8 * channels), dtype=self.dtype, device=tokens.device)
        rows = max(_TILE // held, 1)
        self.kernels.triton(
            "merge_tokens", (-(-count // rows), batch),
            tokens, scale, shift, out, *size, channels, EPS, held, rows,
        )  # fmt: skip
        return out

    def add(self, tokens: Tensor, x: Tensor, back: Tensor | None) -> Tensor:
        """See `Operations.add`."""
        batch, count, channels = tokens.shape
        out = torch.empty((batch, count, channels), dtype=torch.float32, device=tokens.device)
        held = _power(channels)
        rows = max(_TILE // held // 2, 1)
        self.kernels.triton(
            "add_tokens", (-(-count // rows), batch),
            tokens, x, tokens if back is None else back, out, count, x.shape[1], channels,
            back is not None, held, rows,
        )  # fmt: skip
        return out

    def block_begin(self, begin: BlockBegin) -> Callable[[Tensor], Tensor]:
        """See `Operations.block_begin`."""
        channels = len(begin.norm[0])
        if not TokenLayers.takes(channels, self.dtype):
            return block_begin_by_steps(self, begin)
        return TokenLayers(None, begin, self.dtype, self.kernels).begin

    def embedding(self, layer: LinearLayer, begin: BlockBegin) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """See `Operations.embedding`."""
        if not TokenLayers.takes(len(layer[0]), self.dtype):
            return embedding_by_steps(self, layer, begin)
        return TokenLayers(None, begin, self.dtype, self.kernels, layer).embed

    def block_end(self, end: BlockEnd, places: Tensor | None, following: BlockBegin | None) -> BlockEnding:
        """See `Operations.block_end`."""
        if not TokenLayers.takes(len(end.norm[0]), self.dtype, len(end.up[0])):
            return block_end_by_steps(self, end, places, following)
        return TokenLayers((end, places), following, self.dtype, self.kernels)

    def _activated_shares(self, shares: Sequence[Tensor], norm: Tensor) -> list[Tensor]:
        """The shares, the last ones, to which the norm belongs, after their leaky ReLU."""
        made, end = list(shares), norm.shape[-1]
        for place in reversed(range(len(made))):
            start = end - made[place].shape[-1]
            if start < 0:
                break
            made[place], end = self.activated(made[place], norm[..., start:end].contiguous()), start
        return made

    def _sums(self, x: Tensor) -> Tensor:
        """(B, parts, 2, C) of a volume."""
        batch, voxels, channels = len(x), math.prod(x.shape[1:4]), x.shape[-1]
        held = min(_power(channels), 64)
        rows = _TILE // held
        per, parts = _parts_of(voxels, batch, rows)
        sums = torch.empty((batch, parts, 2, channels), dtype=torch.float32, device=x.device)
        grid = (parts, batch, -(-channels // held))
        self.kernels.triton("sum_channels", grid, x, sums, voxels, channels, per, held, rows)
        return sums

    def _add_pointwise(
        self,
        z: Tensor,
        norm: Tensor,
        shares: Sequence[Tensor],
        weights: Sequence[Tensor],
        beside: Tensor,
        head: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """One launch; see `volume_kernels.add_pointwise`."""
        batch, channels, size = len(z), z.shape[-1], z.shape[1:4]
        x, y, w, other = _two(shares, weights)
        voxels = math.prod(size)
        rows = 128 if self._is_half and _power(x.shape[-1]) <= 64 else 64  # what shared memory holds twice
        per, parts = _parts_of(voxels, batch, rows)
        outputs = 0 if head is None else len(head[0])
        out = (
            torch.empty_like(z)
            if head is None
            else torch.empty((batch, outputs, *size), dtype=torch.float32, device=z.device)
        )
        self.kernels.triton(
            "add_pointwise", (parts, batch),
            z, norm, x, w, y, other, beside, *(head or (norm, norm)), out, voxels, channels, x.shape[-1], y.shape[-1],
            outputs, per, len(shares) > 1, head is not None,
            _power(x.shape[-1]), _power(y.shape[-1]), _power(channels), rows,
            stages=4 - len(shares) if self._is_half else 2,
        )  # fmt: skip
        return out


def _two(shares: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first and the last share, and their weights."""
    return shares[0], shares[-1], weights[0], weights[-1]


def _joined(shares: Sequence[Tensor]) -> Tensor:
    """All channels side by side; torch joins rows in one launch, volumes in one for each share."""
    if len(shares) == 1:
        return shares[0]
    return torch.cat([x.flatten(0, -2) for x in shares], dim=-1).reshape(*shares[0].shape[:-1], -1)


def _pointwise(shares: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The 1 x 1 x 1 convolution by cuBLAS."""
    y = shares[0].flatten(0, -2) @ weights[0]
    for x, weight in zip(shares[1:], weights[1:], strict=True):
        y = torch.addmm(y, x.flatten(0, -2), weight)
    return y.reshape(*shares[0].shape[:-1], -1)


def _parts_of(voxels: int, batch: int, rows: int) -> tuple[int, int]:
    """Voxels of each part of a sum, a multiple of `rows`, and how many parts there are."""
    per = -(-voxels // max(1, _PARTS // batch))
    per = -(-per // rows) * rows
    return per, -(-voxels // per)


def _power(count: int) -> int:
    """The power of two that holds so many; at least what a matrix instruction takes."""
    return max(16, 1 << (count - 1).bit_length())
