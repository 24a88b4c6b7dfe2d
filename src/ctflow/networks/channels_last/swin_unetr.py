"""SwinUNETR with channels last, from a few operations, each of which a GPU kernel can do in one launch.

Volumes are (B, D, H, W, C) and tokens (B, tokens, C), so a voxel's channels are adjacent: convolutions are products
of matrices without any change of layout, and volumes become tokens and tokens volumes without a copy. This
module decides what is materialised; the given `Operations` compute it: `TorchOperations`, the plain reference of all
of them on any device, or the kernels of `ctflow.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctflow.core.volume import Size3
from ctflow.networks.operations import (
    CHANNEL_STEP,
    EPS,
    LOG2E,
    BlockBegin,
    BlockEnd,
    LinearLayer,
    filled_weight,
    spread_weight,
)
from ctflow.networks.swin_windows import columns_of_merging, is_swin_unetr, stage_sizes, stages_of, window_table


class _ResidualBlock:
    """MONAI's `UnetResBlock`, its input given in shares of the channels, which avoids a concatenation.

    Args:
        block: The module.
        shares: Channels of each.
        size: (D, H, W) of its input.
        ops: The operations.
        spread: Whether its one input channel is given as `Operations.spread` does, and also as it is.
    """

    def __init__(self, block: Any, shares: Sequence[int], size: Size3, ops: Any, *, spread: bool = False) -> None:
        self.ops, self.count = ops, math.prod(size)
        first = block.conv1.conv.weight.detach()
        first = spread_weight(first) if spread else filled_weight(first, sum(shares))
        self.first = ops.convolution(first, shares, size)
        width = len(first)
        self.second = ops.convolution(block.conv2.conv.weight.detach(), (width,), size)
        self.beside: list[Tensor] | None = None
        self.channel: Tensor | None = None
        if spread:
            self.channel = block.conv3.conv.weight.detach().flatten().float().to(ops.device)
        elif block.downsample:
            beside = filled_weight(block.conv3.conv.weight.detach().flatten(1), sum(shares))
            self.beside = [
                part.t().contiguous().to(ops.device, ops.dtype) for part in torch.split(beside, list(shares), 1)
            ]

    def __call__(
        self, *shares: Tensor, head: tuple[Tensor, Tensor] | None = None, windows: Tensor | None = None
    ) -> Tensor:
        ops = self.ops
        y, sums = self.first(shares, None)
        y, sums = self.second([y], ops.norm_of(sums, self.count))
        norm = ops.norm_of(sums, self.count)
        if self.channel is not None:
            return cast(Tensor, ops.channel_residual(y, norm, windows, self.channel))
        if self.beside is None:
            return cast(Tensor, ops.residual(y, norm, shares[0]))
        beside = ops.norm_of(ops.pointwise_sums(shares, self.beside), self.count)
        result = ops.pointwise_residual(y, norm, shares, self.beside, beside, head)
        return cast(Tensor, result)


class _UpBlock:
    """MONAI's `UnetrUpBlock`.

    Args:
        block: The module.
        size: (D, H, W) of its output.
        ops: The operations.
    """

    def __init__(self, block: Any, size: Size3, ops: Any) -> None:
        weight = block.transp_conv.conv.weight.detach()
        self.up = ops.upsampling(weight)
        self.block = _ResidualBlock(block.conv_block, (weight.shape[1],) * 2, size, ops)

    def __call__(self, x: Tensor, skip: Tensor, head: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.block(self.up(x), skip, head=head)


class _Block:
    """The parts of MONAI's `SwinTransformerBlock` for one size.

    Args:
        block: The module.
        size: (D, H, W) in tokens.
        ops: The operations.
    """

    def __init__(self, block: Any, size: Size3, ops: Any) -> None:
        table = window_table(size, tuple(block.window_size), tuple(block.shift_size))
        fetch = places = None
        if table.pads or (table.fetch != np.arange(table.tokens)).any():
            padding = np.flatnonzero(table.fetch == table.tokens)
            fetch, places = (
                torch.from_numpy(index.astype(np.int32)).to(ops.device)
                for index in (table.fetch, np.concatenate([table.back, padding]))
            )
        attention, n = block.attn, math.prod(table.length)
        index = attention.relative_position_index[:n, :n].reshape(-1)
        bias = attention.relative_position_bias_table.detach()[index].reshape(n, n, -1).permute(2, 0, 1).contiguous()
        channels = attention.qkv.in_features
        self.attend = ops.attention(bias, table, channels // attention.num_heads)
        scale = torch.ones(3 * channels)
        scale[:channels] = float(attention.scale) * LOG2E
        qkv, shift = attention.qkv.weight.detach(), attention.qkv.bias
        qkv = _layer(qkv * scale[:, None], None if shift is None else shift.detach() * scale, ops)
        proj, up, down = (
            _layer(layer.weight.detach(), layer.bias.detach(), ops)
            for layer in (attention.proj, block.mlp.linear1, block.mlp.linear2)
        )
        norm, second = (
            (norm.weight.detach().to(ops.device), norm.bias.detach().to(ops.device))
            for norm in (block.norm1, block.norm2)
        )
        self.begin = BlockBegin(norm, qkv, fetch, places)
        self.end = BlockEnd(proj, second, up, down)


def _layer(weight: Tensor, shift: Tensor | None, ops: Any) -> LinearLayer:
    return weight.to(ops.device, ops.dtype), None if shift is None else shift.to(ops.device, ops.dtype)


class _Stage:
    """MONAI's `BasicLayer` for one size.

    Args:
        stage: The layer.
        size: (D, H, W) of its input, in tokens.
        ops: The operations.
    """

    def __init__(self, stage: Any, size: Size3, ops: Any) -> None:
        self.ops, self.size = ops, size
        blocks = [_Block(block, size, ops) for block in stage.blocks]
        self.begin = blocks[0].begin
        self.blocks = [
            (block.attend, ops.block_end(block.end, block.begin.places, following))
            for block, following in zip(blocks, [*(block.begin for block in blocks[1:]), None], strict=True)
        ]
        merging = stage.downsample
        columns = columns_of_merging(merging)
        self.reduction = merging.reduction.weight.detach()[:, columns].to(ops.device, ops.dtype)
        self.norm = (
            merging.norm.weight.detach()[columns].to(ops.device),
            merging.norm.bias.detach()[columns].to(ops.device),
        )

    def __call__(self, tokens: Tensor, qkv: Tensor) -> Tensor:
        for attend, finish in self.blocks:
            tokens, qkv = finish(tokens, attend(qkv))
        return functional.linear(self.ops.merge(tokens, self.size, *self.norm), self.reduction)


class ChannelsLastSwinUNETR:
    """A SwinUNETR for windows of one size.

    Args:
        network: MONAI's network, in evaluation mode; `takes_swin_unetr` says which are supported. Is not changed.
        roi: Window size in voxels.
        ops: The operations; have the attributes `dtype` and `device`.
    """

    def __init__(self, network: nn.Module, roi: Size3, ops: Any) -> None:
        net: Any = network
        self.ops, self.roi = ops, roi
        sizes = stage_sizes(network, roi)
        if sizes is None:
            raise ValueError("this network cannot be computed with channels last")
        self.sizes: list[Size3] = [*sizes, _halved(sizes[-1])]
        embed = net.swinViT.patch_embed.proj
        self.stages = [_Stage(stage, size, ops) for stage, size in zip(stages_of(network), sizes, strict=True)]
        layer = _layer(embed.weight.detach().flatten(1), embed.bias.detach(), ops)
        self.embed = ops.embedding(layer, self.stages[0].begin)
        self.begins = [ops.block_begin(stage.begin) for stage in self.stages[1:]]
        self.normalize = bool(net.normalize)
        cin, width = embed.in_channels, embed.out_channels
        self.channels = cin + -cin % CHANNEL_STEP
        self.enter = _ResidualBlock(net.encoder1.layer, (self.channels,), roi, ops, spread=cin == 1)
        encoders = (net.encoder2, net.encoder3, net.encoder4)
        self.encoders = [
            _ResidualBlock(block.layer, (width * 2**level,), size, ops)
            for level, (block, size) in enumerate(zip(encoders, self.sizes[:3], strict=True))
        ]
        self.deepest = _ResidualBlock(net.encoder10.layer, (width * 16,), self.sizes[4], ops)
        decoders = (net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1)
        targets = [*reversed(self.sizes[:4]), roi]
        self.decoders = [_UpBlock(block, size, ops) for block, size in zip(decoders, targets, strict=True)]
        head = net.out.conv.conv
        weight = head.weight.detach().flatten(1).float()
        shift = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().float()
        self.head = (weight.contiguous().to(ops.device), shift.to(ops.device))

    def __call__(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) float32 -> (B, C_out, D, H, W) float32 logits."""
        x = self.ops.spread(windows) if windows.shape[1] == 1 else self.ops.filled(windows, self.channels)
        hidden = self._hidden(windows)
        skips = [
            self.enter(x, windows=windows),
            *(block(h) for block, h in zip(self.encoders, hidden, strict=False)),
            hidden[3],
        ]
        y = self.deepest(hidden[4])
        for up, skip in zip(self.decoders[:-1], reversed(skips[1:]), strict=True):
            y = up(y, skip)
        return self.decoders[-1](y, skips[0], self.head)

    def _hidden(self, windows: Tensor) -> list[Tensor]:
        """The input of each stage and the last output, as volumes."""
        tokens, qkv, first = self.embed(windows)
        found = [first if self.normalize else tokens]
        for stage, begin in zip(self.stages, [*self.begins, None], strict=True):
            tokens = stage(tokens, qkv)
            found.append(self.ops.layer_norm(tokens, None, None, None) if self.normalize else tokens)
            qkv = None if begin is None else begin(tokens)
        return [tokens.reshape(len(tokens), *size, -1) for tokens, size in zip(found, self.sizes, strict=True)]


def _halved(size: Size3) -> Size3:
    return (-(-size[0] // 2), -(-size[1] // 2), -(-size[2] // 2))


def takes_swin_unetr(network: nn.Module, roi: Size3) -> bool:
    """Whether a network is supported: a SwinUNETR of the first version, with patches of 2 and plain norms."""
    if not is_swin_unetr(network):
        return False
    net: Any = network
    sizes = stage_sizes(network, roi)
    if sizes is None or math.prod(_halved(sizes[-1])) == 1 or net.swinViT.use_v2 or net.patch_size != 2:
        return False
    if net.swinViT.patch_embed.norm is not None:
        return False
    if not net.encoder1.layer.downsample:  # the input has as many channels as the first block's output
        return False
    blocks = [net.encoder1.layer, *(net.get_submodule(f"decoder{k}.conv_block") for k in range(1, 6))]
    norms = [block.norm1 for block in blocks]
    return all(_is_plain(norm) for norm in norms)


def _is_plain(norm: nn.Module) -> bool:
    """Whether it is an instance norm of the window alone, as `Operations.norm_of` computes it."""
    if type(norm) is not nn.InstanceNorm3d:
        return False
    return not norm.affine and not norm.track_running_stats and norm.eps == EPS
