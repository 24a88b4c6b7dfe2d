"""Convolutions of 3 x 3 x 3 with products in e4m3 on Hopper (convolution_fp8.cu): source, weights, launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.convolution import SHARED_PARTS, best_chunk, units_of
from ctflow.kernels.machine_code.forms import CudaForm, cuda_source
from ctflow.kernels.machine_code.launch import Kernels
from ctflow.kernels.operations import HopperOperations
from ctflow.networks.eight_bits import Takes, rounded_weights
from ctflow.networks.operations import Convolution

PIECE = 16  # channels of a voxel that lie side by side in shared memory; a product takes two pieces
LOADERS = 128  # threads that load
_TILE_W = 8
_MOST_SHARED = 232448  # bytes of shared memory that a block may have
_GROUPS = 2  # warp groups that multiply: a thread of three would lack registers for two sets of sums
# Of a thread that multiplies or loads. A block of 384 threads starts with 168 each, and shares out no more than these.
_REGISTERS, _LOADER_REGISTERS = 216, 72
# Planes of the input that are held, and turns whose values are being loaded: the first that fit.
_HELD = ((4, 4), (4, 3), (3, 3), (3, 2), (3, 1))
_PROMOTE = 4  # products of 32 channels between two additions in float32: 128 of one sum
_LEAST_INPUTS = 32  # the first layer has fewer, and keeps half precision
_MOST_OUTPUTS = 48  # channels; more need the registers of a third group
_LEAST_SIDE = 48  # of smaller volumes cuDNN computes the convolution


def steps_of(cin: int) -> int:
    """Products of a plane: each takes two of its pieces, of any taps."""
    return -(-9 * cin // (2 * PIECE))


def pieces_together(share: int) -> int:
    """Pieces of a voxel that are loaded in a turn; as in the source."""
    return next(count for count in (3, 2, 1) if share % (count * PIECE) == 0)


def fp8_held(cin: int, cout: int, shares: int) -> tuple[int, int] | None:
    """Planes of the input that are held, and turns being loaded; None if not even the fewest fit a multiprocessor."""
    return next((held for held in _HELD if _bytes_with(cin, cout, shares, *held) <= _MOST_SHARED), None)


def fp8_shared_bytes(cin: int, cout: int, shares: int) -> int:
    """Shared memory of a block: weights, planes, values being loaded, norm, factors, sums and barriers."""
    held = fp8_held(cin, cout, shares)
    if held is None:
        raise ValueError(f"a convolution of {cin} channels to {cout} in e4m3 does not fit a multiprocessor")
    return _bytes_with(cin, cout, shares, *held)


def _bytes_with(cin: int, cout: int, shares: int, stages: int, ahead: int) -> int:
    voxels = (8 * _GROUPS + 2) * (_TILE_W + 2)
    items = -(-voxels * 2 // LOADERS)
    loaded = ahead * pieces_together(cin // shares) * items * LOADERS * 16
    kept = steps_of(cin) * 96 * cout + 8 * cin + 4 * cout + _GROUPS * 4 * 8 * cout
    return kept + stages * (cin * voxels + 16) + loaded


def place_of(piece: int, chunks: int) -> int:
    """Where a piece of a plane (tap by tap) lies in shared memory; as in the source, in units of 16 bytes."""
    tap, chunk = divmod(piece % (9 * chunks), chunks)
    edge = _TILE_W + 2
    return chunk * (8 * _GROUPS + 2) * edge + tap // 3 * edge + tap % 3


def packed_pieces(values: Tensor) -> Tensor:
    """(C_out, C_in, 3, 3, 3) e4m3 -> [step][piece][kd, C_out][16] bytes, of the pieces the lower place first."""
    cout, cin = values.shape[:2]
    chunks, steps = cin // PIECE, steps_of(cin)
    # [kh, kw, chunk][kd, C_out][16]
    taps = values.view(torch.uint8).permute(3, 4, 1, 2, 0).reshape(9, chunks, PIECE, 3 * cout).transpose(2, 3)
    pieces = taps.reshape(9 * chunks, 3 * cout, PIECE)
    packed = torch.zeros((steps, 2, 3 * cout, PIECE), dtype=torch.uint8)
    for step in range(steps):
        pair = sorted((2 * step, 2 * step + 1), key=lambda piece: place_of(piece, chunks))
        for side, piece in enumerate(pair):
            if piece < len(pieces):  # the partner of the last one has weights of zero
                packed[step, side] = pieces[piece]
    return packed


@dataclass(frozen=True)
class Fp8Form:
    """What the source of a launch depends on.

    Attributes:
        cin: Channels of the input.
        cout: Channels of the output.
        shares: Tensors that hold the input: 1 or 2.
        normalized: Whether a norm and a leaky ReLU are applied to the input.
        promote: Products between two additions in float32.
    """

    cin: int
    cout: int
    shares: int
    normalized: bool
    promote: int = _PROMOTE


@cache
def fp8_source(form: Fp8Form) -> str:
    """CUDA C++ of one launch."""
    stages, ahead = fp8_held(form.cin, form.cout, form.shares) or (0, 0)
    values = {
        "CIN": form.cin,
        "COUT": form.cout,
        "WIDTH": form.cout,
        "SHARES": form.shares,
        "STAGES": stages,
        "AHEAD": ahead,
        "GROUPS": _GROUPS,
        "PROMOTE": form.promote,
        "REGISTERS": _REGISTERS,
        "LOADER_REGISTERS": _LOADER_REGISTERS,
        "BF16": 0,
        "NORMALIZED": int(form.normalized),
        "SCALED": 1,
        "ADDS": 0,
        "PARTIAL": 0,
    }
    return cuda_source(values, *SHARED_PARTS, "convolution_fp8.cu", own=_multiply_source(3 * form.cout))


def _multiply_source(columns: int) -> str:
    """One matrix instruction: 64 voxels x 32 channels x `columns`; without `adds` the sums begin with it."""
    count = columns // 2
    registers = ", ".join(f"%{k}" for k in range(count))
    bound = ", ".join(f'"+f"(acc[{k}])' for k in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3"
    arguments = f"float (&acc)[{count}], unsigned long long a, unsigned long long b, int adds"
    return (
        f"__device__ __forceinline__ void multiply({arguments}) {{\n"
        f'  asm volatile("{{.reg .pred adding; setp.ne.b32 adding, %{count + 2}, 0; '
        f'{instruction} {{{registers}}}, %{count}, %{count + 1}, adding, 1, 1;}}"\n'
        f'               : {bound} : "l"(a), "l"(b), "r"(adds));\n}}'
    )


class Fp8Convolution:
    """A convolution on one GPU; see `ctflow.networks.operations.Operations.convolution`.

    Args:
        weight: (C_out, C_in, 3, 3, 3) float32.
        shares: Channels of each share.
        exponents: Of each share; see `ctflow.networks.eight_bits`.
        device: torch device.
        kernels: Launches kernels there.
    """

    def __init__(
        self, weight: Tensor, shares: Sequence[int], exponents: Sequence[int], device: str, kernels: Kernels
    ) -> None:
        self._cout, self._kernels = len(weight), kernels
        quantized = rounded_weights(weight, shares, exponents)
        self._weights = packed_pieces(quantized.values).to(device)
        powers = torch.tensor([2.0**exponent for exponent in exponents])
        self._scales = torch.cat([quantized.factors, powers]).to(device)

    @staticmethod
    def takes(weight: Sequence[int], shares: Sequence[int], size: Size3) -> bool:
        """Whether it computes a convolution with weights of such a shape."""
        cout, cin, *kernel = weight
        if tuple(kernel) != (3, 3, 3) or min(size) < _LEAST_SIDE or len(shares) > 2 or len(set(shares)) != 1:
            return False
        if shares[0] % PIECE or cin < _LEAST_INPUTS or cout % 8 or cout > _MOST_OUTPUTS:
            return False
        return fp8_held(cin, cout, len(shares)) is not None

    def __call__(self, shares: Sequence[Tensor], norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `ctflow.networks.operations.Operations.convolution`; shares are (B, D, H, W, C) float16 without gaps."""
        batch, d, h, w, channels = shares[0].shape
        if norm is not None and norm.shape[-1] != channels * len(shares):
            raise ValueError("a convolution in e4m3 normalises all channels or none")
        most, like = self._kernels.multiprocessors, shares[0]
        chunk = best_chunk(batch, (d, h, w), _GROUPS, most)
        units = units_of((d, h, w), chunk, _GROUPS)
        sums = torch.empty((batch, units, 2, self._cout), dtype=torch.float32, device=like.device)
        out = torch.empty((batch, d, h, w, self._cout), dtype=like.dtype, device=like.device)
        form = Fp8Form(channels * len(shares), self._cout, len(shares), norm is not None)
        shared = fp8_shared_bytes(form.cin, form.cout, form.shares)
        self._kernels.cuda(
            CudaForm(fp8_source(form), "convolve_fp8", 128 * _GROUPS + LOADERS, shared), min(batch * units, most),
            like, shares[1] if len(shares) > 1 else None, self._weights, norm, self._scales, out, sums,
            batch, d, h, w, chunk, batch * units,
        )  # fmt: skip
        return out, sums


def is_in_eight_bits(roi: Size3) -> Takes:
    """Which convolutions of a network for windows of this size are in e4m3: those of whole windows in two shares.

    That is the largest one, which reads a decoder's upsampled volume and its skip. With the other two of whole windows,
    which gain less, masks have a Dice below 0.998 (docs/exactness.md); and so they have with those of half the size.
    """

    def takes(weight: Sequence[int], shares: Sequence[int], size: Size3) -> bool:
        return tuple(size) == tuple(roi) and len(shares) == 2 and Fp8Convolution.takes(weight, shares, size)

    return takes


class HopperFp8Operations(HopperOperations):
    """The operations with large convolutions in e4m3; volumes are float16.

    Args:
        roi: Window size in voxels.
        device: See `HopperOperations`.
        kernels: See `HopperOperations`.
        exponents: Of each share of each convolution that `is_in_eight_bits`, in the network's order; None stands
            for zeros, where kernels are only listed.
    """

    def __init__(self, roi: Size3, device: str, kernels: Kernels, exponents: Sequence[Sequence[int]] | None) -> None:
        super().__init__(torch.float16, device, kernels)
        self._takes = is_in_eight_bits(roi)
        self._exponents = repeat(None) if exponents is None else iter(exponents)

    def convolution(self, weight: Tensor, shares: Sequence[int], size: Size3, stride: Size3 = (1, 1, 1)) -> Convolution:
        """In e4m3 where `is_in_eight_bits` says so."""
        if stride == (1, 1, 1) and self._takes(weight.shape, shares, size):
            exponents = next(self._exponents) or [0] * len(shares)
            return Fp8Convolution(weight, shares, exponents, self.device, self.kernels)
        return super().convolution(weight, shares, size, stride)
