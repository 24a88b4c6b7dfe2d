from __future__ import annotations

import platform
import sys

import pytest
import torch
from torch.nn import functional

from ctflow.kernels.machine_code.compiler import compile_form
from ctflow.kernels.machine_code.forms import TARGETS, CudaForm
from ctflow.kernels.machine_code.launch import KernelList
from ctflow.kernels.portable_convolution import (
    PortableConvolution,
    PortableForm,
    source_of,
    tiles_of,
    weights_for_threads,
)

HALF = torch.float16
compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's run-time compiler is installed on Linux on x86-64 only",
)


@pytest.mark.parametrize("cout", [8, 24, 48])
def test_packed_weights_are_what_each_thread_multiplies(cout):
    """The kernel's order in plain tensors: the convolution, with its weights read as threads read them."""
    torch.manual_seed(0)
    cin, size = 32, (3, 4, 5)
    weight, x = torch.randn(cout, cin, 3, 3, 3), torch.randn(1, cin, *size)
    packed = weights_for_threads(weight, torch.float32).reshape(cin // 16, 3, 3, 3, -1)
    parts, seen = cout // 8, torch.zeros_like(weight)
    for lane in range(32):
        for part in range(parts):
            paired = part < parts // 2 * 2
            start = part // 2 * 256 + lane * 8 + part % 2 * 4 if paired else part * 128 + lane * 4
            numbers = packed[..., start : start + 4].permute(0, 3, 1, 2, 4)
            for number in range(4):
                channel = lane % 4 * 2 + number // 2 * 8 + number % 2
                seen[part * 8 + lane // 4, channel::16] += numbers[..., number]
    assert torch.equal(seen, weight)
    found, expected = (functional.conv3d(x, each, padding=1) for each in (seen, weight))
    assert torch.equal(found, expected)


def test_it_takes_what_is_large():
    def takes(cout, shares, size=(96, 96, 96), dtype=HALF, kernel=(3, 3, 3)):
        return PortableConvolution.takes((cout, sum(shares), *kernel), shares, size, dtype)

    assert takes(48, (48, 48))
    assert takes(48, (16,), kernel=(3, 1, 1), dtype=torch.bfloat16)
    assert takes(64, (64, 32), (32, 64, 128))
    assert not takes(48, (48,), dtype=torch.float32)
    assert not takes(48, (24,))
    assert not takes(12, (16,))
    assert not takes(72, (16,))
    assert not takes(48, (16, 16, 16))
    assert not takes(48, (48,), kernel=(5, 5, 5))
    assert not takes(48, (48,), (96, 96, 24))
    with pytest.raises(ValueError, match=r"no convolution from \(24,\) to 48"):
        PortableConvolution(torch.zeros(48, 24, 3, 3, 3), (24,), HALF, "cpu", KernelList())


@pytest.mark.parametrize(("size", "tiles"), [((96, 96, 96), 1728), ((4, 8, 16), 1), ((5, 9, 17), 8)])
def test_tiles_cover_the_volume(size, tiles):
    assert tiles_of(size) == tiles


@pytest.mark.parametrize("shares", [(32,), (32, 16)], ids=str)
@pytest.mark.parametrize("normalized", [True, False])
def test_one_launch_computes_everything(shares, normalized):
    listed = []

    class Kernels(KernelList):
        def cuda(self, form, blocks, *arguments):
            listed.append((form, blocks, arguments))

    weight = torch.randn(48, sum(shares), 3, 3, 3)
    volumes = [torch.zeros(2, 32, 40, 48, share, dtype=HALF) for share in shares]
    norm = torch.randn(2, 2, sum(shares)) if normalized else None
    out, sums = PortableConvolution(weight, shares, HALF, "cpu", Kernels())(volumes, norm)
    ((form, blocks, (first, second, packed, scale, found, found_sums, *numbers)),) = listed
    assert out.shape == (2, 32, 40, 48, 48)
    assert sums.shape == (2, 8 * 5 * 3, 2, 48)
    assert blocks == 132
    assert f"#define FIRST {shares[0]}\n" in form.source
    assert f"#define NORMALIZED {int(normalized)}\n" in form.source
    assert form.threads == 256
    assert first is volumes[0]
    assert second is (volumes[1] if len(shares) > 1 else None)
    assert packed.numel() == weight.numel()
    assert (scale is None) == (norm is None)
    assert found is out
    assert found_sums is sums
    assert numbers == [2, 32, 40, 48, 2 * 120]


def test_every_form_fits_every_target():
    for cout in range(8, 65, 8):
        for side in (1, 3):
            weight = torch.zeros(cout, 16, 3, side, side)
            kernels = KernelList()
            PortableConvolution(weight, (16,), HALF, "cpu", kernels)([torch.zeros(1, 4, 8, 16, 16, dtype=HALF)], None)
            (form,) = kernels.forms.values()
            assert form.shared <= min(target.shared for target in TARGETS)
    halo = 6 * 10 * 18
    form = PortableForm(48, 48, 48, 3, "f16", normalized=True)
    assert form.shared == 2 * 2 * (halo + 4) * 16 + 2 * 9 * 16 * 48 * 2 + 8 * 2 * 48 * 4


@compiles
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_it_compiles_for_every_target(target):
    for form in (
        PortableForm(96, 48, 48, 3, "f16", normalized=True),
        PortableForm(64, 64, 64, 3, "bf16", normalized=True),
        PortableForm(16, 16, 24, 1, "f16", normalized=False),
    ):
        cubin = compile_form(CudaForm(source_of(form), "convolve", 256, form.shared), target)
        assert cubin.code.startswith(b"\x7fELF")
        assert cubin.compiler.startswith("nvrtc ")
