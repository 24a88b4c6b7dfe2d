from __future__ import annotations

import platform
import re
import sys
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from ctflow.kernels.convolution import best_chunk, units_of
from ctflow.kernels.convolution_fp8 import (
    LOADERS,
    PIECE,
    Fp8Convolution,
    Fp8Form,
    HopperFp8Operations,
    fp8_held,
    fp8_shared_bytes,
    fp8_source,
    packed_pieces,
    pieces_together,
    place_of,
    steps_of,
)
from ctflow.kernels.machine_code.compiler import compile_form
from ctflow.kernels.machine_code.forms import HOPPER, CudaForm
from ctflow.kernels.machine_code.launch import KernelList
from ctflow.networks.eight_bits import convolve_rounded, rounded_input, rounded_weights

compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's run-time compiler is installed on Linux on x86-64 only",
)
ROWS, COLUMNS = 16, 8  # voxels of a tile
LARGE = (96, 96, 96)


@pytest.mark.parametrize("shares", [(48,), (48, 48), (32,), (16, 16), (64,)], ids=str)
def test_products_of_two_pieces_are_the_convolution(shares):
    """The kernel's sums in plain tensors: each product takes two pieces of a tile's plane, wherever they lie."""
    torch.manual_seed(0)
    cin, cout, depth, exponents = sum(shares), 8, 3, [4, 2][: len(shares)]
    made = rounded_weights(torch.randn(cout, cin, 3, 3, 3), shares, exponents)
    packed = packed_pieces(made.values).view(torch.float8_e4m3fn).float().unflatten(2, (3, cout))
    parts = list(torch.split(torch.randn(1, depth, ROWS, COLUMNS, cin), list(shares), -1))
    x = torch.cat([rounded_input(part, each).float() for part, each in zip(parts, exponents, strict=True)], -1)[0]
    planes = functional.pad(x, (0, 0, 1, 1, 1, 1)).flatten(1, 2).unflatten(-1, (-1, PIECE)).transpose(1, 2)
    voxels = torch.tensor([[h * (COLUMNS + 2) + w for w in range(COLUMNS)] for h in range(ROWS)])
    found = torch.zeros(depth + 2, ROWS, COLUMNS, cout)
    for z, plane in enumerate(planes):
        shared = plane.reshape(-1, PIECE)
        for step in range(steps_of(cin)):
            places = sorted(place_of(piece, cin // PIECE) for piece in (2 * step, 2 * step + 1))
            for side, place in enumerate(places):
                products = torch.einsum("hwk,dok->dhwo", shared[place + voxels], packed[step, side])
                for kd in range(3):
                    found[z + 2 - kd] += products[kd]
    expected = convolve_rounded(parts, exponents, made)[0]
    assert torch.allclose(found[1:-1] * made.factors, expected, atol=1e-4 * float(expected.abs().max()))


def test_it_takes_large_volumes_of_channels_that_fill_pieces():
    def takes(cout, shares, size=LARGE, kernel=(3, 3, 3)):
        return Fp8Convolution.takes((cout, sum(shares), *kernel), shares, size)

    assert takes(48, (48,))
    assert takes(48, (48, 48))
    assert takes(32, (32, 32), (64, 64, 64))
    assert takes(48, (48,), (48, 48, 48))
    assert not takes(48, (48,), (32, 96, 96))
    assert not takes(48, (16,))  # the first layer
    assert not takes(48, (16,), kernel=(3, 1, 1))
    assert not takes(64, (64,))  # more registers than a thread has
    assert not takes(12, (32,))
    assert not takes(48, (24, 24))
    assert not takes(48, (32, 64))
    assert not takes(48, (48, 48, 48))
    assert not takes(48, (192,))  # the weights alone are larger than shared memory


def test_shared_memory_holds_what_the_kernel_keeps_there():
    assert steps_of(48) == 14
    assert steps_of(96) == 27
    assert [pieces_together(share) for share in (48, 96, 64, 32, 16, 80)] == [3, 3, 2, 2, 1, 1]
    assert fp8_held(48, 48, 1) == (4, 4)
    assert fp8_held(192, 48, 1) is None
    for shares in ((48,), (48, 48)):
        cin = sum(shares)
        stages, ahead = fp8_held(cin, 48, len(shares))
        weights, held, loaded = steps_of(cin) * 2 * 144 * 16, stages * cin * 18 * 10, ahead * 3 * 3 * 128 * 16
        rest = 8 * cin + 4 * 48 + 8 * 2 * 48 * 4 + 16 * stages
        assert fp8_shared_bytes(cin, 48, len(shares)) == weights + held + loaded + rest
        assert fp8_shared_bytes(cin, 48, len(shares)) <= 227 * 1024
        assert ahead * pieces_together(shares[0]) * PIECE >= cin  # a whole plane is on its way
    with pytest.raises(ValueError, match="does not fit"):
        fp8_shared_bytes(192, 48, 1)


def constants_of(form: Fp8Form) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", fp8_source(form))}


def test_a_sum_takes_at_most_128_products_between_two_additions_in_float32():
    for cin in (32, 48, 64, 96):
        promote = constants_of(Fp8Form(cin, 48, 1, normalized=False))["PROMOTE"]
        steps, rounds = steps_of(cin), -(-steps_of(cin) // promote)
        begins = [number * steps // rounds for number in range(rounds + 1)]  # first_of() in the source
        assert max(after - begin for begin, after in pairwise(begins)) * 2 * PIECE <= 128


def test_the_registers_of_a_block_are_those_of_a_multiprocessor_that_runs_fp8():
    values = constants_of(Fp8Form(48, 48, 1, normalized=True))
    threads = 128 * values["GROUPS"] + LOADERS
    begins_with = 65536 // threads // 8 * 8  # a block never gets more: one that asks for more waits for ever
    shared_out = 128 * values["GROUPS"] * values["REGISTERS"] + LOADERS * values["LOADER_REGISTERS"]
    assert shared_out <= threads * begins_with


@pytest.mark.parametrize("shares", [(48,), (48, 48)], ids=str)
@pytest.mark.parametrize("normalized", [True, False])
def test_one_launch_gets_weights_scales_and_sizes(shares, normalized):
    listed = []

    class Kernels(KernelList):
        def cuda(self, form, blocks, *arguments):
            listed.append((form, blocks, arguments))

    torch.manual_seed(0)
    weight, exponents = torch.randn(48, sum(shares), 3, 3, 3), [5, 3][: len(shares)]
    volumes = [torch.zeros(2, 48, 50, 52, share, dtype=torch.float16) for share in shares]
    norm = torch.randn(2, 2, sum(shares)) if normalized else None
    made = Fp8Convolution(weight, shares, exponents, "cpu", Kernels())
    out, sums = made(volumes, norm)
    ((form, blocks, arguments),) = listed
    first, second, packed, norms, scales, found, found_sums, *sizes = arguments
    rounded = rounded_weights(weight, shares, exponents)
    assert (form.name, form.threads, form.shared) == (
        "convolve_fp8",
        384,
        fp8_shared_bytes(sum(shares), 48, len(shares)),
    )
    assert (first is volumes[0], second is (volumes[1] if len(shares) > 1 else None)) == (True, True)
    assert torch.equal(packed, packed_pieces(rounded.values))
    assert norms is norm
    assert torch.equal(scales, torch.cat([rounded.factors, torch.tensor([2.0**each for each in exponents])]))
    assert (out.shape, out.dtype, found is out, found_sums is sums) == ((2, 48, 50, 52, 48), torch.float16, True, True)
    chunk = best_chunk(2, (48, 50, 52), 2, 132)
    units = units_of((48, 50, 52), chunk, 2)
    assert (*sums.shape, *sizes) == (2, units, 2, 48, 2, 48, 50, 52, chunk, 2 * units)
    assert blocks == min(2 * units, 132)


def test_exponents_go_to_the_convolutions_in_their_order():
    made = HopperFp8Operations(LARGE, "cpu", KernelList(), [[5, 4], [3, 2]])
    weight = torch.ones(48, 96, 3, 3, 3)
    first = made.convolution(weight, (48, 48), LARGE)
    made.convolution(torch.ones(48, 48, 3, 3, 3), (48,), LARGE)  # of one share
    made.convolution(weight, (48, 48), (48, 48, 48))  # of half the resolution
    second = made.convolution(weight, (48, 48), LARGE)
    assert first._scales[48:].tolist() == [32.0, 16.0]
    assert second._scales[48:].tolist() == [8.0, 4.0]
    with pytest.raises(StopIteration):
        made.convolution(weight, (48, 48), LARGE)


@compiles
@pytest.mark.parametrize(("cin", "shares"), [(48, 1), (96, 2), (32, 2), (64, 1)])
@pytest.mark.parametrize("normalized", [True, False])
def test_every_form_of_fp8_compiles_for_hopper(cin, shares, normalized):
    cout = 48 if cin % 48 == 0 else 32
    form = Fp8Form(cin, cout, shares, normalized=normalized)
    cubin = compile_form(CudaForm(fp8_source(form), "convolve_fp8", 384, fp8_shared_bytes(cin, cout, shares)), HOPPER)
    assert cubin.code.startswith(b"\x7fELF")
    assert cubin.name == "convolve_fp8"
