from __future__ import annotations

import platform
import sys

import pytest
import torch
from torch.nn import functional

from ctflow.core.errors import BackendUnavailable
from ctflow.kernels.compiler import compile_form
from ctflow.kernels.convolution import HopperConvolution, best_chunk, packed_weights, shared_bytes, source, units_of
from ctflow.kernels.forms import CudaForm
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
    assert HopperConvolution.takes(48, (48, 48), large, HALF)
    assert HopperConvolution.takes(48, (16,), large, torch.bfloat16)
    assert not HopperConvolution.takes(48, (48,), large, torch.float32)
    assert not HopperConvolution.takes(48, (96,), large, HALF)  # the weights alone are larger than shared memory
    assert not HopperConvolution.takes(72, (16,), large, HALF)  # more registers than a thread has
    assert not HopperConvolution.takes(48, (24,), large, HALF)
    assert not HopperConvolution.takes(12, (16,), large, HALF)
    assert not HopperConvolution.takes(96, (16,), large, HALF)
    assert not HopperConvolution.takes(48, (48,), (96, 96, 24), HALF)


@pytest.mark.parametrize("size", [(96, 96, 96), (48, 48, 48), (33, 70, 41)], ids=str)
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_pieces_cover_the_volume_and_fill_the_gpu(size, batch):
    chunk = best_chunk(batch, size, 132)
    assert 8 <= chunk <= size[0]
    assert units_of(size, chunk) * chunk * 24 * 8 >= size[0] * size[1] * size[2]
    rounds = -(-batch * units_of(size, chunk) // 132)
    for other in (8, 16, size[0]):
        assert rounds * (chunk + 2) <= -(-batch * units_of(size, other) // 132) * (other + 2)


def test_shared_memory_holds_what_the_kernel_keeps_there():
    weights, planes = 27 * 48 * 48 * 2, 4 * 26 * 10 * 48 * 2
    assert shared_bytes(48, 48) == weights + planes + 2 * 48 * 4 + 12 * 2 * 48 * 4 + 64
    assert shared_bytes(48, 48) <= 227 * 1024


@compiles
@pytest.mark.parametrize(("cin", "cout"), [(48, 48), (16, 48), (32, 24), (16, 64), (32, 8)])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_form_compiles_for_hopper(cin, cout, kind):
    forms = [(False, False, False), (True, False, False), (False, False, True), (False, True, False)]
    for normalized, adds, partial in forms:
        text = source(cin, cout, kind, normalized=normalized, adds=adds, partial=partial)
        cubin = compile_form(CudaForm(text, "convolve", 512, 1024))
        assert cubin.code.startswith(b"\x7fELF")
        assert (cubin.name, cubin.threads, cubin.shared, cubin.nulls) == ("convolve", 512, 1024, 0)
        assert cubin.compiler.startswith("nvrtc ")


@compiles
def test_what_the_compiler_says_is_told():
    with raises_reason(BackendUnavailable, "compiler-failed", names="identifier"):
        compile_form(CudaForm('extern "C" __global__ void convolve() { nothing(); }', "convolve", 512, 0))


def test_the_source_is_made_once_for_each_form():
    assert source(48, 48, "f16", normalized=True, adds=False, partial=False) is source(
        48, 48, "f16", normalized=True, adds=False, partial=False
    )
    assert "#define PARTIAL 1" in source(48, 48, "f16", normalized=False, adds=False, partial=True)
