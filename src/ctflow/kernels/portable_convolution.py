"""Convolutions of 3 x 3 x 3 and 3 x 1 x 1 by matrix instructions that GPUs have since compute capability 8.0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.machine_code.forms import CudaForm, cuda_source
from ctflow.kernels.machine_code.launch import Kernels

_CHUNK = 16  # channels of the input at a time, which one matrix instruction takes
_TILE_D, _TILE_W = 4, 16
# Of a block; also the height of a tile. On an H200 four warps and two blocks a multiprocessor took 0 to 9 % less time
# (2026-11-30), but 99 KiB hold only one block.
_WARPS = 8
_MOST_COLUMNS = 64  # channels of the output; more need more registers than a thread has, and cuDNN keeps up there
_MOST_OF_ROW = 48  # with which the weights of a whole row of the kernel are held twice
_LEAST_SIDE = 32  # smaller volumes have too few tiles for the multiprocessors
_MOST_SHARES = 2
_PLANES = ((3, 3, 3), (3, 1, 1))  # sizes of a kernel
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class PortableForm:
    """What the source of a launch depends on.

    Attributes:
        cin: Channels of the input.
        first: Those in the first of its tensors: all, or fewer if there are two.
        cout: Channels of the output.
        side: Of the kernel in a plane: 3 or 1.
        kind: "f16" or "bf16".
        normalized: Whether a norm and a leaky ReLU are applied to the input.
    """

    cin: int
    first: int
    cout: int
    side: int
    kind: str
    normalized: bool

    @property
    def places(self) -> int:
        """Places of the kernel's plane whose weights are copied at a time."""
        return self.side if self.cout <= _MOST_OF_ROW else 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: two chunks with their border, weights of two steps, sums of warps."""
        border = self.side - 1
        halo = (_TILE_D + 2) * (_WARPS + border) * (_TILE_W + border)
        pitch = halo + (12 - halo % 8) % 8
        return 2 * 2 * pitch * 16 + 2 * self.places * 3 * _CHUNK * self.cout * 2 + _WARPS * 2 * self.cout * 4


def weights_for_threads(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C_out, C_in, 3, kh, kw) -> [chunk of 16][kh, kw][kd][8 of C_out][thread][4], as threads hold them.

    Thread 4 g + l has, for channel g of 8 of the output, channels 2 l, 2 l + 1, 2 l + 8 and 2 l + 9 of 16 of the input.
    Two times 8 channels of the output lie together, so that a thread reads 16 bytes at once.
    """
    cout, cin, _, kh, kw = weight.shape
    parts = cout // 8
    split = weight.reshape(parts, 8, cin // _CHUNK, 2, 4, 2, 3, kh, kw)
    lanes = split.permute(2, 7, 8, 6, 0, 1, 4, 3, 5).reshape(-1, parts, 32, 4)
    paired = parts // 2 * 2
    pairs = lanes[:, :paired].reshape(len(lanes), paired // 2, 2, 32, 4).transpose(2, 3)
    return torch.cat([pairs.flatten(1), lanes[:, paired:].flatten(1)], 1).to(dtype).contiguous()


def tiles_of(size: Size3) -> int:
    """Tiles of a volume."""
    return -(-size[0] // _TILE_D) * -(-size[1] // _WARPS) * -(-size[2] // _TILE_W)


@cache
def source_of(form: PortableForm) -> str:
    """CUDA C++ of one launch."""
    values = {
        "CIN": form.cin,
        "FIRST": form.first,
        "COUT": form.cout,
        "SIDE": form.side,
        "PLACES": form.places,
        "BF16": int(form.kind == "bf16"),
        "NORMALIZED": int(form.normalized),
    }
    return cuda_source(values, "halves.cuh", "instructions.cuh", "portable_convolution.cu")


class PortableConvolution:
    """A convolution on one GPU, in one launch; see `ctflow.networks.operations.Operations.convolution`.

    Args:
        weight: (C_out, C_in, 3, 3, 3) or (C_out, C_in, 3, 1, 1) float32.
        shares: Channels of each share.
        dtype: Of volumes and weights.
        device: torch device.
        kernels: Launches kernels there.

    Raises:
        ValueError: It does not take such a convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        shares: Sequence[int],
        dtype: torch.dtype,
        device: str,
        kernels: Kernels,
    ) -> None:
        if not self._fits(weight.shape, shares, dtype):
            raise ValueError(f"no convolution from {tuple(shares)} to {len(weight)} channels")
        self._form = PortableForm(
            sum(shares), shares[0], len(weight), weight.shape[-1], _KINDS[dtype], normalized=False
        )
        self._kernels = kernels
        self._weights = weights_for_threads(weight, dtype).to(device)

    @staticmethod
    def takes(weight: Sequence[int], shares: Sequence[int], size: Size3, dtype: torch.dtype) -> bool:
        """Whether it computes a convolution with weights of such a shape, and volumes are large enough for it."""
        return min(size) >= _LEAST_SIDE and PortableConvolution._fits(weight, shares, dtype)

    @staticmethod
    def _fits(weight: Sequence[int], shares: Sequence[int], dtype: torch.dtype) -> bool:
        cout, _, *kernel = weight
        if dtype not in _KINDS or tuple(kernel) not in _PLANES or len(shares) > _MOST_SHARES:
            return False
        return cout <= _MOST_COLUMNS and cout % 8 == 0 and all(cin % _CHUNK == 0 for cin in shares)

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `ctflow.networks.operations.Operations.convolution`; shares are (B, D, H, W, C) without gaps."""
        first, *others = shares
        batch, d, h, w = first.shape[:4]
        form = replace(self._form, normalized=norm is not None)
        out = torch.empty((batch, d, h, w, form.cout), dtype=first.dtype, device=first.device)
        units = tiles_of((d, h, w))
        sums = torch.empty((batch, units, 2, form.cout), dtype=torch.float32, device=first.device)
        tiles = batch * units
        self._kernels.cuda(
            CudaForm(source_of(form), "convolve", 32 * _WARPS, form.shared),
            min(tiles, self._kernels.multiprocessors),
            first, others[0] if others else None, self._weights, None if norm is None else norm.contiguous(),
            out, sums, batch, d, h, w, tiles,
        )  # fmt: skip
        return out, sums
