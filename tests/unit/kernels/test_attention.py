from __future__ import annotations

import math
import platform
import sys

import pytest
import torch

from ctflow.kernels.attention import (
    AttentionForm,
    CudaAttention,
    TritonAttention,
    attention_form,
    attention_source,
    bias_for_threads,
    masks_of,
)
from ctflow.kernels.machine_code.compiler import compile_form
from ctflow.kernels.machine_code.forms import HOPPER, TARGETS, CudaForm, KernelTarget
from ctflow.kernels.machine_code.launch import KernelList
from ctflow.kernels.operations import HopperOperations
from ctflow.networks.operations import LOG2E, regions_of
from ctflow.networks.swin_windows import MASKED, window_table

HALF, BF16 = torch.float16, torch.bfloat16
SMALL = KernelTarget((8, 6))
compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's run-time compiler is installed on Linux on x86-64 only",
)


@pytest.mark.parametrize("n", [343, 48, 27])
def test_the_packed_bias_is_what_each_thread_multiplies_with_the_identity(n):
    """The second operand of a matrix instruction: thread 4 g + l has column g, rows 2 l, 2 l + 1, 2 l + 8, 2 l + 9."""
    bias, tiles = torch.randn(2, n, n), -(-n // 16)
    rows = 16 * tiles + 32
    packed = bias_for_threads(bias, rows).reshape(2, rows // 16, tiles, 32, 8)
    seen = torch.full((2, rows, 16 * tiles), math.nan)
    for thread in range(32):
        for number in range(8):
            query = thread % 4 * 2 + number % 2 + number // 2 % 2 * 8
            key = thread // 4 + number // 4 * 8
            seen[:, query::16, key::16] = packed[..., thread, number].float()
    assert torch.equal(seen[:, :n, :n], (bias * LOG2E).half().float())
    assert (seen[:, :n, n:] == -30000).all()
    assert torch.isfinite(seen).all()


def test_masks_times_regions_of_queries_are_what_is_added():
    table = window_table((7, 8, 9), (4, 4, 4), (2, 2, 2))
    masks, regions = masks_of(table, torch.float32), regions_of(table)
    first = len(regions) - len(masks)
    assert first == table.counts[0]
    assert not regions[:first].any()
    own = torch.eye(8)[regions[first:].long()]
    different = regions[first:, :, None] != regions[first:, None, :]
    assert torch.equal(own @ masks.transpose(1, 2), different * torch.tensor(MASKED * LOG2E))
    assert torch.equal(~masks.signbit(), own > 0)  # from which the kernel makes the rows of queries
    assert len(masks_of(window_table((8, 8, 8), (4, 4, 4), (0, 0, 0)), HALF)) == 0


def test_it_takes_half_precision_in_windows_that_fit():
    def takes(n=343, width=16, dtype=HALF, target=HOPPER):
        return CudaAttention.takes(n, width, dtype, target)

    assert all(takes(target=target, dtype=dtype) for target in TARGETS for dtype in (HALF, BF16))
    assert all(takes(width=width) for width in (4, 8, 12))
    assert takes(8)
    assert takes(512)
    assert not takes(512, target=SMALL)
    assert not takes(1728)
    assert not takes(dtype=torch.float32)
    assert not takes(width=32)
    assert not takes(width=6)
    with pytest.raises(ValueError, match="windows of 64 tokens with heads of 32 channels"):
        table = window_table((4, 4, 4), (4, 4, 4), (0, 0, 0))
        CudaAttention(torch.zeros(1, 64, 64), table, 32, HALF, "cpu", KernelList())


@pytest.mark.parametrize(
    ("dtype", "width", "kind"),
    [(HALF, 16, CudaAttention), (BF16, 8, CudaAttention), (torch.float32, 16, TritonAttention),
     (HALF, 32, TritonAttention)],
)  # fmt: skip
def test_what_it_does_not_take_is_left_to_triton(dtype, width, kind):
    table = window_table((4, 4, 4), (4, 4, 4), (0, 0, 0))
    attention = HopperOperations(dtype, "cpu", KernelList()).attention(torch.zeros(1, 64, 64), table, width)
    assert type(attention) is kind


def test_every_form_fits_its_target():
    for target in TARGETS:
        for n in (8, 27, 64, 125, 216, 343, 512):
            for masks in (True, False):
                form = attention_form(n, 16, 3, "f16", target, masks=masks)
                if form is not None:
                    assert form.shared <= target.shared
                    assert form.parts * form.part >= form.tiles > (form.parts - 1) * form.part
    form = attention_form(343, 16, 3, "f16", HOPPER, masks=True)
    assert form == AttentionForm(343, 16, 3, "f16", masks=True, part=11, stages=3)
    assert form.shared == 176 * 352 * 2 + 3 * (2 * 352 * 32 + 176 * 32 + 352 * 16 + 12) + 512 + 8


@pytest.mark.parametrize(
    ("n", "heads", "images", "blocks"),
    [
        (343, 3, 2744, 132),
        (343, 3, 343, 132),
        (343, 6, 64, 132),
        (343, 12, 8, 120),
        (216, 24, 8, 120),
        (216, 24, 1, 24),
    ],
)
def test_blocks_are_no_more_than_multiprocessors_and_have_equal_parts(n, heads, images, blocks):
    form = attention_form(n, 16, heads, "f16", HOPPER, masks=False)
    full, last = form.blocks(images, 132)
    assert heads * ((form.parts - 1) * full + last) == blocks
    uneven = AttentionForm(343, 16, 3, "f16", masks=False, part=8, stages=2)
    assert uneven.blocks(1000, 132) == (16, 12)  # 8, 8 and 6 of 22 tiles


@pytest.mark.parametrize("shift", [0, 3])
def test_one_launch_computes_everything(shift):
    listed = []

    class Kernels(KernelList):
        def cuda(self, form, blocks, *arguments):
            listed.append((form, blocks, arguments))

    table = window_table((14, 14, 14), (7, 7, 7), (shift,) * 3)
    qkv = torch.zeros(2, 8 * 343, 3 * 48, dtype=HALF)
    out = CudaAttention(torch.zeros(3, 343, 343), table, 16, HALF, "cpu", Kernels())(qkv)
    ((form, blocks, (first, bias, masks, found, *numbers)),) = listed
    assert out.shape == (2, 8 * 343, 48)
    assert found is out
    assert first is qkv
    assert bias.numel() == 3 * 352 * 352
    assert f"#define MASKS {int(shift > 0)}\n" in form.source
    assert (masks is None) == (shift == 0)
    assert blocks == 3 * 2 * 16
    assert numbers == [16, 8, table.counts[0] if shift else 8, 16, 16]


@compiles
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_it_compiles_for_every_target(target):
    for n, width, kind, masks in ((343, 16, "f16", True), (343, 16, "bf16", True), (27, 12, "f16", False)):
        form = attention_form(n, width, 3, kind, target, masks=masks)
        cubin = compile_form(CudaForm(attention_source(form), "attend_windows", 512, form.shared), target)
        assert cubin.code.startswith(b"\x7fELF")
        assert cubin.compiler.startswith("nvrtc ")
