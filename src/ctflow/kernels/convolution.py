"""Convolutions of 3 x 3 x 3 and 3 x 1 x 1 by Hopper's matrix instructions (convolution.cu): source, weights, launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.machine_code.forms import CudaForm, cuda_source
from ctflow.kernels.machine_code.launch import Kernels

SHARED_PARTS = ("halves.cuh", "pipeline.cuh", "convolution.cuh")  # before the kernels for Hopper
WARP_GROUP = 128  # threads
TILE_W = 8
_MOST_STAGES, _LEAST_STAGES = 4, 3  # planes of the input that are held
MOST_SHARED = 232448  # bytes of shared memory that a block may have
_MOST_COLUMNS = 192  # of one matrix instruction; with 216 the registers of a thread do not suffice
_LEAST_SIDE = 32  # smaller volumes leave most multiprocessors idle; cuDNN splits them otherwise
_LEAST_CHUNK = 8
_MOST_OF_THREE = 48  # channels of the output; more need the registers of a third group
_FEW = 32  # channels of the output, with whose products one group that loads does not keep up
_REGISTERS, _MOST_REGISTERS = 65536, 232  # of a multiprocessor; of a thread that multiplies
_LOADER_REGISTERS = {4: 64, 3: 80, 2: 80, 1: 56}  # of a thread that loads, by the groups that multiply
_LOADER_REGISTERS_OF_TWO = 120  # with a stride of 2, whose planes are four times as large
_PLANES = ((3, 3, 3), (3, 1, 1))  # sizes of a kernel
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class WarpGroups:
    """The warp groups of a block.

    Attributes:
        groups: Warp groups that multiply, each a tile of 8 x 8 voxels.
        loaders: Warp groups that load, in turn a plane each.
        held: Blocks that a multiprocessor holds at a time.
    """

    groups: int
    loaders: int = 1
    held: int = 1


def block_for(cout: int, taps: int, height: int, stride: int = 1) -> WarpGroups:
    """The fastest block of those tried on an H200 (2026-11-30, volumes of 48 to 128 voxels a side).

    Few channels are soon multiplied, so that several groups have to load; tiles should not reach far beyond the volume.

    Args:
        cout: Channels of the output that a launch computes.
        taps: Of a plane.
        height: Of the output.
        stride: Along each axis.
    """
    if stride > 1:
        return WarpGroups(1, 2)
    if taps == 1:
        return WarpGroups(1, held=3) if cout <= _FEW else WarpGroups(2)
    groups = 3 if cout <= _MOST_OF_THREE and -(-height // 24) * 24 <= -(-height // 16) * 16 else 2
    if cout <= _FEW:
        return WarpGroups(groups, 5 - groups)
    return WarpGroups(groups, 2 if cout <= _MOST_OF_THREE and groups == 2 else 1)


def registers_of(block: WarpGroups, stride: int = 1) -> tuple[int, int]:
    """Registers of a thread that multiplies and of one that loads, of those that a block gets when it starts.

    Threads that want more than the block has would wait for ever.
    """
    warp_groups = block.groups + block.loaders
    each = min(_REGISTERS // (WARP_GROUP * warp_groups * block.held) // 8 * 8, _MOST_REGISTERS)
    loading = _LOADER_REGISTERS[block.groups] if stride == 1 else _LOADER_REGISTERS_OF_TWO
    multiplying = (each * warp_groups - block.loaders * loading) // block.groups // 8 * 8
    return min(multiplying, _MOST_REGISTERS), loading


def planes_held(cin: int, cout: int, taps: int, groups: int, stride: int = 1) -> int:
    """How many planes of the input are held; 0 if not even the fewest fit a multiprocessor."""
    fitting = (count for count in range(_MOST_STAGES, _LEAST_STAGES - 1, -1)
               if _bytes_with(cin, cout, taps, groups, count, stride) <= MOST_SHARED)  # fmt: skip
    return next(fitting, 0)


def shared_bytes(cin: int, cout: int, taps: int, groups: int, stride: int = 1) -> int:
    """Shared memory of a block: weights, planes, norm, sums and barriers."""
    return _bytes_with(cin, cout, taps, groups, planes_held(cin, cout, taps, groups, stride), stride)


def _bytes_with(cin: int, cout: int, taps: int, groups: int, stages: int, stride: int) -> int:
    side = 3 if taps > 1 else 1
    voxels = (stride * (8 * groups - 1) + side) * (stride * (TILE_W - 1) + side)
    plane = cin * (voxels + (12 - voxels % 8) % 8) * 2  # rows of channels begin in other banks
    return 6 * taps * cin * cout + stages * plane + 8 * cin + groups * 4 * 8 * cout + 16 * stages


@dataclass(frozen=True)
class Division:
    """How a convolution is divided into launches.

    Attributes:
        width: Channels of the output that a launch computes.
        parts: Channels of the input that a launch reads, each a group of shares: one, or two of the same size.
        block: Of every launch.
    """

    width: int
    parts: tuple[tuple[int, ...], ...]
    block: WarpGroups


def division_of(
    cout: int, shares: Sequence[int], taps: int, height: int, stride: int = 1, block: WarpGroups | None = None
) -> Division | None:
    """The division with the fewest launches that a multiprocessor can hold; None if there is none.

    Args:
        cout: Channels of the output.
        shares: Channels of each share of the input.
        taps: Of a plane.
        height: Of the output.
        stride: Along each axis.
        block: Instead of the usual one.
    """
    apart = tuple((share,) for share in shares)
    ways = [(tuple(shares),), apart] if len(shares) == 2 and shares[0] == shares[1] else [apart]
    for pieces in (1, 2):
        width = cout // pieces
        if cout % pieces or width % 8 or 3 * cout > _MOST_COLUMNS:
            continue
        chosen = block or block_for(width, taps, height, stride)
        for parts in ways:
            if all(planes_held(sum(part), width, taps, chosen.groups, stride) for part in parts):
                return Division(width, parts, chosen)
    return None


def packed_weights(weight: Tensor, dtype: torch.dtype, stride: int = 1) -> Tensor:
    """(C_out, C_in, 3, kh, kw) -> [kh, kw][C_in / 8][kd, C_out][8], as a block keeps them in shared memory.

    With a stride of 2 the middle depth is the last one.
    """
    cout, cin = weight.shape[:2]
    weight = weight if stride == 1 else weight[:, :, [0, 2, 1]]
    columns = weight.permute(3, 4, 1, 2, 0).reshape(-1, cin // 8, 8, 3 * cout)
    return columns.permute(0, 1, 3, 2).to(dtype).contiguous()


def units_of(size: Size3, chunk: int, groups: int) -> int:
    """Pieces of a volume that a block computes at a time: columns of a tile, `chunk` planes deep."""
    return -(-size[0] // chunk) * -(-size[1] // (8 * groups)) * -(-size[2] // TILE_W)


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
        block: How a block is made up.
        width: Channels of the output's tensor.
        shares: Tensors that hold the input: 1 or 2.
        normed: Channels of the input, the last ones, to which a norm and a leaky ReLU are applied.
        adds: Whether the products of other channels are added.
        partial: Whether others follow: products are stored in float32, without sums.
        stride: Along each axis: 1 or 2.
    """

    cin: int
    cout: int
    taps: int
    kind: str
    block: WarpGroups
    width: int
    shares: int = 1
    normed: int = 0
    adds: bool = False
    partial: bool = False
    stride: int = 1


@cache
def source(form: LaunchForm) -> str:
    """CUDA C++ of one launch."""
    block = form.block
    registers, loading = registers_of(block, form.stride)
    values = {
        "CIN": form.cin,
        "COUT": form.cout,
        "WIDTH": form.width,
        "SHARES": form.shares,
        "TAPS": form.taps,
        "BLOCKS": block.held,
        "STRIDE": form.stride,
        "STAGES": planes_held(form.cin, form.cout, form.taps, block.groups, form.stride),
        "GROUPS": block.groups,
        "LOADERS": WARP_GROUP * block.loaders,
        "REGISTERS": registers,
        "LOADER_REGISTERS": loading,
        "BF16": int(form.kind == "bf16"),
        "NORMED_FROM": form.cin - form.normed,
        "SCALED": 0,
        "ADDS": int(form.adds),
        "PARTIAL": int(form.partial),
    }
    columns = (3 if form.stride == 1 else 1) * form.cout
    return cuda_source(values, *SHARED_PARTS, "convolution.cu", own=multiply_source(columns, form.kind))


def multiply_source(columns: int, kind: str) -> str:
    """One matrix instruction, whose accumulators must each be named: 64 voxels x 16 channels x `columns`."""
    count = columns // 2
    registers = ", ".join(f"%{k}" for k in range(count))
    bound = ", ".join(f'"+f"(acc[{k}])' for k in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
    return (
        f"__device__ __forceinline__ void multiply(float* acc, unsigned long long a, unsigned long long b) {{\n"
        f'  asm volatile("{{{instruction} {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;}}"\n'
        f'               : {bound} : "l"(a), "l"(b));\n}}'
    )


class HopperConvolution:
    """A convolution on one GPU; see `ctflow.networks.operations.Operations.convolution`.

    Each part of a `Division` is a launch of its own, the products so far in float32 between them.

    Args:
        weight: (C_out, C_in, 3, 3, 3) or (C_out, C_in, 3, 1, 1) float32.
        shares: Channels of each share.
        size: (D, H, W) of the input.
        dtype: Of volumes and weights.
        device: torch device.
        kernels: Launches kernels there.
        stride: Along each axis: 1 or 2.
        block: Instead of the usual one.

    Raises:
        ValueError: A multiprocessor cannot hold it.
    """

    def __init__(
        self,
        weight: Tensor,
        shares: Sequence[int],
        size: Size3,
        dtype: torch.dtype,
        device: str,
        kernels: Kernels,
        *,
        stride: int = 1,
        block: WarpGroups | None = None,
    ) -> None:
        self._cout, self._kind, self._kernels = len(weight), KINDS[dtype], kernels
        self._taps, self._stride = weight.shape[3] * weight.shape[4], stride
        self._channels = sum(shares)
        division = division_of(self._cout, shares, self._taps, size[1] // stride, stride, block)
        if division is None:
            raise ValueError(f"no convolution from {tuple(shares)} to {self._cout} channels")
        self._division = division
        rows, columns = division.width, [sum(part) for part in division.parts]
        self._weights = [
            [packed_weights(part, dtype, stride).to(device) for part in torch.split(piece, columns, 1)]
            for piece in torch.split(weight, rows, 0)
        ]

    @staticmethod
    def takes(
        weight: Sequence[int], shares: Sequence[int], size: Size3, dtype: torch.dtype, stride: Size3 = (1, 1, 1)
    ) -> bool:
        """Whether it computes a convolution with weights of such a shape, and faster than cuDNN."""
        cout, _, *kernel = weight
        if dtype not in KINDS or tuple(kernel) not in _PLANES or stride not in ((1, 1, 1), (2, 2, 2)):
            return False
        if min(size) // stride[0] < _LEAST_SIDE or any(cin % 16 for cin in shares):
            return False
        taps = kernel[1] * kernel[2]
        if stride[0] > 1 and (taps == 1 or any(length % 2 for length in size)):
            return False
        division = division_of(cout, shares, taps, size[1] // stride[0], stride[0])
        # With a stride of 2 a second launch would read four times the output's voxels again.
        return division is not None and (stride[0] == 1 or (len(division.parts), division.width) == (1, cout))

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `ctflow.networks.operations.Operations.convolution`; shares are (B, D, H, W, C) without gaps."""
        batch, block, cout, like = len(shares[0]), self._division.block, self._cout, shares[0]
        d, h, w = (length // self._stride for length in like.shape[1:4])
        most = self._kernels.multiprocessors * block.held
        chunk = best_chunk(batch, (d, h, w), block.groups, most)
        units = units_of((d, h, w), chunk, block.groups)
        numbers = (batch, d, h, w, chunk, batch * units)
        sums = torch.empty((batch, units, 2, cout), dtype=torch.float32, device=like.device)
        out = before = None
        first = channel = 0
        for number, part in enumerate(self._division.parts):
            given, last = shares[first : first + len(part)], number == len(self._division.parts) - 1
            first, channel = first + len(part), channel + sum(part)
            normed, scale = self._norm_of_part(norm, channel, sum(part))
            out = torch.empty((batch, d, h, w, cout), dtype=like.dtype if last else torch.float32, device=like.device)
            form = LaunchForm(sum(part), self._division.width, self._taps, self._kind, block, cout, len(part),
                        normed, before is not None, not last, self._stride)  # fmt: skip
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

    def _norm_of_part(self, norm: Tensor | None, end: int, count: int) -> tuple[int, Tensor | None]:
        """How many of the `count` channels up to `end` are normalised, and their norm."""
        if norm is None:
            return 0, None
        begin = self._channels - norm.shape[-1]
        normed = min(count, max(0, end - begin))
        return normed, norm[..., end - begin - normed : end - begin].contiguous() if normed else None


def _cuda_form(form: LaunchForm) -> CudaForm:
    block = form.block
    shared = shared_bytes(form.cin, form.cout, form.taps, block.groups, form.stride)
    return CudaForm(source(form), "convolve", WARP_GROUP * (block.groups + block.loaders), shared)
