"""Convolutions of 3 x 3 x 3 and 3 x 1 x 1 by Hopper's matrix instructions (convolution.cu): source, weights, launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.forms import CudaForm
from ctflow.kernels.launch import Kernels

_LOADERS = 128  # threads that load
_TILE_W = 8
_MOST_STAGES, _LEAST_STAGES = 4, 3  # planes of the input that are held
_MOST_SHARED = 232448  # bytes of shared memory that a block may have
_MOST_COLUMNS = 192  # of one matrix instruction; with 216 the registers of a thread do not suffice
_LEAST_SIDE = 32  # smaller volumes leave most multiprocessors idle; cuDNN splits them otherwise
_LEAST_CHUNK = 8
# Registers of a thread that multiplies (three or two warp groups, each 8 x 8 voxels) or loads: 65,536 in all.
_MOST_OF_THREE = 48  # channels of the output; more need the registers of a third group
_REGISTERS, _LOADER_REGISTERS = {4: 104, 3: 144, 2: 208}, 80
_PLANES = ((3, 3, 3), (3, 1, 1))  # sizes of a kernel
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def groups_of(cout: int) -> int:
    """Warp groups of a block that multiply."""
    return 3 if cout <= _MOST_OF_THREE else 2


def planes_held(cin: int, cout: int, taps: int, groups: int) -> int:
    """How many planes of the input are held; 0 if not even the fewest fit a multiprocessor."""
    fitting = (count for count in range(_MOST_STAGES, _LEAST_STAGES - 1, -1)
               if _bytes_with(cin, cout, taps, groups, count) <= _MOST_SHARED)  # fmt: skip
    return next(fitting, 0)


def shared_bytes(cin: int, cout: int, taps: int, groups: int | None = None) -> int:
    """Shared memory of a block: weights, planes, norm, sums and barriers."""
    groups = groups or groups_of(cout)
    return _bytes_with(cin, cout, taps, groups, planes_held(cin, cout, taps, groups))


def _bytes_with(cin: int, cout: int, taps: int, groups: int, stages: int) -> int:
    plane = cin * (8 * groups + 2) * (_TILE_W + 2) * 2
    return 6 * taps * cin * cout + stages * plane + 8 * cin + groups * 4 * 8 * cout + 16 * stages


@dataclass(frozen=True)
class Division:
    """How a convolution is divided into launches.

    Attributes:
        width: Channels of the output that a launch computes.
        parts: Channels of the input that a launch reads, each a group of shares: one, or two of the same size.
        groups: Warp groups of a block that multiply.
    """

    width: int
    parts: tuple[tuple[int, ...], ...]
    groups: int


def division_of(cout: int, shares: Sequence[int], taps: int, groups: int | None = None) -> Division | None:
    """The division with the fewest launches that a multiprocessor can hold; None if there is none.

    Args:
        cout: Channels of the output.
        shares: Channels of each share of the input.
        taps: Of a plane.
        groups: Of a block, instead of the usual number.
    """
    apart = tuple((share,) for share in shares)
    ways = [(tuple(shares),), apart] if len(shares) == 2 and shares[0] == shares[1] else [apart]
    for pieces in (1, 2):
        width = cout // pieces
        if cout % pieces or width % 8 or 3 * cout > _MOST_COLUMNS:
            continue
        chosen = groups or groups_of(width)
        for parts in ways:
            if all(planes_held(sum(part), width, taps, chosen) for part in parts):
                return Division(width, parts, chosen)
    return None


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


@dataclass(frozen=True)
class LaunchForm:
    """What the source of a launch depends on.

    Attributes:
        cin: Channels of the input that it reads.
        cout: Channels of the output that it computes.
        taps: Of a plane: 9 or 1.
        kind: "f16" or "bf16".
        groups: Warp groups of a block that multiply.
        width: Channels of the output's tensor.
        shares: Tensors that hold the input: 1 or 2.
        normalized: Whether a norm and a leaky ReLU are applied to the input.
        adds: Whether the products of other channels are added.
        partial: Whether others follow: products are stored in float32, without sums.
    """

    cin: int
    cout: int
    taps: int
    kind: str
    groups: int
    width: int
    shares: int = 1
    normalized: bool = False
    adds: bool = False
    partial: bool = False


@cache
def source(form: LaunchForm) -> str:
    """CUDA C++ of one launch."""
    values = {
        "CIN": form.cin,
        "COUT": form.cout,
        "WIDTH": form.width,
        "SHARES": form.shares,
        "TAPS": form.taps,
        "STAGES": planes_held(form.cin, form.cout, form.taps, form.groups),
        "GROUPS": form.groups,
        "REGISTERS": _REGISTERS[form.groups],
        "LOADER_REGISTERS": _LOADER_REGISTERS,
        "BF16": int(form.kind == "bf16"),
        "NORMALIZED": int(form.normalized),
        "ADDS": int(form.adds),
        "PARTIAL": int(form.partial),
    }
    head = "\n".join(f"#define {name} {value}" for name, value in values.items())
    text = files("ctflow.kernels").joinpath("convolution.cu").read_text("utf-8")
    return f"{head}\n{_multiply_source(3 * form.cout, form.kind)}\n{text}"


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

    Each part of a `Division` is a launch of its own, the products so far in float32 between them.

    Args:
        weight: (C_out, C_in, 3, 3, 3) or (C_out, C_in, 3, 1, 1) float32.
        shares: Channels of each share.
        dtype: Of volumes and weights.
        device: torch device.
        kernels: Launches kernels there.
        groups: Warp groups of a block that multiply, instead of the usual number.

    Raises:
        ValueError: A multiprocessor cannot hold it.
    """

    def __init__(
        self,
        weight: Tensor,
        shares: Sequence[int],
        dtype: torch.dtype,
        device: str,
        kernels: Kernels,
        groups: int | None = None,
    ) -> None:
        self._cout, self._kind, self._kernels = len(weight), _KINDS[dtype], kernels
        self._taps = weight.shape[3] * weight.shape[4]
        division = division_of(self._cout, shares, self._taps, groups)
        if division is None:
            raise ValueError(f"no convolution from {tuple(shares)} to {self._cout} channels")
        self._division = division
        rows, columns = division.width, [sum(part) for part in division.parts]
        self._weights = [
            [packed_weights(part, dtype).to(device) for part in torch.split(piece, columns, 1)]
            for piece in torch.split(weight, rows, 0)
        ]

    @staticmethod
    def takes(weight: Sequence[int], shares: Sequence[int], size: Size3, dtype: torch.dtype) -> bool:
        """Whether it computes a convolution with weights of such a shape, and faster than cuDNN."""
        cout, _, *kernel = weight
        if dtype not in _KINDS or tuple(kernel) not in _PLANES or min(size) < _LEAST_SIDE:
            return False
        if any(cin % 16 for cin in shares):
            return False
        return division_of(cout, shares, kernel[1] * kernel[2]) is not None

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `ctflow.networks.operations.Operations.convolution`; shares are (B, D, H, W, C) without gaps."""
        batch, d, h, w = shares[0].shape[:4]
        most, groups, cout = self._kernels.multiprocessors, self._division.groups, self._cout
        chunk = best_chunk(batch, (d, h, w), groups, most)
        units = units_of((d, h, w), chunk, groups)
        like, numbers = shares[0], (batch, d, h, w, chunk, batch * units)
        sums = torch.empty((batch, units, 2, cout), dtype=torch.float32, device=like.device)
        out = before = None
        first = channel = 0
        for number, part in enumerate(self._division.parts):
            given, last = shares[first : first + len(part)], number == len(self._division.parts) - 1
            scale = None if norm is None else norm[..., channel : channel + sum(part)].contiguous()
            first, channel = first + len(part), channel + sum(part)
            out = torch.empty((batch, d, h, w, cout), dtype=like.dtype if last else torch.float32, device=like.device)
            form = LaunchForm(sum(part), self._division.width, self._taps, self._kind, groups, cout, len(part),
                        norm is not None, before is not None, not last)  # fmt: skip
            for piece, weights in enumerate(self._weights):
                start = piece * self._division.width
                self._kernels.cuda(
                    _cuda_form(form), min(batch * units, most),
                    given[0], given[1] if len(given) > 1 else None, weights[number], scale,
                    None if before is None else before[..., start:], out[..., start:], sums[..., start:], *numbers,
                )  # fmt: skip
            before = out
        assert out is not None  # noqa: S101  # there is a share
        return out, sums


def _cuda_form(form: LaunchForm) -> CudaForm:
    shared = shared_bytes(form.cin, form.cout, form.taps, form.groups)
    return CudaForm(source(form), "convolve", 128 * form.groups + _LOADERS, shared)
