"""Attention within windows: in CUDA for GPUs since compute capability 8.0, in Triton for what that does not take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.kernels.machine_code.forms import CudaForm, KernelTarget, cuda_source
from ctflow.kernels.machine_code.launch import Kernels
from ctflow.networks.operations import LOG2E, regions_of
from ctflow.networks.swin_windows import MASKED, MOST_PATTERNS, WindowTable

_TILE = 16  # queries, keys and channels of a matrix instruction
_ROW = 2 * _TILE  # bytes of a row of queries, keys or values in shared memory; of masks half of them
_NEVER = -30000.0  # score of a key that fills up the last block; float16 holds it
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}
_WARPS = 15  # that compute; with the one that copies they have 128 registers a thread
_UNROLL = 4  # tiles of keys
_MOST_STAGES = 3  # windows in shared memory
_LEAST_AT_WORK = 4  # tasks that lie in shared memory; with fewer the other kernel keeps up

# Triton's kernel: the bias is filled up to a multiple of _KEYS, which the blocks below divide.
_KEYS = 128
# Best of some 30 tried on an H200: 0.10 ms a window image for 343 windows of 343 tokens and 3 heads; the worst 1.0.
_QUERY_BLOCK, _KEY_BLOCK, _TRITON_WARPS, _TRITON_STAGES = 128, 32, 4, 3


@dataclass(frozen=True)
class AttentionForm:
    """What the source of a launch depends on.

    Attributes:
        n: Tokens of a window.
        width: Channels of a head.
        heads: Heads.
        kind: "f16" or "bf16".
        masks: Whether some windows have several regions.
        part: Tiles of queries that a block has.
        stages: Windows in its shared memory.
    """

    n: int
    width: int
    heads: int
    kind: str
    masks: bool
    part: int
    stages: int

    @property
    def tiles(self) -> int:
        """Tiles of a window's queries, and of its keys."""
        return -(-self.n // _TILE)

    @property
    def parts(self) -> int:
        """Of a window's queries."""
        return -(-self.tiles // self.part)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: the bias, windows, the identity and what the warps tell each other."""
        rows = self.tiles * _TILE
        stage = (2 * rows + self.part * _TILE) * _ROW + (rows * _ROW // 2 if self.masks else 0)
        return self.part * _TILE * rows * 2 + self.stages * (stage + 12) + _TILE * _ROW + 8

    def blocks(self, images: int, multiprocessors: int) -> tuple[int, int]:
        """How many blocks share the windows of each part of a head's queries, and of the last, maybe smaller part."""
        last = self.tiles - (self.parts - 1) * self.part
        shares = (multiprocessors * part // (self.heads * self.tiles) for part in (self.part, last))
        full, rest = (max(1, min(images, share)) for share in shares)
        return full, rest


def attention_form(
    n: int, width: int, heads: int, kind: str, target: KernelTarget, *, masks: bool
) -> AttentionForm | None:
    """The form with as much of a window in a block as its shared memory holds with two stages, and then more stages."""
    tiles = -(-n // _TILE)
    parts = 1
    while parts <= tiles:
        part = -(-tiles // parts)
        fitting = [
            form for stages in range(2, _MOST_STAGES + 1)
            if (form := AttentionForm(n, width, heads, kind, masks, part, stages)).shared <= target.shared
        ]  # fmt: skip
        if fitting:
            return fitting[-1]
        parts += 1
    return None


@cache
def attention_source(form: AttentionForm) -> str:
    """CUDA C++ of one launch."""
    values = {
        "N": form.n, "WIDTH": form.width, "HEADS": form.heads, "BF16": int(form.kind == "bf16"),
        "MASKS": int(form.masks), "PART": form.part, "WARPS": _WARPS, "STAGES": form.stages, "UNROLL": _UNROLL,
    }  # fmt: skip
    return cuda_source(values, "halves.cuh", "instructions.cuh", "pipeline.cuh", "attention.cu")


def bias_for_threads(bias: Tensor, rows: int) -> Tensor:
    """(heads, n, n) times log2(e) -> float16 [head][tile of queries][tile of keys][thread][8], as a product takes it.

    Thread 4 g + l has, for key g, queries 2 l, 2 l + 1, 2 l + 8 and 2 l + 9, and then the same of key g + 8.
    Keys that fill up the last tile get a score that is far below every other.

    Args:
        bias: Of queries and keys.
        rows: Queries are filled up with zeros to so many, a multiple of 16.
    """
    heads, n, _ = bias.shape
    tiles = -(-n // _TILE)
    scaled = functional.pad(bias.float() * LOG2E, (0, tiles * _TILE - n), value=_NEVER)
    split = functional.pad(scaled, (0, 0, 0, rows - n)).reshape(heads, rows // _TILE, 2, 4, 2, tiles, 2, 8)
    return split.permute(0, 1, 5, 7, 3, 6, 2, 4).to(torch.float16).contiguous()


def masks_of(table: WindowTable, dtype: torch.dtype) -> Tensor:
    """(windows of several regions, n, 8) rows of keys: zero at a key's own region, `MASKED` times log2(e) elsewhere."""
    own = functional.one_hot(regions_of(table)[_masked_from(table) :].long(), MOST_PATTERNS)
    return torch.where(own > 0, 0.0, MASKED * LOG2E).to(dtype).contiguous()  # 0 has no sign: the kernel looks at it


class CudaAttention:
    """Attention within windows on one GPU, in one launch; see `ctflow.networks.operations.Operations.attention`.

    Args:
        bias: (heads, n, n) float32.
        table: Of the windows.
        width: Channels of a head.
        dtype: Of queries, keys and values.
        device: torch device.
        kernels: Launches kernels there.

    Raises:
        ValueError: It does not take such windows or heads.
    """

    def __init__(
        self, bias: Tensor, table: WindowTable, width: int, dtype: torch.dtype, device: str, kernels: Kernels
    ) -> None:
        heads, n, _ = bias.shape
        masks = masks_of(table, dtype)
        form = None
        if self.takes(n, width, dtype, kernels.target):
            form = attention_form(n, width, heads, _KINDS[dtype], kernels.target, masks=len(masks) > 0)
        if form is None:
            raise ValueError(f"no attention in windows of {n} tokens with heads of {width} channels in {dtype}")
        self._form, self._kernels, self._masked_from = form, kernels, _masked_from(table)
        self._bias = bias_for_threads(bias, form.parts * form.part * _TILE).to(device)
        self._masks = masks.to(device) if form.masks else None

    @staticmethod
    def takes(n: int, width: int, dtype: torch.dtype, target: KernelTarget) -> bool:
        """Whether it computes windows of n tokens with heads of so many channels."""
        if dtype not in _KINDS or width % 4 or not 4 <= width <= _TILE:
            return False
        form = attention_form(n, width, 1, _KINDS[dtype], target, masks=True)
        return form is not None and form.part * form.stages >= min(_LEAST_AT_WORK, form.tiles)

    def __call__(self, qkv: Tensor) -> Tensor:
        """See `Attention`."""
        form = self._form
        batch, places, channels = qkv.shape
        windows = places // form.n
        out = torch.empty((batch, places, channels // 3), dtype=qkv.dtype, device=qkv.device)
        full, last = form.blocks(batch * windows, self._kernels.multiprocessors)
        self._kernels.cuda(
            CudaForm(attention_source(form), "attend_windows", 32 * (_WARPS + 1), form.shared),
            form.heads * ((form.parts - 1) * full + last),
            qkv, self._bias, self._masks, out, batch * windows, windows, self._masked_from, full, last,
        )  # fmt: skip
        return out


class TritonAttention:
    """`token_kernels.attend`: the same in windows and heads of any size, also in float32."""

    def __init__(
        self, bias: Tensor, table: WindowTable, width: int, dtype: torch.dtype, device: str, kernels: Kernels
    ) -> None:
        self.heads, self.n, _ = bias.shape
        self.width, self.kernels, self.masked_from = width, kernels, _masked_from(table)
        self.held = -(-self.n // _KEYS) * _KEYS
        filled = functional.pad(bias.float() * LOG2E, (0, self.held - self.n) * 2, value=_NEVER)
        # A score adds to products of float16 numbers; bfloat16 would be too coarse for it.
        self.bias = filled.to(device, torch.float32 if dtype == torch.float32 else torch.float16).contiguous()
        self.regions = regions_of(table).to(device)

    def __call__(self, qkv: Tensor) -> Tensor:
        """See `Attention`."""
        batch, places, channels = qkv.shape
        windows = places // self.n
        out = torch.empty((batch, places, channels // 3), dtype=qkv.dtype, device=qkv.device)
        held = _power(self.n)
        queries, keys = min(_QUERY_BLOCK, held), min(_KEY_BLOCK, held)
        self.kernels.triton(
            "attend", (batch * windows, self.heads, -(-self.n // queries)),
            qkv, self.bias, self.regions, out, windows, self.heads, self.masked_from, MASKED * LOG2E,
            self.n, self.held, self.width, _power(self.width), queries, keys,
            warps=_TRITON_WARPS, stages=_TRITON_STAGES,
        )  # fmt: skip
        return out


def _masked_from(table: WindowTable) -> int:
    """The first window of several regions; all that follow have several, too."""
    return int(table.counts[0]) if table.regions.any() else sum(table.counts)


def _power(count: int) -> int:
    """The power of two that holds so many; at least what a matrix instruction takes."""
    return max(_TILE, 1 << (count - 1).bit_length())
