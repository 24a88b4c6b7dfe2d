"""Convolutions of 3 x 3 x 3 of small volumes with many channels (gathered_convolution.cu): source, weights, launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ctflow.core.volume import Size3
from ctflow.kernels.convolution import KINDS, MOST_SHARED, WARP_GROUP, multiply_source
from ctflow.kernels.machine_code.forms import CudaForm, cuda_source
from ctflow.kernels.machine_code.launch import Kernels

_CHUNK = 32  # channels that a stage holds
_SHIFTS = 9  # along D and H; the three along W are multiplied from the same stage
_MOST_STAGES = 8
_MOST_COLUMNS, _COLUMN_STEP = 192, 16  # of one product
_MOST_COLUMNS_OF = {2: 192, 3: 192, 4: 128}  # by the groups: what a thread's registers hold
_REGISTERS = {2: (208, 88), 3: (152, 56), 4: (104, 64)}  # of a thread that multiplies and of one that loads
_ROWS, _HELD = 16, 64  # voxels and channels that a program adds up, where steps were divided
_MOST_SPLITS = 12
_CLOCKS, _END = 1600, 0.007  # in a microsecond; microseconds to store a result, for each group and column
# Between what was measured on an H200 (docs/performance.md) and was faster than cuDNN there; not every size was.
_LEAST_SIDE, _MOST_SIDE, _LEAST_COLUMNS = 3, 32, 96
_CUDNNS = ((256, 256, 16), (512, 256, 16), (320, 320, 8))  # C_in, C_out and side of those where it is not


@dataclass(frozen=True)
class TilePlan:
    """How a convolution is divided among blocks.

    Attributes:
        groups: Warp groups that multiply, 64 places each.
        columns: Channels of the output that a block computes.
        splits: Blocks among which the steps of a tile are divided.
    """

    groups: int
    columns: int
    splits: int = 1


def gathered_weights(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(C_out, C_in, 3, 3, 3) -> [C_out / columns][C_in / 32][kd, kh][kw][4][columns][8], a step's side by side."""
    cout, cin = weight.shape[:2]
    parts = weight.reshape(cout // columns, columns, cin // _CHUNK, _CHUNK // 8, 8, _SHIFTS, 3)
    return parts.permute(0, 2, 5, 6, 3, 1, 4).to(dtype).contiguous()


def stage_bytes(groups: int, columns: int) -> int:
    """Shared memory of a stage: voxels, and weights."""
    return (64 * groups + 2) * _CHUNK * 2 + 3 * columns * _CHUNK * 2


def stages_held(plan: TilePlan) -> int:
    """How many stages a block holds."""
    return min((MOST_SHARED - _sum_bytes(plan)) // (stage_bytes(plan.groups, plan.columns) + 16), _MOST_STAGES)


def gathered_shared_bytes(plan: TilePlan) -> int:
    """Shared memory of a block: stages, sums and barriers."""
    return stages_held(plan) * (stage_bytes(plan.groups, plan.columns) + 16) + _sum_bytes(plan)


def _sum_bytes(plan: TilePlan) -> int:
    return 0 if plan.splits > 1 else 4 * plan.groups * 2 * plan.columns * 4


@dataclass(frozen=True)
class Sets:
    """Places of a product, numbered with a column of zeros behind each row.

    Attributes:
        count: Images, or 1 if all images are numbered through.
        tiles: Of a set.
    """

    count: int
    tiles: int


def sets_of(plan: TilePlan, batch: int, size: Size3) -> Sets:
    """Sums need tiles of one image; where they are made afterwards, a tile may hold parts of several images."""
    places = size[0] * size[1] * (size[2] + 1)
    if plan.splits > 1:
        return Sets(1, -(-batch * places // (64 * plan.groups)))
    return Sets(batch, -(-places // (64 * plan.groups)))


@dataclass(frozen=True)
class GatheredForm:
    """What the source of a launch depends on.

    Attributes:
        cin: Channels of the input.
        cout: Channels of the output.
        kind: "f16" or "bf16".
        shares: Tensors that hold the input: 1 or 2.
        groups: See `TilePlan`.
        columns: See `TilePlan`.
        split: Whether products are stored, for others to be added.
    """

    cin: int
    cout: int
    kind: str
    shares: int
    groups: int
    columns: int
    split: bool


@cache
def gathered_source(form: GatheredForm) -> str:
    """CUDA C++ of one launch."""
    registers, loading = _REGISTERS[form.groups]
    values = {
        "CIN": form.cin,
        "WIDTH": form.cout,
        "SHARES": form.shares,
        "GROUPS": form.groups,
        "N": form.columns,
        "CHUNK": _CHUNK,
        "SPLIT": int(form.split),
        "STAGES": stages_held(TilePlan(form.groups, form.columns, 1 + form.split)),
        "REGISTERS": registers,
        "LOADER_REGISTERS": loading,
        "BF16": int(form.kind == "bf16"),
    }
    parts = ("halves.cuh", "pipeline.cuh", "gathered_convolution.cu")
    return cuda_source(values, *parts, own=multiply_source(form.columns, form.kind))


class GatheredConvolution:
    """A convolution on one GPU; see `ctflow.networks.operations.Operations.convolution`.

    Args:
        weight: (C_out, C_in, 3, 3, 3) float32.
        shares: Channels of each share: of one, or of two of the same size.
        size: (D, H, W) of the input.
        dtype: Of volumes and weights.
        device: torch device.
        kernels: Launches kernels there.
        plan: Instead of the usual one.
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
        plan: TilePlan | None = None,
    ) -> None:
        self._cout, self._cin, self._kind, self._kernels = len(weight), sum(shares), KINDS[dtype], kernels
        self._size, self._plan = size, plan
        self._columns = plan.columns if plan else columns_for(self._cout)
        self._weights = gathered_weights(weight, self._columns, dtype).to(device)

    @staticmethod
    def takes(weight: Sequence[int], shares: Sequence[int], size: Size3, dtype: torch.dtype) -> bool:
        """Whether it computes a convolution with weights of such a shape, near those where it was faster than cuDNN."""
        cout, _, *kernel = weight
        if dtype not in KINDS or kernel != [3, 3, 3] or max(size) > _MOST_SIDE or min(size) < _LEAST_SIDE:
            return False
        if len(shares) > 2 or len(set(shares)) > 1 or any(cin % _CHUNK for cin in shares):
            return False
        if (sum(shares), cout, min(size)) in _CUDNNS:
            return False
        return columns_for(cout) >= _LEAST_COLUMNS

    def __call__(self, shares: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The volume and its sums; shares are (B, D, H, W, C) without gaps."""
        batch, like, kernels = len(shares[0]), shares[0], self._kernels
        plan = self._plan or plan_for(self._columns, self._cout, self._cin, batch, self._size, kernels.multiprocessors)
        sets, voxels, split = sets_of(plan, batch, self._size), math.prod(self._size), plan.splits > 1
        out = torch.empty((batch, *self._size, self._cout), dtype=like.dtype, device=like.device)
        form = GatheredForm(self._cin, self._cout, self._kind, len(shares), plan.groups, plan.columns, split)
        units = sets.count * sets.tiles * self._cout // plan.columns * plan.splits
        products = sums = None
        if split:
            products = torch.empty((plan.splits, batch, voxels, self._cout), dtype=torch.float32, device=like.device)
        else:
            sums = torch.empty((batch, sets.tiles, 2, self._cout), dtype=torch.float32, device=like.device)
        kernels.cuda(
            CudaForm(gathered_source(form), "convolve", WARP_GROUP * (plan.groups + 1), gathered_shared_bytes(plan)),
            min(units, kernels.multiprocessors),
            shares[0], shares[1] if len(shares) > 1 else None, self._weights,
            out if products is None else products, sums,
            sets.count, batch * self._size[0] // sets.count, *self._size, sets.tiles, plan.splits,
        )  # fmt: skip
        if sums is not None:
            return out, sums
        assert products is not None  # noqa: S101  # one of both is made
        parts = -(-voxels // _ROWS)
        sums = torch.empty((batch, parts, 2, self._cout), dtype=torch.float32, device=like.device)
        kernels.triton(
            "add_products", (parts, batch, -(-self._cout // _HELD)),
            products, out, sums, voxels, self._cout, batch * voxels * self._cout, plan.splits, _HELD, _ROWS,
        )  # fmt: skip
        return out, sums


def columns_for(cout: int) -> int:
    """Channels of the output that a block computes: the most of those that divide it; 0 if there are none."""
    return max((n for n in range(_COLUMN_STEP, _MOST_COLUMNS + 1, _COLUMN_STEP) if cout % n == 0), default=0)


def plan_for(columns: int, cout: int, cin: int, batch: int, size: Size3, multiprocessors: int) -> TilePlan:
    """The plan with which `multiprocessors` at a time are done soonest, by what was measured on an H200."""
    steps = cin // _CHUNK * _SHIFTS
    groups = [count for count, most in _MOST_COLUMNS_OF.items() if columns <= most]
    plans = (TilePlan(count, columns, splits) for splits in range(1, min(_MOST_SPLITS, steps) + 1) for count in groups)
    return min(plans, key=lambda plan: microseconds_of(plan, cout, steps, batch, size, multiprocessors))


def microseconds_of(plan: TilePlan, cout: int, steps: int, batch: int, size: Size3, multiprocessors: int) -> float:
    """What a convolution takes.

    A step is bound by the matrix instructions or by shared memory, which they read and which is written before;
    clocks are of a step of 16 channels and one shift along W, six of which are a step of the kernel.
    """
    sets, groups, columns = sets_of(plan, batch, size), plan.groups, plan.columns
    clocks = max(groups * columns / 2, groups * (21.3 + columns / 4) + columns / 4)
    rounds = -(-sets.count * sets.tiles * cout // columns * plan.splits // multiprocessors)
    one = -(-steps // plan.splits) * clocks * 6 / _CLOCKS + _END * groups * columns
    added = 0 if plan.splits == 1 else 3 + (plan.splits + 1) * batch * math.prod(size) * cout * 4 / 1.5e6
    return rounds * one + added
