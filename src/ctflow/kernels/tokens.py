"""Layers over tokens in one launch (tokens.cu): the end of a transformer's block and the beginning of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.kernels.forms import CudaForm, cuda_source
from ctflow.kernels.launch import Kernels
from ctflow.networks.operations import EPS, BlockBegin, BlockEnd, LinearLayer

WARP_PARTS = ("halves.cuh", "instructions.cuh", "warp.cuh")  # before kernels of one warp's products
_STEP = 16  # channels that a matrix instruction takes
_MOST_CHANNELS = 128  # of a token; more need more registers than a thread has
_LEAST_CHANNELS = 4  # side by side that a thread has
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class TokenForm:
    """What the source of a launch depends on.

    Attributes:
        channels: Of a token.
        hidden: Of the layer in the middle of a block's end; 0 if no block ends.
        outputs: Of the projection; 0 if there is none.
        kind: "f16" or "bf16".
        whole: Whether tokens are given in float32.
        tiles: Of 16 tokens that a warp has at a time.
        warps: Of a block.
        blocks: That a multiprocessor should hold.
    """

    channels: int
    hidden: int
    outputs: int
    kind: str
    whole: bool
    tiles: int = 1
    warps: int = 8
    blocks: int = 2
    held: bool = False
    degree: int = 5
    unroll: int = 1

    @property
    def shared(self) -> int:
        steps, outs = -(-self.channels // 16), -(-self.outputs // 16)
        return (
            512 * ((steps * steps + 2 * steps * self.hidden // 16 if self.hidden else 0) + steps * outs)
            if self.held
            else 0
        )


@cache
def source_of(form: TokenForm) -> str:
    """CUDA C++ of one launch."""
    values = {
        "C": form.channels,
        "HIDDEN": form.hidden,
        "O": form.outputs,
        "FINISHES": int(form.hidden > 0),
        "PROJECTS": int(form.outputs > 0),
        "BF16": int(form.kind == "bf16"),
        "TOKEN": "float" if form.whole else "unsigned short",
        "TILES": form.tiles,
        "THREADS": 32 * form.warps,
        "BLOCKS": form.blocks,
        "EPS": f"{EPS}f",
        "HELD": int(form.held),
        "DEGREE": form.degree,
        "UNROLL": form.unroll,
    }
    return cuda_source(values, *WARP_PARTS, "tokens.cu")


def packed_layer(weight: Tensor) -> Tensor:
    """(C_out, C_in) -> [16 of C_out][16 of C_in][thread][8], as threads hold them, filled up with zeros.

    Thread 4 g + q has channels 4 q to 4 q + 3 of the input, for two channels of the output: 4 (g // 2) + g % 2 and the
    second after it.
    """
    cout, cin = weight.shape
    whole = functional.pad(weight, (0, -cin % _STEP, 0, -cout % _STEP))
    split = whole.reshape(-(-cout // _STEP), 4, 2, 2, -(-cin // _STEP), 4, 4)
    return split.permute(0, 4, 1, 3, 5, 2, 6).reshape(len(split), -1, 32, 8)


class TokenLayers:
    """The end of a block, the begin of the next one, or both; see `ctflow.networks.operations.Operations.block_end`.

    Args:
        ending: The end, and the places of its block.
        following: The begin.
        dtype: Of the weights.
        kernels: Launches kernels.
    """

    def __init__(
        self,
        ending: tuple[BlockEnd, Tensor | None] | None,
        following: BlockBegin | None,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        self._kernels, self._kind, self._dtype = kernels, _KINDS[dtype], dtype
        self._hidden = self._outputs = 0
        self._back = self._places = None
        weights: list[Tensor] = []
        numbers: list[Tensor] = []
        if ending is not None:
            end, self._back = ending
            (proj, up, down), self._hidden = (
                (packed_layer(layer[0]) for layer in (end.proj, end.up, end.down)),
                len(end.up[0]),
            )
            weights += [proj.flatten(), torch.cat([up, down.transpose(0, 1)], 1).flatten()]
            numbers += [_added(end.proj), *end.norm, _added(end.down), _added(end.up)]
        if following is not None:
            self._places, self._outputs = following.places, len(following.qkv[0])
            weights.append(packed_layer(following.qkv[0]).flatten())
            numbers += [*following.norm, _added(following.qkv)]
        self._weights = torch.cat(weights)
        self._numbers = torch.cat([functional.pad(each.float(), (0, -len(each) % _STEP)) for each in numbers])

    @staticmethod
    def takes(channels: int, dtype: torch.dtype) -> bool:
        """Whether it computes layers of so many channels."""
        return dtype in _KINDS and channels <= _MOST_CHANNELS and channels % _LEAST_CHANNELS == 0

    def __call__(self, tokens: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, C) and the attention's result x (B, places, C) -> float32 tokens and the projection."""
        batch, count, channels = tokens.shape
        form = form_for(channels, self._hidden, self._outputs, self._kind, whole=tokens.dtype == torch.float32)
        out, projected, padding, places = tokens, None, 0, 0
        if form.hidden:
            out = torch.empty((batch, count, channels), dtype=torch.float32, device=tokens.device)
        if form.outputs:
            padding = 0 if self._places is None else len(self._places) - count
            places = count + padding
            projected = torch.empty((batch, places, form.outputs), dtype=self._dtype, device=tokens.device)
        rows = batch * (count + padding)
        blocks = -(-rows // (16 * form.tiles * form.warps))
        self._kernels.cuda(
            cuda_form(form),
            min(blocks, self._kernels.multiprocessors * form.blocks) if form.held else blocks,
            tokens, x, self._back, self._places, self._weights, self._numbers, out, projected,
            batch, count, padding, 0 if x is None else x.shape[1], places,
        )  # fmt: skip
        return out, projected


def form_for(channels: int, hidden: int, outputs: int, kind: str, *, whole: bool) -> TokenForm:
    """The fastest form of those tried."""
    return TokenForm(channels, hidden, outputs, kind, whole, 1, 8, 2 if channels <= 48 else 1)


def cuda_form(form: TokenForm) -> CudaForm:
    """What is compiled."""
    return CudaForm(source_of(form), "compute_tokens", 32 * form.warps, form.shared)


def _added(layer: LinearLayer) -> Tensor:
    weight, added = layer
    return weight.new_zeros(len(weight)) if added is None else added
