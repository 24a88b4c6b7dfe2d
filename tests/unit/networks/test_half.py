from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet
from torch import nn

from ctflow.networks.half import (
    FullPrecisionNorm,
    with_half_precision,
)
from ctflow.networks.swin import GPU_ATTENTION, rewrite_for_export

ROI = (64, 32, 32)
NORMS = nn.LayerNorm | nn.InstanceNorm3d


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    torch.manual_seed(0)
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=12).eval().requires_grad_(False)
    return rewrite_for_export(network, ROI, GPU_ATTENTION)


def unet(norm: object) -> nn.Module:
    torch.manual_seed(0)
    return UNet(3, 1, 2, [8, 16], [2], norm=norm).eval().requires_grad_(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("norm", ["instance", "batch", ("group", {"num_groups": 2})], ids=str)
def test_half_precision_stays_near_fp32(dtype, tolerance, norm):
    network = unet(norm)
    half = with_half_precision(network, dtype)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    with torch.inference_mode():
        found = half(noise(1, 1, 16, 16, 16))
        assert found.dtype == torch.float32
        assert relative_error(network(noise(1, 1, 16, 16, 16)), found) <= tolerance


def test_statistics_are_in_fp32_and_products_in_half_precision(swin):
    """A transformer of half precision: what each operation is given, seen while it runs."""
    half, seen = with_half_precision(swin, torch.float16), {}
    for name, module in half.named_modules():
        if isinstance(module, NORMS | nn.Linear | nn.Conv3d | nn.LeakyReLU):
            module.register_forward_pre_hook(lambda m, given, name=name: seen.update({name: (m, given[0].dtype)}))
    with torch.inference_mode():
        half(noise(1, 1, *ROI))
    norms = {dtype for module, dtype in seen.values() if isinstance(module, NORMS)}
    others = {dtype for module, dtype in seen.values() if not isinstance(module, NORMS)}
    assert norms == {torch.float32}
    assert others == {torch.float16}


def test_a_norm_does_not_overflow_where_half_precision_would():
    norm = nn.InstanceNorm3d(1)
    x = (noise(1, 1, 8, 8, 8) * 600).half()  # squares lie beyond 65504
    with torch.inference_mode():
        found = FullPrecisionNorm(norm, torch.float16)(x)
        expected = norm(x.double())
    assert torch.isfinite(found).all()
    assert relative_error(expected, found.double()) <= 2e-3


def test_a_running_variance_beyond_half_precision_is_kept():
    norm = nn.Sequential(nn.Conv3d(1, 1, 1), nn.BatchNorm3d(1)).eval().requires_grad_(False)
    norm[0].weight.fill_(1.0)
    norm[1].running_var.fill_(7e4)
    norm[1].weight.fill_(100.0)
    half = with_half_precision(norm, torch.float16)
    with torch.inference_mode():
        expected, found = norm(noise(1, 1, 4, 4, 4)), half(noise(1, 1, 4, 4, 4))
    assert relative_error(expected, found) <= 2e-3
