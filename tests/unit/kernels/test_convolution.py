from __future__ import annotations

import platform
import re
import sys

import pytest
import torch
from torch.nn import functional

from ctflow.core.errors import BackendUnavailable
from ctflow.kernels.compiler import compile_form
from ctflow.kernels.convolution import (
    Division,
    HopperConvolution,
    LaunchForm,
    best_chunk,
    division_of,
    groups_of,
    packed_weights,
    shared_bytes,
    source,
    units_of,
)
from ctflow.kernels.forms import HOPPER, CudaForm
from ctflow.kernels.launch import KernelList
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


def test_it_takes_what_fits_a_multiprocessor_and_is_large():
    large = (96, 96, 96)

    def takes(cout, shares, size=large, dtype=HALF, kernel=(3, 3, 3)):
        return HopperConvolution.takes((cout, sum(shares), *kernel), shares, size, dtype)

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


@pytest.mark.parametrize(
    ("cout", "shares", "division"),
    [
        (48, (48,), Division(48, ((48,),), 3)),
        (48, (48, 48), Division(48, ((48,), (48,)), 3)),
        (64, (16,), Division(64, ((16,),), 2)),
        (32, (32, 32), Division(32, ((32, 32),), 3)),  # both shares at once
        (64, (64,), Division(32, ((64,),), 3)),  # half of the output at a time
        (64, (64, 64), Division(32, ((64,), (64,)), 3)),
        (48, (96,), None),
    ],
)
def test_a_convolution_is_divided_into_the_fewest_launches_that_fit(cout, shares, division):
    assert division_of(cout, shares, 9) == division


@pytest.mark.parametrize(("cout", "shares", "launches"), [(32, (32, 32), 1), (64, (64, 64), 4), (48, (48, 48), 2)])
@pytest.mark.parametrize("normalized", [True, False])
def test_each_launch_reads_its_channels_and_writes_its_own(cout, shares, launches, normalized):
    listed = []

    class Kernels(KernelList):
        def cuda(self, form, blocks, *arguments):
            listed.append((form, arguments))

    torch.manual_seed(0)
    weight = torch.randn(cout, sum(shares), 3, 3, 3)
    volumes = [torch.zeros(1, 32, 32, 32, share, dtype=HALF) for share in shares]
    norm = torch.randn(1, 2, sum(shares)) if normalized else None
    out, sums = HopperConvolution(weight, shares, HALF, "cpu", Kernels())(volumes, norm)
    assert out.shape == (1, 32, 32, 32, cout)
    assert sums.shape[2:] == (2, cout)
    assert len(listed) == launches
    division = division_of(cout, shares, 9)
    seen = torch.zeros(cout, sum(shares))
    for _, (first, second, packed, scale, before, found, found_sums, *_) in listed:
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
        assert (scale is None) == (norm is None)
        if norm is not None:
            assert torch.equal(scale, norm[..., start : start + columns])
    assert seen.eq(1).all()


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
    assert shared_bytes(48, 48, 9) == weights + planes + 2 * 48 * 4 + 12 * 2 * 48 * 4 + 64
    assert shared_bytes(48, 48, 9) <= 227 * 1024
    assert shared_bytes(48, 48, 1) == shared_bytes(48, 48, 9) - 8 * 3 * 48 * 48 * 2
    assert shared_bytes(64, 32, 9) == 27 * 64 * 32 * 2 + 3 * 26 * 10 * 64 * 2 + 2 * 64 * 4 + 12 * 2 * 32 * 4 + 48
    assert shared_bytes(16, 64, 9) == 27 * 16 * 64 * 2 + 4 * 18 * 10 * 16 * 2 + 2 * 16 * 4 + 8 * 2 * 64 * 4 + 64


def test_the_registers_of_a_block_are_those_of_a_multiprocessor():
    for groups in (2, 3, 4):
        values = dict(re.findall(r"#define (\w+) (\d+)", source(LaunchForm(16, 32, 9, "f16", groups, 32))))
        assert int(values["GROUPS"]) == groups
        assert 128 * (groups * int(values["REGISTERS"]) + int(values["LOADER_REGISTERS"])) <= 65536
        assert 65536 // (128 * (groups + 1)) >= int(values["LOADER_REGISTERS"])


@compiles
@pytest.mark.parametrize(("cin", "cout"), [(48, 48), (16, 48), (64, 32), (16, 64), (32, 8)])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_form_compiles_for_hopper(cin, cout, kind):
    forms = [(False, False, False), (True, False, False), (False, False, True), (False, True, False)]
    for normalized, adds, partial in forms:
        taps = 9 if adds or partial else 1
        groups, shares = groups_of(cout), 2 if cin == 64 else 1
        form = LaunchForm(cin, cout, taps, kind, groups, 2 * cout if adds else cout, shares, normalized, adds, partial)
        cubin = compile_form(CudaForm(source(form), "convolve", 512, 1024), HOPPER)
        assert cubin.code.startswith(b"\x7fELF")
        assert (cubin.name, cubin.threads, cubin.shared, cubin.nulls) == ("convolve", 512, 1024, 0)
        assert cubin.compiler.startswith("nvrtc ")


@compiles
def test_what_the_compiler_says_is_told():
    with raises_reason(BackendUnavailable, "compiler-failed", names="identifier"):
        compile_form(CudaForm('extern "C" __global__ void convolve() { nothing(); }', "convolve", 512, 0), HOPPER)


def test_the_source_is_made_once_for_each_form():
    assert source(LaunchForm(48, 48, 9, "f16", 3, 48)) is source(LaunchForm(48, 48, 9, "f16", 3, 48))
    assert "#define PARTIAL 1" in source(LaunchForm(48, 48, 9, "f16", 3, 48, partial=True))
