from __future__ import annotations

import platform
import re
import sys

import pytest
import torch
from torch.nn import functional

from ctflow.core.errors import BackendUnavailable
from ctflow.kernels.convolution import (
    Division,
    HopperConvolution,
    LaunchForm,
    WarpGroups,
    best_chunk,
    block_for,
    division_of,
    packed_weights,
    registers_of,
    shared_bytes,
    source,
    units_of,
)
from ctflow.kernels.machine_code.compiler import compile_form
from ctflow.kernels.machine_code.forms import HOPPER, CudaForm
from ctflow.kernels.machine_code.launch import KernelList
from reasons import raises_reason

HALF = torch.float16
compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's run-time compiler is installed on Linux on x86-64 only",
)


def test_packed_weights_are_the_columns_that_a_plane_is_multiplied_with():
    """The kernel's sums in plain tensors: one product of an input plane feeds three output planes."""
    torch.manual_seed(0)
    cin, cout, size = 16, 8, (4, 5, 6)
    weight, x = torch.randn(cout, cin, 3, 3, 3), torch.randn(*size, cin)
    packed = packed_weights(weight, torch.float32).reshape(3, 3, cin // 8, 3, cout, 8)
    padded = functional.pad(x, (0, 0, 1, 1, 1, 1))
    found = torch.zeros(*size, cout)
    for z in range(size[0]):
        for kh in range(3):
            for kw in range(3):
                plane = padded[z, kh : kh + size[1], kw : kw + size[2]].unflatten(-1, (-1, 8))
                product = torch.einsum("hwkc,kdoc->dhwo", plane, packed[kh, kw])
                for kd in range(3):
                    if 0 <= (target := z - kd + 1) < size[0]:
                        found[target] += product[kd]
    expected = functional.conv3d(x.movedim(-1, 0)[None], weight, padding=1)[0].movedim(0, -1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_packed_weights_of_a_stride_of_two_end_with_the_depth_of_even_planes():
    """An odd input plane ends an output plane and begins the next; an even one is in the middle of one."""
    torch.manual_seed(0)
    cin, cout, size = 16, 8, (4, 6, 8)
    weight, x = torch.randn(cout, cin, 3, 3, 3), torch.randn(*size, cin)
    packed = packed_weights(weight, torch.float32, 2).reshape(3, 3, cin // 8, 3, cout, 8)
    padded = functional.pad(x, (0, 0, 1, 1, 1, 1))
    found = torch.zeros(*(length // 2 for length in size), cout)
    for z in range(size[0]):
        for kh in range(3):
            for kw in range(3):
                plane = padded[z, kh : kh + size[1] : 2, kw : kw + size[2] : 2].unflatten(-1, (-1, 8))
                next_one, this, middle = torch.einsum("hwkc,kdoc->dhwo", plane, packed[kh, kw])
                if z % 2 == 0:
                    found[z // 2] += middle
                    continue
                found[z // 2] += this
                if z + 1 < size[0]:
                    found[z // 2 + 1] += next_one
    expected = functional.conv3d(x.movedim(-1, 0)[None], weight, padding=1, stride=2)[0].movedim(0, -1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_it_takes_what_fits_a_multiprocessor_and_is_large():
    large = (96, 96, 96)

    def takes(cout, shares, size=large, dtype=HALF, kernel=(3, 3, 3), stride=1):
        return HopperConvolution.takes((cout, sum(shares), *kernel), shares, size, dtype, (stride,) * 3)

    assert takes(48, (48, 48))
    assert takes(48, (16,), dtype=torch.bfloat16)
    assert takes(48, (16,), kernel=(3, 1, 1))
    assert takes(32, (32, 32), (128, 128, 128))
    assert takes(64, (64, 64), (64, 64, 64))
    assert not takes(32, (32,), kernel=(1, 3, 3))
    assert not takes(32, (32,), kernel=(5, 5, 5))
    assert not takes(128, (64,))
    assert not takes(48, (48,), dtype=torch.float32)
    assert not takes(48, (96,))  # the weights alone are larger than shared memory
    assert not takes(72, (16,))  # more registers than a thread has
    assert not takes(48, (24,))
    assert not takes(12, (16,))
    assert not takes(96, (16,))
    assert not takes(48, (48,), (96, 96, 24))
    assert takes(64, (32,), (128, 128, 128), stride=2)
    assert takes(64, (32,), (64, 64, 64), stride=2)
    assert not takes(64, (32,), (62, 64, 64), stride=2)  # half of it is small
    assert not takes(64, (32,), (128, 128, 97), stride=2)
    assert not takes(64, (32,), (128, 128, 128), stride=3)
    assert not takes(128, (64,), (128, 128, 128), stride=2)
    assert not takes(32, (16,), (128, 128, 128), kernel=(3, 1, 1), stride=2)
    assert not HopperConvolution.takes((64, 32, 3, 3, 3), (32,), (128, 128, 128), HALF, (1, 2, 2))


@pytest.mark.parametrize(
    ("cout", "shares", "division"),
    [
        (48, (48,), Division(48, ((48,),), WarpGroups(3))),
        (48, (48, 48), Division(48, ((48,), (48,)), WarpGroups(3))),
        (64, (16,), Division(64, ((16,),), WarpGroups(2))),
        (32, (32, 32), Division(32, ((32, 32),), WarpGroups(3, 2))),  # both shares at once
        (64, (64,), Division(32, ((64,),), WarpGroups(3, 2))),  # half of the output at a time
        (64, (64, 64), Division(32, ((64,), (64,)), WarpGroups(3, 2))),
        (48, (96,), None),
    ],
)
def test_a_convolution_is_divided_into_the_fewest_launches_that_fit(cout, shares, division):
    assert division_of(cout, shares, 9, 96) == division


@pytest.mark.parametrize(
    ("height", "cout", "block"),
    [
        (96, 48, WarpGroups(3)),
        (128, 48, WarpGroups(2, 2)),
        (128, 32, WarpGroups(2, 3)),
        (48, 32, WarpGroups(3, 2)),
        (64, 64, WarpGroups(2)),
    ],
)
def test_tiles_do_not_reach_far_beyond_the_volume(height, cout, block):
    assert block_for(cout, 9, height) == block


@pytest.mark.parametrize(("cout", "shares", "launches"), [(32, (32, 32), 1), (64, (64, 64), 4), (48, (48, 48), 2)])
@pytest.mark.parametrize("normed", ["all", "last", "none"])
def test_each_launch_reads_its_channels_and_writes_its_own(cout, shares, launches, normed):
    listed = []

    class Kernels(KernelList):
        def cuda(self, form, blocks, *arguments):
            listed.append((form, arguments))

    torch.manual_seed(0)
    size = (32, 32, 32)
    weight = torch.randn(cout, sum(shares), 3, 3, 3)
    volumes = [torch.zeros(1, *size, share, dtype=HALF) for share in shares]
    count = {"all": sum(shares), "last": shares[-1], "none": 0}[normed]
    norm = torch.randn(1, 2, count) if count else None
    out, sums = HopperConvolution(weight, shares, size, HALF, "cpu", Kernels())(volumes, norm)
    assert out.shape == (1, *size, cout)
    assert sums.shape[2:] == (2, cout)
    assert len(listed) == launches
    division = division_of(cout, shares, 9, 32)
    seen = torch.zeros(cout, sum(shares))
    for form, (first, second, packed, scale, before, found, found_sums, *_) in listed:
        columns = packed.shape[1] * 8
        start = 0 if first.data_ptr() == volumes[0].data_ptr() else shares[0]
        assert (second is None) == (columns == shares[0])
        last, whole = start + columns == sum(shares), found.dtype == HALF
        assert last == whole
        assert (before is None) == (start == 0)
        begin = (found_sums.data_ptr() - sums.data_ptr()) // 4
        part = weight[begin : begin + division.width, start : start + columns]
        assert torch.equal(packed, packed_weights(part, HALF))
        seen[begin : begin + division.width, start : start + columns] += 1
        if last:
            assert (found.data_ptr() - out.data_ptr()) // 2 == begin
        norms = torch.cat([torch.zeros(1, 2, sum(shares) - count), norm], -1) if count else None
        raw = max(0, min(columns, sum(shares) - count - start))  # of its channels, those before the norm's
        assert f"#define NORMED_FROM {raw}\n" in form.source
        assert (scale is None) == (raw == columns)
        if scale is not None:
            assert torch.equal(scale, norms[..., start + raw : start + columns])
    assert seen.eq(1).all()


def test_a_stride_of_two_gives_half_the_size():
    size = (64, 96, 80)
    convolution = HopperConvolution(torch.randn(64, 32, 3, 3, 3), (32,), size, HALF, "cpu", KernelList(), stride=2)
    out, sums = convolution([torch.zeros(2, *size, 32, dtype=HALF)], None)
    assert out.shape == (2, 32, 48, 40, 64)
    assert sums.shape[2:] == (2, 64)


@pytest.mark.parametrize("size", [(96, 96, 96), (48, 48, 48), (33, 70, 41)], ids=str)
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_pieces_cover_the_volume_and_fill_the_gpu(size, batch):
    for groups in (2, 3):
        chunk = best_chunk(batch, size, groups, 132)
        assert 8 <= chunk <= size[0]
        assert units_of(size, chunk, groups) * chunk * 8 * groups * 8 >= size[0] * size[1] * size[2]
        rounds = -(-batch * units_of(size, chunk, groups) // 132)
        for other in (8, 16, size[0]):
            assert rounds * (chunk + 2) <= -(-batch * units_of(size, other, groups) // 132) * (other + 2)


def test_shared_memory_holds_what_the_kernel_keeps_there():
    weights, planes = 27 * 48 * 48 * 2, 4 * 26 * 10 * 48 * 2
    assert shared_bytes(48, 48, 9, 3) == weights + planes + 2 * 48 * 4 + 12 * 2 * 48 * 4 + 64
    assert shared_bytes(48, 48, 9, 3) <= 227 * 1024
    one_tap = 3 * 48 * 48 * 2 + 4 * 196 * 48 * 2  # planes without a border, and rows that begin in other banks
    assert shared_bytes(48, 48, 1, 3) == one_tap + 2 * 48 * 4 + 12 * 2 * 48 * 4 + 64
    assert shared_bytes(64, 32, 9, 3) == 27 * 64 * 32 * 2 + 3 * 26 * 10 * 64 * 2 + 2 * 64 * 4 + 12 * 2 * 32 * 4 + 48
    assert shared_bytes(16, 64, 9, 2) == 27 * 16 * 64 * 2 + 4 * 18 * 10 * 16 * 2 + 2 * 16 * 4 + 8 * 2 * 64 * 4 + 64


def test_a_stride_of_two_reads_four_voxels_for_one():
    weights, planes = 27 * 32 * 64 * 2, 3 * 564 * 32 * 2  # 33 x 17 voxels
    assert shared_bytes(32, 64, 9, 2, 2) == weights + planes + 2 * 32 * 4 + 8 * 2 * 64 * 4 + 48


@pytest.mark.parametrize(
    ("block", "stride"),
    [(WarpGroups(3), 1), (WarpGroups(2), 1), (WarpGroups(2, 2), 1), (WarpGroups(3, 2), 1), (WarpGroups(2, 3), 1),
     (WarpGroups(1, held=3), 1), (WarpGroups(1, held=2), 1), (WarpGroups(4), 1), (WarpGroups(1, 2), 2),
     (WarpGroups(2), 2)],
)  # fmt: skip
def test_the_registers_of_a_block_are_those_of_a_multiprocessor(block, stride):
    """With more than the block got when it started, its warp groups would wait for ever."""
    source_of = source(LaunchForm(16, 32, 9, "f16", block, 32, stride=stride))
    values = dict(re.findall(r"#define (\w+) (\d+)", source_of))
    assert (int(values["REGISTERS"]), int(values["LOADER_REGISTERS"])) == registers_of(block, stride)
    threads = 128 * (block.groups + block.loaders)
    of_a_thread = 65536 // (threads * block.held) // 8 * 8  # when a block starts, all have the same
    wanted = 128 * (block.groups * int(values["REGISTERS"]) + block.loaders * int(values["LOADER_REGISTERS"]))
    assert wanted <= threads * min(of_a_thread, 255)


@compiles
@pytest.mark.parametrize(("cin", "cout"), [(48, 48), (16, 48), (64, 32), (16, 64), (32, 8)])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_form_compiles_for_hopper(cin, cout, kind):
    forms = [(0, False, False), (cin, False, False), (cin // 2, False, True), (0, True, False)]
    for normed, adds, partial in forms:
        taps = 9 if adds or partial else 1
        shares = 2 if cin == 64 else 1
        block = block_for(cout, taps, 96)
        form = LaunchForm(cin, cout, taps, kind, block, 2 * cout if adds else cout, shares, normed, adds, partial)
        cubin = compile_form(CudaForm(source(form), "convolve", 512, 1024), HOPPER)
        assert cubin.code.startswith(b"\x7fELF")
        assert (cubin.name, cubin.threads, cubin.shared, cubin.nulls) == ("convolve", 512, 1024, 0)
        assert cubin.compiler.startswith("nvrtc ")


@compiles
@pytest.mark.parametrize("normed", [32, 0])
def test_a_stride_of_two_compiles_for_hopper(normed):
    form = LaunchForm(32, 64, 9, "f16", block_for(64, 9, 64, 2), 64, normed=normed, stride=2)
    assert compile_form(CudaForm(source(form), "convolve", 384, 1024), HOPPER).code.startswith(b"\x7fELF")


@compiles
def test_what_the_compiler_says_is_told():
    with raises_reason(BackendUnavailable, "compiler-failed", names="identifier"):
        compile_form(CudaForm('extern "C" __global__ void convolve() { nothing(); }', "convolve", 512, 0), HOPPER)


def test_the_source_is_made_once_for_each_form():
    form = LaunchForm(48, 48, 9, "f16", WarpGroups(3), 48)
    assert source(form) is source(LaunchForm(48, 48, 9, "f16", WarpGroups(3), 48))
    assert "#define PARTIAL 1" in source(LaunchForm(48, 48, 9, "f16", WarpGroups(3), 48, partial=True))
