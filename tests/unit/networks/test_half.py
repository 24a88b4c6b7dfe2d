from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctflow.networks.half import (
    FullPrecisionNorm,
    WrittenLeakyReLU,
    WrittenNorm,
    with_half_precision,
    with_written_norms,
)
from ctflow.networks.swin import GPU_ATTENTION, rewrite_for_export

ROI = (64, 32, 32)


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


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(12), (2, 5, 12)),
        (nn.LayerNorm((3, 12)), (2, 5, 3, 12)),
        (nn.LayerNorm(12, elementwise_affine=False), (2, 5, 12)),
        (nn.InstanceNorm3d(4), (2, 4, 3, 5, 7)),
        (nn.InstanceNorm3d(4, affine=True), (2, 4, 3, 5, 7)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 5, 7)),
        (nn.GroupNorm(4, 4, affine=False), (2, 4, 3, 5, 7)),
        (nn.GroupNorm(2, 4), (2, 4, 9)),
    ],
    ids=str,
)
def test_a_written_norm_is_the_norm(norm, shape):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = noise(*shape) * 30 + 7
    with torch.inference_mode():
        expected, found = norm(x), WrittenNorm(norm)(x)
    assert found.shape == expected.shape
    assert relative_error(expected, found) <= 1e-5


class Largest(TorchDispatchMode):
    """Remembers the largest number that any operation gives."""

    found = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.found = max(self.found, float(result.abs().max()))
        return result


@pytest.mark.parametrize("channels", [48, 768, 3072])
def test_no_step_of_a_written_layer_norm_leaves_half_precision(channels):
    norm = nn.LayerNorm(channels)
    tokens = noise(2, 27, channels) * 90 + 30  # a trained network's last tokens deviate by 90
    with torch.inference_mode():
        expected = norm(tokens)
        with Largest() as largest:
            found = WrittenNorm(norm)(tokens)
    assert (tokens * tokens).sum(-1).max() > torch.finfo(torch.float16).max
    assert largest.found < 20000
    assert relative_error(expected, found) <= 1e-5


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.1, inplace=True), nn.PReLU(), nn.PReLU(4, init=0.3)], ids=["leaky", "PReLU", "PReLU4"]
)
def test_a_written_activation_is_the_activation(activation):
    network = nn.Sequential(nn.Conv3d(1, 4, 1), activation).eval().requires_grad_(False)
    written = with_written_norms(network)
    assert isinstance(written[1], WrittenLeakyReLU)
    with torch.inference_mode():
        assert torch.equal(written(noise(2, 1, 3, 5, 7)), network(noise(2, 1, 3, 5, 7)))


def test_a_module_that_is_used_twice_is_written_at_both_places():
    activation, norm = nn.LeakyReLU(0.2), nn.InstanceNorm3d(2)
    network = nn.Sequential(nn.Conv3d(1, 2, 1), norm, activation, nn.Conv3d(2, 2, 1), norm, activation).eval()
    written = with_written_norms(network)
    assert [type(written[place]) for place in (1, 2, 4, 5)] == [WrittenNorm, WrittenLeakyReLU] * 2
    with torch.inference_mode():
        assert relative_error(network(noise(1, 1, 4, 4, 4)), written(noise(1, 1, 4, 4, 4))) <= 1e-5


def test_slopes_belong_to_channels_whatever_follows_them():
    for shape in [(2, 4), (2, 4, 9), (2, 4, 3, 5, 7)]:
        activation = nn.PReLU(4)
        activation.weight.data = torch.tensor([0.1, 0.2, 0.3, 0.4])
        assert torch.equal(WrittenLeakyReLU(activation)(noise(*shape)), activation(noise(*shape)))


def test_statistics_that_an_engine_rounds_cost_little(monkeypatch):
    """TensorRT 8.5 rounds means and variances to half precision; far from zero this must not cost the variance."""
    mean = torch.Tensor.mean
    monkeypatch.setattr(torch.Tensor, "mean", lambda *args, **named: mean(*args, **named).half().float())
    norm, x = nn.InstanceNorm3d(1), noise(1, 1, 8, 8, 8) + 20
    assert relative_error(norm(x), WrittenNorm(norm)(x)) <= 2e-3


def test_a_network_with_written_norms_computes_the_same(swin):
    written = with_written_norms(swin)
    assert not [module for module in written.modules() if isinstance(module, nn.LayerNorm | nn.InstanceNorm3d)]
    with torch.inference_mode():
        assert relative_error(swin(noise(1, 1, *ROI)), written(noise(1, 1, *ROI))) <= 2e-5
    assert [module for module in swin.modules() if isinstance(module, nn.InstanceNorm3d)]  # it stays as it was


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
    half, seen = with_half_precision(with_written_norms(swin), torch.float16), {}
    for name, module in half.named_modules():
        if isinstance(module, WrittenNorm | nn.Linear | nn.Conv3d | nn.LeakyReLU):
            module.register_forward_pre_hook(lambda m, given, name=name: seen.update({name: (m, given[0].dtype)}))
    with torch.inference_mode():
        half(noise(1, 1, *ROI))
    norms = {dtype for module, dtype in seen.values() if isinstance(module, WrittenNorm)}
    others = {dtype for module, dtype in seen.values() if not isinstance(module, WrittenNorm)}
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
