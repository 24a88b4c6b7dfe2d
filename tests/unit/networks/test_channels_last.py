from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet

from ctflow.networks.channels_last.swin_unetr import ChannelsLastSwinUNETR, takes_swin_unetr
from ctflow.networks.operations import TorchOperations

CUBE, SMALL = (64, 64, 64), (64, 32, 32)


def swin_unetr(**arguments) -> SwinUNETR:
    torch.manual_seed(0)
    given = {"in_channels": 1, "out_channels": 2, "feature_size": 12, **arguments}
    return SwinUNETR(**given).eval().requires_grad_(False)


def noise(batch: int, roi: tuple[int, int, int], channels: int = 1) -> torch.Tensor:
    return torch.rand(batch, channels, *roi, generator=torch.Generator().manual_seed(1))


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("roi", "batch", "arguments"),
    [
        pytest.param(CUBE, 2, {}, marks=pytest.mark.exhaustive),
        ((64, 32, 96), 1, {"feature_size": 24, "out_channels": 3}),
        ((32, 64, 32), 2, {"in_channels": 17}),
        (SMALL, 1, {"downsample": "mergingv2", "qkv_bias": False}),
        (SMALL, 1, {"window_size": 4, "depths": (1, 2, 3, 1)}),
        (SMALL, 1, {"use_flash_attention": True, "normalize": False}),
    ],
    ids=str,
)
def test_it_computes_what_monai_computes(roi, batch, arguments):
    network = swin_unetr(**arguments)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    windows = noise(batch, roi, arguments.get("in_channels", 1))
    assert takes_swin_unetr(network, roi)
    with torch.inference_mode():
        expected = network(windows)
        found = ChannelsLastSwinUNETR(network, roi, TorchOperations(torch.float32, "cpu"))(windows)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert relative_error(expected, found) <= 1e-5
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_half_precision_keeps_statistics_scores_and_sums_in_float32():
    """As close to fp32 as the number format allows; in half precision throughout it would be ten times as far."""
    network, roi = swin_unetr(), (64, 32, 32)
    windows = noise(1, roi)
    with torch.inference_mode():
        found = ChannelsLastSwinUNETR(network, roi, TorchOperations(torch.bfloat16, "cpu"))(windows)
        assert relative_error(network(windows), found) <= 4e-2


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_v2": True},
        {"patch_norm": True},
        {"norm_name": ("instance", {"affine": True})},
        {"norm_name": "batch"},
        {"norm_name": ("instance", {"track_running_stats": True})},
        {"in_channels": 12},
        {"patch_size": 1},
    ],
    ids=str,
)
def test_what_it_does_not_compute_it_does_not_take(arguments):
    assert not takes_swin_unetr(swin_unetr(**arguments), CUBE)


def test_it_takes_no_other_network_and_no_window_that_does_not_fit():
    unet = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=[4, 8], strides=[2])
    assert not takes_swin_unetr(unet, CUBE)
    assert not takes_swin_unetr(swin_unetr(), (48, 64, 64))
    assert not takes_swin_unetr(swin_unetr(), (32, 32, 32))  # MONAI refuses the norm of a single voxel
    with pytest.raises(ValueError, match="channels last"):
        ChannelsLastSwinUNETR(swin_unetr(), (48, 64, 64), TorchOperations(torch.float32, "cpu"))
