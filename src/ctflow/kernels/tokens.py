"""Layers over tokens in one launch (tokens.cu): the end of a transformer's block and the beginning of the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.kernels.machine_code.forms import CudaForm, cuda_source
from ctflow.kernels.machine_code.launch import Kernels
from ctflow.networks.operations import EPS, BlockBegin, BlockEnd, LinearLayer

WARP_PARTS = ("halves.cuh", "instructions.cuh", "warp.cuh")  # before kernels of one warp's products
_STEP = 16  # channels that a matrix instruction takes
_MOST_CHANNELS = 128  # of a token; more need more registers than a thread has
_FEW_CHANNELS = 48
_LEAST_CHANNELS = 4  # side by side that a thread has
_MOST_NUMBERS = 2**31 - 1  # of a tensor in a launch, whose places are 32-bit
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class TokenForm:
    """What the source of a launch depends on.

    Attributes:
        channels: Of a token.
        hidden: Of the layer in the middle of a block's end; 0 if no block ends.
        outputs: Of the projection; 0 if there is none.
        kind: "f16" or "bf16".
        whole: Whether tokens are given in float32; windows are.
        inputs: Channels of the windows whose patches are embedded; 0 if tokens are given.
        tiles: Of 16 tokens that a warp has at a time.
        warps: Of a block.
        blocks: That a multiprocessor should hold.
    """

    channels: int
    hidden: int
    outputs: int
    kind: str
    whole: bool
    inputs: int = 0
    tiles: int = 1
    warps: int = 4
    blocks: int = 3


@cache
def tokens_source(form: TokenForm) -> str:
    """CUDA C++ of one launch."""
    values = {
        "C": form.channels,
        "HIDDEN": form.hidden,
        "O": form.outputs,
        "INPUTS": form.inputs,
        "EMBEDS": int(form.inputs > 0),
        "FINISHES": int(form.hidden > 0),
        "PROJECTS": int(form.outputs > 0),
        "BF16": int(form.kind == "bf16"),
        "WHOLE": int(form.whole),
        "TILES": form.tiles,
        "THREADS": 32 * form.warps,
        "BLOCKS": form.blocks,
    }
    return cuda_source(values, *WARP_PARTS, "tokens.cu", own=f"constexpr float EPS = {EPS}f;")


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
    """The end of a block or an embedding, and the begin of the next block; see `networks.operations.Operations`.

    Args:
        ending: The end, and the places of its block.
        following: The begin.
        dtype: Of the weights.
        kernels: Launches kernels.
        embedding: Of patches.
    """

    def __init__(
        self,
        ending: tuple[BlockEnd, Tensor | None] | None,
        following: BlockBegin | None,
        dtype: torch.dtype,
        kernels: Kernels,
        embedding: LinearLayer | None = None,
    ) -> None:
        self._kernels, self._kind, self._dtype = kernels, _KINDS[dtype], dtype
        self._hidden = self._outputs = self._inputs = 0
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
        if embedding is not None:
            self._inputs = embedding[0].shape[1] // 8
            weights.append(packed_layer(embedding[0]).flatten())
            numbers.append(_added(embedding))
        if following is not None:
            self._places, self._outputs = following.places, len(following.qkv[0])
            weights.append(packed_layer(following.qkv[0]).flatten())
            numbers += [*following.norm, _added(following.qkv)]
        self._weights = torch.cat(weights)
        self._numbers = torch.cat([functional.pad(each.float(), (0, -len(each) % _STEP)) for each in numbers])

    @staticmethod
    def takes(channels: int, dtype: torch.dtype, hidden: int = 0) -> bool:
        """Whether it computes layers of so many channels, and so many between two of them."""
        fits = channels <= _MOST_CHANNELS and channels % _LEAST_CHANNELS == 0 and hidden % _STEP == 0
        return dtype in _KINDS and fits

    def __call__(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, C) and the attention's result x (B, places, C) -> float32 tokens and the projection."""
        batch, count, channels = tokens.shape
        form = form_for(channels, self._hidden, self._outputs, self._kind, whole=tokens.dtype == torch.float32)
        out = torch.empty_like(tokens, dtype=torch.float32)
        projected = self._projected(batch, count, tokens.device) if form.outputs else None
        self._launch(form, (batch, count), tokens, x, out, projected, None, None, (0, 0))
        return out, projected

    def begin(self, tokens: Tensor) -> Tensor:
        """The projection of tokens."""
        batch, count, channels = tokens.shape
        form = form_for(channels, 0, self._outputs, self._kind, whole=tokens.dtype == torch.float32)
        projected = self._projected(batch, count, tokens.device)
        self._launch(form, (batch, count), tokens, None, None, projected, None, None, (0, 0))
        return projected

    def embed(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (B, C_in, D, H, W) float32 -> tokens of their patches, the projection, and normalised tokens."""
        batch, _, *size = windows.shape
        d, h, w = (length // 2 for length in size)
        channels = self._outputs // 3
        form = replace(form_for(channels, 0, self._outputs, self._kind, whole=True), inputs=self._inputs)
        tokens, normalized = (
            torch.empty((batch, d * h * w, channels), dtype=self._dtype, device=windows.device) for _ in range(2)
        )
        projected = self._projected(batch, d * h * w, windows.device)
        given = (windows.contiguous(), None, None, projected, tokens, normalized)
        self._launch(form, (batch, d * h * w), *given, (h, w))
        return tokens, projected, normalized

    def _projected(self, batch: int, count: int, device: torch.device) -> Tensor:
        places = count if self._places is None else len(self._places)
        return torch.empty((batch, places, self._outputs), dtype=self._dtype, device=device)

    def _launch(
        self,
        form: TokenForm,
        shape: tuple[int, int],
        tokens: Tensor,
        x: Tensor | None,
        out: Tensor | None,
        projected: Tensor | None,
        embedded: Tensor | None,
        normalized: Tensor | None,
        plane: tuple[int, int],
    ) -> None:
        batch, count = shape
        places, seen = 0 if projected is None else projected.shape[1], 0 if x is None else x.shape[1]
        padding = max(places - count, 0)
        units = -(-(count + padding) // (16 * form.tiles * form.warps))
        most = max(1, _MOST_NUMBERS // max(max(count, seen) * form.channels, places * form.outputs))
        for start in range(0, batch, most):
            images = slice(start, start + most)
            volumes = (each if each is None else each[images] for each in (out, projected, embedded, normalized))
            self._kernels.cuda(
                cuda_form(form), min(most, batch - start) * units,
                tokens[images], x if x is None else x[images], self._back, self._places, self._weights, self._numbers,
                *volumes, count, padding, seen, places, units, *plane,
            )  # fmt: skip


def form_for(channels: int, hidden: int, outputs: int, kind: str, *, whole: bool) -> TokenForm:
    """The fastest of the forms tried on an H200 (2026-12-01, 48 and 96 channels).

    Two tiles, eight warps, fewer blocks, weights in shared memory and unrolled loops took 2 to 30 % more time.
    """
    return TokenForm(channels, hidden, outputs, kind, whole, blocks=6 if channels <= _FEW_CHANNELS else 3)


def cuda_form(form: TokenForm) -> CudaForm:
    """What is compiled."""
    return CudaForm(tokens_source(form), "compute_tokens", 32 * form.warps, 0)


def _added(layer: LinearLayer) -> Tensor:
    weight, added = layer
    return weight.new_zeros(len(weight)) if added is None else added
