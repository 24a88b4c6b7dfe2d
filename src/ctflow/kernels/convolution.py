"""Convolutions of 3 x 3 x 3 and 3 x 1 x 1 by Hopper's matrix instructions (convolution.cu): source, weights, launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.forms import CudaForm
from ctflow.kernels.launch import Kernels

_LOADERS = 128  # threads that load
_TILE_W = 8
_STAGES = 4  # planes of the input that are held
_MOST_SHARED = 232448  # bytes of shared memory that a block may have
_MOST_COLUMNS = 192  # of one matrix instruction; with 216 the registers of a thread do not suffice
_LEAST_SIDE = 32  # smaller volumes leave most multiprocessors idle; cuDNN splits them otherwise
_LEAST_CHUNK = 8
# Registers of a thread that multiplies (three or two warp groups, each 8 x 8 voxels) or loads: 65,536 in all.
_MOST_OF_THREE = 48  # channels of the output; more need the registers of a third group
_REGISTERS, _LOADER_REGISTERS = {3: 144, 2: 208}, 80
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def groups_of(cout: int) -> int:
    """Warp groups of a block that multiply."""
    return 3 if cout <= _MOST_OF_THREE else 2


def shared_bytes(cin: int, cout: int, taps: int) -> int:
    """Shared memory of a block: weights, planes, norm, sums and barriers."""
    groups = groups_of(cout)
    plane = cin * (8 * groups + 2) * (_TILE_W + 2) * 2
    return 6 * taps * cin * cout + _STAGES * plane + 8 * cin + groups * 4 * 8 * cout + 16 * _STAGES


def packed_weights(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C_out, C_in, 3, kh, kw) -> [kh, kw][C_in / 8][kd, C_out][8], as a block keeps them in shared memory."""
    cout, cin = weight.shape[:2]
    columns = weight.permute(3, 4, 1, 2, 0).reshape(-1, cin // 8, 8, 3 * cout)
    return columns.permute(0, 1, 3, 2).to(dtype).contiguous()


def units_of(size: Size3, chunk: int, groups: int) -> int:
    """Pieces of a volume that a block computes at a time: columns of a tile, `chunk` planes deep."""
    return -(-size[0] // chunk) * -(-size[1] // (8 * groups)) * -(-size[2] // _TILE_W)


def best_chunk(batch: int, size: Size3, groups: int, blocks: int) -> int:
    """The depth of a piece with which `blocks` at a time are done soonest; each piece reads two planes more."""

    def rounds(chunk: int) -> int:
        return -(-batch * units_of(size, chunk, groups) // blocks) * (chunk + 2)

    return min(range(_LEAST_CHUNK, size[0] + 1), key=rounds)


@cache
def source(cin: int, cout: int, taps: int, kind: str, *, normalized: bool, adds: bool, partial: bool) -> str:
    """CUDA C++ of one share of the input's channels.

    Args:
        cin: Channels of the share.
        cout: Channels of the output.
        taps: Of a plane: 9 or 1.
        kind: "f16" or "bf16".
        normalized: Whether a norm and a leaky ReLU are applied to the input.
        adds: Whether the products of other shares are added.
        partial: Whether others follow: products are stored in float32, without sums.
    """
    groups = groups_of(cout)
    values = {
        "CIN": cin,
        "COUT": cout,
        "TAPS": taps,
        "STAGES": _STAGES,
        "GROUPS": groups,
        "REGISTERS": _REGISTERS[groups],
        "LOADER_REGISTERS": _LOADER_REGISTERS,
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
        weight: (C_out, C_in, 3, 3, 3) or (C_out, C_in, 3, 1, 1) float32.
        shares: Channels of each share.
        dtype: Of volumes and weights.
        device: torch device.
        kernels: Launches kernels there.
    """

    def __init__(
        self, weight: Tensor, shares: Sequence[int], dtype: torch.dtype, device: str, kernels: Kernels
    ) -> None:
        self._cout, self._kind, self._kernels = len(weight), _KINDS[dtype], kernels
        self._taps = weight.shape[3] * weight.shape[4]
        self._weights = [packed_weights(part, dtype).to(device) for part in torch.split(weight, list(shares), 1)]

    @staticmethod
    def takes(weight: Sequence[int], shares: Sequence[int], size: Size3, dtype: torch.dtype) -> bool:
        """Whether it computes a convolution with weights of such a shape, and faster than cuDNN."""
        cout, _, _, rows, columns = weight
        if dtype not in _KINDS or cout % 8 or 3 * cout > _MOST_COLUMNS or min(size) < _LEAST_SIDE:
            return False
        return all(cin % 16 == 0 and shared_bytes(cin, cout, rows * columns) <= _MOST_SHARED for cin in shares)

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `ctflow.networks.operations.Operations.convolution`; shares are (B, D, H, W, C) without gaps."""
        batch, d, h, w = shares[0].shape[:4]
        most, groups = self._kernels.multiprocessors, groups_of(self._cout)
        chunk = best_chunk(batch, (d, h, w), groups, most)
        units = units_of((d, h, w), chunk, groups)
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
        text = source(cin, self._cout, self._taps, self._kind, normalized=normalized, adds=adds, partial=partial)
        return CudaForm(
            text, "convolve", 128 * groups_of(self._cout) + _LOADERS, shared_bytes(cin, self._cout, self._taps)
        )
