"""Exact rewrites of MONAI's SwinUNETR for one window size: what depends only on the size is computed once.

MONAI recomputes the masks of shifted windows in each forward pass, as (windows, n, n) numbers, and moves tokens with
rolls, pads and permutes. Here both are index tables: tokens are fetched into windows in one gather, sorted so that
windows of the same mask pattern are contiguous, and each of the at most eight patterns adds its own mask to its own
windows; the many windows in the middle, which need none, pay nothing.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctflow.core.volume import Size3
from ctflow.networks.swin_windows import (
    MASKED,
    WindowTable,
    columns_of_merging,
    is_swin_unetr,
    stage_sizes,
    stages_of,
    window_table,
)

REWRITE_VERSION = 4  # part of every stored engine's key: raise it when a rewrite changes what is exported

# Scores of one product, so that an engine that keeps them whole needs at most some 100 MB for each; onnxruntime 1.31
# takes 2.7 GB without a limit, and 0.8 GB with it, in the same time (feature_size 12, window 96, 2 cores).
MOST_SCORES = 24_000_000
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionStyle:
    """How the windows of an attention are computed, to suit the engine.

    Attributes:
        most_scores: Attention scores of a window image that are computed at once; more are done in parts.
        by_pattern: Whether the windows of each mask pattern are a separate product, which adds one small mask to
            all of them and suits caches; else all masked windows are one product, each with its own mask, which is
            fewer and larger operations and suits GPUs.
    """

    most_scores: int
    by_pattern: bool


CPU_ATTENTION = AttentionStyle(MOST_SCORES, by_pattern=True)
GPU_ATTENTION = AttentionStyle(2**40, by_pattern=False)


def rewrite_for_export(network: nn.Module, roi: Size3, attention: AttentionStyle = CPU_ATTENTION) -> nn.Module:
    """A copy of a SwinUNETR that takes windows of one size only and computes the same from fewer operations.

    Args:
        network: In evaluation mode; is not changed.
        roi: Window size in voxels.
        attention: How its attention is computed.

    Returns:
        The copy; or `network` itself if it is not a 3D SwinUNETR with window attention in every stage, or
        does not take this window.

    Source: `monai.networks.nets.swin_unetr` of MONAI 1.6.1.
    """
    if not is_swin_unetr(network):
        return network
    sizes = stage_sizes(network, roi)
    if sizes is None:
        return network
    rewritten: Any = copy.deepcopy(network)
    longest = stages_of(rewritten)[0].blocks[0].attn.relative_position_index
    shared: Any = nn.Module()
    shared.register_buffer("index", longest.to(torch.int32))
    layers = zip(stages_of(rewritten), sizes, strict=True)
    stages = [FixedStage(stage, size, shared, attention) for stage, size in layers]
    rewritten.swinViT = FixedTransformer(rewritten.swinViT, stages)
    result: nn.Module = rewritten.eval()
    return result


class FixedTransformer(nn.Module):
    """MONAI's `SwinTransformer` with its four stages rewritten.

    Args:
        transformer: The module.
        stages: Its stages, each for one size.
    """

    def __init__(self, transformer: Any, stages: list[FixedStage]) -> None:
        super().__init__()
        self.patch_embed: nn.Module = transformer.patch_embed
        self.stages = nn.ModuleList(stages)
        # The second version has a residual convolution before each stage.
        self.residuals = nn.ModuleList(
            getattr(transformer, f"layers{number}c")[0] if transformer.use_v2 else nn.Identity()
            for number in range(1, 5)
        )
        width = int(transformer.patch_embed.proj.out_channels)
        self.norms = nn.ModuleList(nn.LayerNorm(width * 2**n, elementwise_affine=False) for n in range(5))

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """(B, C_in, D, H, W) -> the input of each stage and the last output, normalised over channels if asked."""
        x = self.patch_embed(x)
        found = [x]
        for residual, stage in zip(self.residuals, self.stages, strict=True):
            x = stage(residual(x))
            found.append(x)
        if not normalize:
            return found
        return [
            norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3) for norm, x in zip(self.norms, found, strict=True)
        ]


class FixedStage(nn.Module):
    """MONAI's `BasicLayer` for one size of its input.

    Args:
        stage: The layer.
        size: (D, H, W) of its input, in tokens.
        shared: Holds the index into every relative position table.
        style: How attention is computed.
    """

    def __init__(self, stage: Any, size: Size3, shared: Any, style: AttentionStyle) -> None:
        super().__init__()
        self.size = size
        self.blocks = nn.ModuleList(FixedBlock(block, size, shared, style) for block in stage.blocks)
        self.merging = FixedMerging(stage.downsample, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, 2 C, D / 2, H / 2, W / 2)."""
        # Each block adds to the tokens: in half precision the sum alone is kept in fp32.
        tokens = _at_least_float(x.flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens)
        merged: Tensor = self.merging(tokens)
        return merged


class FixedBlock(nn.Module):
    """MONAI's `SwinTransformerBlock` for one size, on a row of tokens.

    Args:
        block: The block.
        size: (D, H, W) in tokens.
        shared: Holds the index into the relative position table.
        style: How attention is computed.
    """

    fetch: Tensor
    back: Tensor

    def __init__(self, block: Any, size: Size3, shared: Any, style: AttentionStyle) -> None:
        super().__init__()
        table = window_table(size, tuple(block.window_size), tuple(block.shift_size))
        self.norm1: nn.Module = block.norm1
        self.norm2: nn.Module = block.norm2
        self.mlp: nn.Module = block.mlp
        self.attention = FixedAttention(block.attn, table, shared, style)
        self.pads = table.pads
        self.moves = table.pads or bool((table.fetch != np.arange(table.tokens)).any())
        if self.moves:
            self.register_buffer("fetch", torch.from_numpy(table.fetch.astype(np.int32)), persistent=False)
            self.register_buffer("back", torch.from_numpy(table.back.astype(np.int32)), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, C) -> the same."""
        x = self.norm1(tokens)
        if self.moves:
            x = functional.pad(x, (0, 0, 0, 1)) if self.pads else x  # padding is fetched from the last row
            x = x.index_select(1, self.fetch)
        x = self.attention(x)
        if self.moves:
            x = x.index_select(1, self.back)
        tokens = tokens + x
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class FixedAttention(nn.Module):
    """MONAI's `WindowAttention` over windows sorted by mask pattern.

    Args:
        attention: The module.
        table: The stage's windows.
        shared: Holds the index into the relative position table.
        style: How attention is computed.
    """

    regions: Tensor

    def __init__(self, attention: Any, table: WindowTable, shared: Any, style: AttentionStyle) -> None:
        super().__init__()
        self.heads: int = attention.num_heads
        self.n = int(np.prod(table.length))
        self.parts = _attention_parts(table, style, self.heads * self.n**2)
        self.table, self.proj = attention.relative_position_bias_table, attention.proj
        self.qkv = _scaled_queries(attention.qkv, float(attention.scale))
        self.shared = shared
        regions = np.repeat(table.regions, table.counts, axis=0)
        self.masked: npt.NDArray[np.bool_] = np.asarray(regions.any(axis=1))
        # float32, not integers: onnxruntime and TensorRT compare float32 everywhere.
        self.register_buffer("regions", torch.from_numpy(regions.astype(np.float32)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, windows * n, C) -> the same."""
        result: Tensor = self.proj(self._attended(self.qkv(x), self._bias()))
        return result

    def _attended(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """(B, windows * n, 3 C) -> (B, windows * n, C)."""
        batch, places, channels = qkv.shape
        windows, width = places // self.n, channels // (3 * self.heads)
        split = qkv.reshape(batch, windows, self.n, 3, self.heads, width)
        q, k, v = split.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, windows, heads, n, width)
        k = k.transpose(3, 4)
        # The softmax is in fp32 even where the products are not: half precision is too coarse for large scores.
        parts = [
            torch.softmax(self._scores(_at_least_float(q[:, a:b] @ k[:, a:b]), bias, a, b, one), dim=-1).to(v.dtype)
            @ v[:, a:b]
            for a, b, one in self.parts
        ]
        return _joined(parts).transpose(2, 3).reshape(batch, places, self.heads * width)

    def _bias(self) -> Tensor:
        """(heads, n, n): the bias added to the score of two places, by their position."""
        index: Tensor = self.shared.index[: self.n, : self.n]
        bias = _at_least_float(self.table).index_select(0, index.reshape(-1))
        return bias.reshape(self.n, self.n, self.heads).permute(2, 0, 1)

    def _scores(self, products: Tensor, bias: Tensor, first: int, stop: int, one: bool) -> Tensor:
        """(B, windows, heads, n, n) products, or (B, windows, heads, n * n), with the biases of position and region."""
        if not self.masked[first:stop].any():
            return products + bias
        regions = self.regions[first:stop, None]  # (windows, 1, n), of which one may serve all
        regions = regions[0] if one else regions
        mask = torch.where(regions[..., :, None] == regions[..., None, :], 0.0, MASKED)
        # Where each window has its own mask, a sum with the bias of all heads would be a constant many times as large.
        return products + (bias + mask) if one else products + bias + mask


def _attention_parts(table: WindowTable, style: AttentionStyle, scores: int) -> tuple[tuple[int, int, bool], ...]:
    """First and last window of each product, and whether one mask serves all of its windows."""
    most = max(1, style.most_scores // scores)
    bounds = np.cumsum([0, *table.counts]).tolist()
    if style.by_pattern or len(table.counts) <= 2:
        runs = [(start, stop, True) for start, stop in itertools.pairwise(bounds)]
    else:  # the first window of all is never masked, so the first pattern is the one without a mask
        runs = [(0, bounds[1], True), (bounds[1], bounds[-1], False)]
    return tuple(
        (first, min(first + most, stop), one) for start, stop, one in runs for first in range(start, stop, most)
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _at_least_float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALVES else x


def _scaled_queries(qkv: nn.Linear, scale: float) -> nn.Linear:
    """The same layer with the queries' scale in its weights."""
    scaled = copy.deepcopy(qkv)
    with torch.no_grad():
        scaled.weight[: qkv.in_features] *= scale
        if scaled.bias is not None:
            scaled.bias[: qkv.in_features] *= scale
    return scaled


class FixedMerging(nn.Module):
    """MONAI's `PatchMerging` or `PatchMergingV2` on a row of tokens.

    The eight neighbours are taken in the array's order, and the weights are put into that order once.

    Args:
        merging: The module.
        size: (D, H, W) in tokens.
    """

    def __init__(self, merging: Any, size: Size3) -> None:
        super().__init__()
        self.size = size
        columns = columns_of_merging(merging)
        self.norm, self.reduction = copy.deepcopy(merging.norm), copy.deepcopy(merging.reduction)
        with torch.no_grad():
            self.reduction.weight.copy_(self.reduction.weight[:, columns])
            self.norm.weight.copy_(self.norm.weight[columns])
            self.norm.bias.copy_(self.norm.bias[columns])

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, C) -> (B, 2 C, D / 2, H / 2, W / 2), odd sizes rounded up."""
        batch, _, channels = tokens.shape
        d, h, w = self.size
        x = tokens.reshape(batch, d, h, w, channels)
        if d % 2 or h % 2 or w % 2:
            x = functional.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        halves = ((d + 1) // 2, (h + 1) // 2, (w + 1) // 2)
        # Six axes instead of eight: neighbours along W are already adjacent, and some engines take at most eight.
        x = x.reshape(batch * halves[0], 2, halves[1], 2, halves[2], 2 * channels)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, *halves, 8 * channels)
        merged: Tensor = self.reduction(self.norm(x))
        return merged.permute(0, 4, 1, 2, 3)
