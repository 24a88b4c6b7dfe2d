from __future__ import annotations

import platform
import re
import sys

import pytest
import torch
from torch.nn import functional

from ctflow.kernels.convolution import MOST_SHARED
from ctflow.kernels.gathered_convolution import (
    GatheredConvolution,
    GatheredForm,
    TilePlan,
    columns_for,
    gathered_shared_bytes,
    gathered_source,
    gathered_weights,
    plan_for,
    sets_of,
    stages_held,
)
from ctflow.kernels.machine_code.compiler import compile_form
from ctflow.kernels.machine_code.forms import HOPPER, CudaForm
from ctflow.kernels.machine_code.launch import KernelList

HALF = torch.float16
# Groups and columns.
PLANS = [(2, 96), (2, 192), (3, 48), (3, 160), (3, 192), (4, 96), (4, 128)]
compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's run-time compiler is installed on Linux on x86-64 only",
)


def test_places_behind_a_column_of_zeros_are_multiplied_with_the_packed_weights():
    """The kernel's sums in plain tensors: one gathered stage, begun at three places, feeds the shifts along W."""
    torch.manual_seed(0)
    cin, cout, columns, (depth, height, width) = 64, 32, 16, (3, 4, 5)
    weight, x = torch.randn(cout, cin, 3, 3, 3), torch.randn(depth, height, width, cin)
    packed = gathered_weights(weight, columns, torch.float32)
    assert packed.shape == (2, 2, 9, 3, 4, columns, 8)
    places = depth * height * (width + 1)
    found = torch.zeros(places, cout)
    padded = functional.pad(x, (0, 0, 0, 1, 1, 1, 1, 1))  # a column behind, a row and a plane on both sides
    for part in range(2):
        for chunk in range(2):
            for shift in range(9):
                kd, kh = divmod(shift, 3)
                gathered = padded[kd : kd + depth, kh : kh + height, :, chunk * 32 : chunk * 32 + 32].reshape(
                    places, 32
                )
                stage = functional.pad(gathered, (0, 0, 1, 1)).unflatten(-1, (4, 8))
                for kw in range(3):
                    product = torch.einsum("pce,cne->pn", stage[kw : kw + places], packed[part, chunk, shift, kw])
                    found[:, part * columns : (part + 1) * columns] += product
    found = found.reshape(depth, height, width + 1, cout)[:, :, :width]
    expected = functional.conv3d(x.movedim(-1, 0)[None], weight, padding=1)[0].movedim(0, -1)
    assert torch.allclose(found, expected, atol=1e-3)


def test_it_takes_many_channels_of_small_volumes():
    def takes(cout, shares, side=24, dtype=HALF, kernel=(3, 3, 3)):
        return GatheredConvolution.takes((cout, sum(shares), *kernel), shares, (side,) * 3, dtype)

    assert takes(96, (96,))
    assert takes(96, (96, 96), dtype=torch.bfloat16)
    assert takes(768, (768,), 3)
    assert takes(320, (320, 320), 8)
    assert not takes(320, (320,), 8)  # cuDNN is as fast
    assert takes(320, (320,), 4)
    assert not takes(96, (96,), dtype=torch.float32)
    assert not takes(96, (96,), 64)
    assert not takes(96, (96,), 2)
    assert not takes(256, (256,), 16)  # cuDNN is faster
    assert takes(256, (256,), 8)
    assert not takes(96, (48,))
    assert not takes(96, (96, 32))
    assert not takes(96, (32, 32, 32))
    assert not takes(24, (96,))
    assert not takes(96, (96,), kernel=(1, 3, 3))


@pytest.mark.parametrize(
    ("cout", "columns"), [(96, 96), (128, 128), (192, 192), (256, 128), (320, 160), (768, 192), (40, 0), (112, 112)]
)
def test_blocks_compute_equal_parts_of_the_channels(cout, columns):
    assert columns_for(cout) == columns


@pytest.mark.parametrize(("groups", "columns"), PLANS)
@pytest.mark.parametrize("splits", [1, 4])
def test_a_block_fits_a_multiprocessor(groups, columns, splits):
    plan = TilePlan(groups, columns, splits)
    assert gathered_shared_bytes(plan) <= MOST_SHARED
    assert stages_held(plan) >= 4
    values = gathered_source(GatheredForm(192, 2 * columns, "f16", 2, groups, columns, splits > 1))
    found = dict(re.findall(r"#define (\w+) (\d+)", values))
    assert int(found["STAGES"]) == stages_held(plan)
    threads = 128 * (groups + 1)
    of_a_thread = min(65536 // threads // 8 * 8, 255)  # when a block starts, all have the same
    wanted = 128 * (groups * int(found["REGISTERS"]) + int(found["LOADER_REGISTERS"]))
    assert wanted <= threads * of_a_thread


def test_tiles_cover_all_places():
    assert sets_of(TilePlan(4, 96), 8, (24, 24, 24)).tiles == 57
    sets = sets_of(TilePlan(3, 96, 2), 8, (3, 3, 3))
    assert (sets.count, sets.tiles) == (1, 2)  # 288 places of all images


@pytest.mark.parametrize(("side", "cout"), [(24, 96), (12, 192), (6, 384), (3, 768), (32, 128), (4, 320)])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_plan_has_units_for_many_multiprocessors(side, cout, batch):
    columns, size = columns_for(cout), (side,) * 3
    plan = plan_for(columns, cout, cout, batch, size, 132)
    sets = sets_of(plan, batch, size)
    assert sets.count * sets.tiles * cout // columns * plan.splits >= 24


@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_launched_has_the_sizes_that_it_is_told(splits):
    listed = []

    class Kernels(KernelList):
        def cuda(self, form, blocks, *arguments):
            listed.append((form, blocks, arguments))

        def triton(self, name, grid, *arguments, warps=4, stages=3):
            listed.append((name, grid, arguments))

    size = (3, 5, 6)
    weight = torch.randn(128, 64, 3, 3, 3)
    convolution = GatheredConvolution(weight, (32, 32), size, HALF, "cpu", Kernels(), plan=TilePlan(2, 64, splits))
    out, sums = convolution([torch.zeros(4, *size, 32, dtype=HALF)] * 2)
    assert out.shape == (4, *size, 128)
    assert out.dtype == HALF
    assert sums.dtype == torch.float32
    form, blocks, (first, second, weights, stored, found, *numbers) = listed[0]
    assert form.threads == 384
    assert first is second
    assert torch.equal(weights, gathered_weights(weight, 64, HALF))
    if splits == 1:
        assert len(listed) == 1
        assert (stored is out, found is sums) == (True, True)
        assert sums.shape == (4, 1, 2, 128)
        assert numbers == [4, 3, 3, 5, 6, 1, 1]
        assert blocks == 8
    else:
        assert found is None
        assert stored.shape == (3, 4, 90, 128)
        assert stored.dtype == torch.float32
        assert numbers == [1, 12, 3, 5, 6, 4, 3]
        assert blocks == 24
        name, grid, arguments = listed[1]
        assert (name, grid) == ("add_products", (6, 4, 2))
        assert arguments[0] is stored
        assert arguments[1] is out
        assert sums.shape == (4, 6, 2, 128)


@compiles
@pytest.mark.parametrize(("groups", "columns"), PLANS)
@pytest.mark.parametrize(("kind", "shares", "split"), [("f16", 1, False), ("bf16", 2, True)])
def test_every_form_compiles_for_hopper(groups, columns, kind, shares, split):
    form = GatheredForm(192, 2 * columns, kind, shares, groups, columns, split)
    assert compile_form(CudaForm(gathered_source(form), "convolve", 640, 1024), HOPPER).code.startswith(b"\x7fELF")
