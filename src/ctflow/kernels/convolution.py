"""3 x 3 x 3 convolution with Hopper's matrix instructions (convolution.cu): its source, its weights, its launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.forms import CudaForm
from ctflow.kernels.launch import Kernels

_GROUPS = 3  # warp groups that multiply, each 8 x 8 voxels; a fourth would leave them too few registers
_LOADERS = 128  # threads that load
_THREADS = 128 * _GROUPS + _LOADERS
_TILE_H, _TILE_W = 8 * _GROUPS, 8
_STAGES = 4  # planes of the input that are held
_MOST_SHARED = 232448  # bytes of shared memory that a block may have
_MOST_COLUMNS = 192  # of one matrix instruction; with 216 the registers of a thread do not suffice
_LEAST_SIDE = 32  # smaller volumes leave most multiprocessors idle; cuDNN splits them otherwise
_LEAST_CHUNK = 8
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def shared_bytes(cin: int, cout: int) -> int:
    """Shared memory of a block: weights, planes, norm, sums and barriers."""
    plane = cin * (_TILE_H + 2) * (_TILE_W + 2) * 2
    return 54 * cin * cout + _STAGES * plane + 8 * cin + _GROUPS * 4 * 8 * cout + 16 * _STAGES


def packed_weights(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C_out, C_in, 3, 3, 3) -> [kh, kw][C_in / 8][kd, C_out][8], as a block keeps them in shared memory."""
    cout, cin = weight.shape[:2]
    columns = weight.permute(3, 4, 1, 2, 0).reshape(9, cin // 8, 8, 3 * cout)
    return columns.permute(0, 1, 3, 2).to(dtype).contiguous()


def units_of(size: Size3, chunk: int) -> int:
    """Pieces of a volume that a block computes at a time: columns of a tile, `chunk` planes deep."""
    return -(-size[0] // chunk) * -(-size[1] // _TILE_H) * -(-size[2] // _TILE_W)


def best_chunk(batch: int, size: Size3, blocks: int) -> int:
    """The depth of a piece with which `blocks` at a time are done soonest; each piece reads two planes more."""

    def rounds(chunk: int) -> int:
        return -(-batch * units_of(size, chunk) // blocks) * (chunk + 2)

    return min(range(_LEAST_CHUNK, size[0] + 1), key=rounds)


@cache
def source(cin: int, cout: int, kind: str, *, normalized: bool, adds: bool, partial: bool) -> str:
    """CUDA C++ of one share of the input's channels.

    Args:
        cin: Channels of the share.
        cout: Channels of the output.
        kind: "f16" or "bf16".
        normalized: Whether a norm and a leaky ReLU are applied to the input.
        adds: Whether the products of other shares are added.
        partial: Whether others follow: products are stored in float32, without sums.
    """
    values = {
        "CIN": cin,
        "COUT": cout,
        "STAGES": _STAGES,
        "GROUPS": _GROUPS,
        "LOADERS": _LOADERS,
        "BF16": int(kind == "bf16"),
        "NORMALIZED": int(normalized),
        "ADDS": int(adds),
        "PARTIAL": int(partial),
    }
    head = "\n".join(f"#define {name} {value}" for name, value in values.items())
    text = files("ctflow.kernels").joinpath("convolution.cu").read_text("utf-8")
    return f"{head}\n{_multiply_source(3 * cout, kind)}\n{text}"


def _multiply_source(columns: int, kind: str) -> str:
    """One matrix instruction, whose accumulators must each be named: 64 voxels x 16 channels x `columns`."""
    count = columns // 2
    registers = ", ".join(f"%{k}" for k in range(count))
    bound = ", ".join(f'"+f"(acc[{k}])' for k in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    arguments = f"float (&acc)[{count}], unsigned long long a, unsigned long long b"
    return (
        f"__device__ __forceinline__ void multiply({arguments}) {{\n"
        f'  asm volatile("{{{instruction} {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;}}"\n'
        f'               : {bound} : "l"(a), "l"(b));\n}}'
    )


class HopperConvolution:
    """A convolution on one GPU; see `ctflow.networks.operations.Operations.convolution`.

    Each share of the input's channels is a launch of its own, the products so far in float32 between them.

    Args:
        weight: (C_out, C_in, 3, 3, 3) float32.
        shares: Channels of each share.
        dtype: Of volumes and weights.
        device: torch device.
        kernels: Launches kernels there.
    """

    def __init__(
        self, weight: Tensor, shares: Sequence[int], dtype: torch.dtype, device: str, kernels: Kernels
    ) -> None:
        self._cout, self._kind, self._kernels = len(weight), _KINDS[dtype], kernels
        self._weights = [packed_weights(part, dtype).to(device) for part in torch.split(weight, list(shares), 1)]

    @staticmethod
    def takes(cout: int, shares: Sequence[int], size: Size3, dtype: torch.dtype) -> bool:
        """Whether it computes such a convolution, and faster than cuDNN."""
        if dtype not in _KINDS or cout % 8 or 3 * cout > _MOST_COLUMNS or min(size) < _LEAST_SIDE:
            return False
        return all(cin % 16 == 0 and shared_bytes(cin, cout) <= _MOST_SHARED for cin in shares)

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `ctflow.networks.operations.Operations.convolution`; shares are (B, D, H, W, C) without gaps."""
        batch, d, h, w = shares[0].shape[:4]
        most = self._kernels.multiprocessors
        chunk = best_chunk(batch, (d, h, w), most)
        units = units_of((d, h, w), chunk)
        like = shares[0]
        sums = torch.empty((batch, units, 2, self._cout), dtype=torch.float32, device=like.device)
        out = before = None
        for number, (x, weights) in enumerate(zip(shares, self._weights, strict=True)):
            last = number == len(shares) - 1
            out = torch.empty(
                (batch, d, h, w, self._cout), dtype=like.dtype if last else torch.float32, device=like.device
            )
            form = self._form(x.shape[-1], normalized=norm is not None, adds=before is not None, partial=not last)
            numbers = (batch, d, h, w, chunk, batch * units)
            self._kernels.cuda(form, min(batch * units, most), x, weights, norm, before, out, sums, *numbers)
            before = out
        assert out is not None  # noqa: S101  # there is a share
        return out, sums

    def _form(self, cin: int, *, normalized: bool, adds: bool, partial: bool) -> CudaForm:
        text = source(cin, self._cout, self._kind, normalized=normalized, adds=adds, partial=partial)
        return CudaForm(text, "convolve", _THREADS, shared_bytes(cin, self._cout))
