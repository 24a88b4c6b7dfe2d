"""Convolutions of small volumes with many channels on a Hopper GPU, against plain PyTorch in fp32."""

from __future__ import annotations

import math

import pytest
import torch

from ctflow.engines import fused
from ctflow.kernels.gathered_convolution import GatheredConvolution, TilePlan
from ctflow.kernels.operations import HopperOperations
from ctflow.networks.operations import TorchOperations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not fused.is_available()[0] or fused.target_for("cuda:0").portable,
        reason="no Hopper GPU, or no cuda-bindings",
    ),
]
DEVICE = "cuda:0"
ROUNDING = {torch.float16: 6e-4, torch.bfloat16: 5e-3}  # of the largest value
CASES = [
    (1, (96,), 96, (24, 24, 24), TilePlan(4, 96)),
    (3, (96, 96), 96, (11, 6, 13), TilePlan(3, 96)),
    (3, (64, 64), 128, (5, 4, 3), TilePlan(4, 128, 5)),  # tiles with the end of one image and the begin of the next
    (1, (192,), 192, (12, 12, 12), TilePlan(2, 192)),
    (3, (64,), 320, (3, 3, 3), TilePlan(3, 160, 7)),
    (1, (160,), 48, (9, 8, 2), TilePlan(2, 48)),
    (3, (96,), 192, (12, 5, 12), TilePlan(2, 192, 2)),
    (3, (768,), 768, (3, 3, 3), None),
    (1, (320, 320), 320, (8, 8, 8), None),
    (3, (256,), 256, (16, 16, 16), None),
]


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """The reference is computed in fp32 without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


def volumes(batch: int, shares: tuple[int, ...], size: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(batch, *size, channels, device=DEVICE).to(dtype) for channels in shares]


def weights(cout: int, shares: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What the kernel has after rounding, so that the reference has the same."""
    return (torch.randn(cout, sum(shares), 3, 3, 3) / math.sqrt(27 * sum(shares))).to(dtype).float()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("batch", "shares", "cout", "size", "plan"), CASES, ids=str)
def test_it_is_the_convolution_and_its_sums(batch, shares, cout, size, plan, dtype):
    kernels = HopperOperations(dtype, DEVICE, fused.GpuKernels(DEVICE)).kernels
    x, weight = volumes(batch, shares, size, dtype), weights(cout, shares, dtype)
    convolution = GatheredConvolution(weight, shares, size, dtype, DEVICE, kernels, plan=plan)
    found, sums = convolution(x)
    expected, expected_sums = TorchOperations(torch.float32, DEVICE).convolution(weight, shares, size)(
        [part.float() for part in x], None
    )
    assert error_of(found, expected) <= ROUNDING[dtype]
    assert error_of(sums.sum(1, keepdim=True), expected_sums) <= 1e-4
    again, again_sums = convolution(x)
    assert torch.equal(found, again)
    assert torch.equal(sums, again_sums)


@pytest.mark.parametrize("normed", [96, 192])
def test_the_last_channels_are_normalised_first(normed):
    ops = HopperOperations(torch.float16, DEVICE, fused.GpuKernels(DEVICE))
    plain = TorchOperations(torch.float16, DEVICE)
    shares, size = (96, 96), (12, 7, 9)
    assert GatheredConvolution.takes((96, 192, 3, 3, 3), shares, size, torch.float16)
    x, weight = volumes(2, shares, size, torch.float16), weights(96, shares, torch.float16)
    norm = torch.rand(2, 2, normed, device=DEVICE) + 0.5
    found, sums = ops.convolution(weight, shares, size)(x, norm)
    expected, expected_sums = plain.convolution(weight, shares, size)(x, norm)
    assert error_of(found, expected.float()) <= 2e-3
    assert error_of(sums.sum(1, keepdim=True), expected_sums) <= 1e-3


@pytest.mark.parametrize("splits", [1, 4])
def test_memory_may_hold_anything_and_images_do_not_reach_into_each_other(splits):
    shares, size = (96,), (6, 6, 6)
    kernels = HopperOperations(torch.float16, DEVICE, fused.GpuKernels(DEVICE)).kernels
    weight = weights(128, shares, torch.float16)
    convolution = GatheredConvolution(
        weight, shares, size, torch.float16, DEVICE, kernels, plan=TilePlan(4, 128, splits)
    )
    x = volumes(3, shares, size, torch.float16)
    found, sums = convolution(x)
    x[0][1] = float("nan")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned, poisoned_sums = convolution(x)
    finally:
        torch.use_deterministic_algorithms(False)
    for image in (0, 2):
        assert torch.equal(poisoned[image], found[image])
        assert torch.equal(poisoned_sums[image], sums[image])
    assert poisoned[1].isnan().any()
