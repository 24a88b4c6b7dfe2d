from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet
from monai.networks.nets.swin_unetr import compute_mask

from ctflow.networks.swin import (
    CPU_ATTENTION,
    GPU_ATTENTION,
    rewrite_for_export,
)
from ctflow.networks.swin_windows import MOST_PATTERNS, window_table

STYLES = (CPU_ATTENTION, GPU_ATTENTION)


def swin_unetr(**arguments) -> SwinUNETR:
    torch.manual_seed(0)
    given = {"in_channels": 1, "out_channels": 2, "feature_size": 12, **arguments}
    return SwinUNETR(**given).eval().requires_grad_(False)


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def noise(batch: int, roi: tuple[int, int, int], channels: int = 1) -> torch.Tensor:
    return torch.rand(batch, channels, *roi, generator=torch.Generator().manual_seed(1))


NAMES = dict(zip(("cpu", "gpu"), STYLES, strict=True))
# Every network with the attention that most engines get, every attention with windows of unlike sides.
MATRIX = [
    (roi, batch, arguments, name)
    for roi, batch, arguments in (
        ((64, 32, 96), 2, {}),
        ((64, 64, 64), 2, {}),
        ((96, 96, 96), 1, {}),
        ((32, 64, 32), 1, {"feature_size": 24, "in_channels": 2, "out_channels": 3}),
        ((64, 32, 32), 1, {"use_v2": True}),
        ((64, 32, 32), 1, {"downsample": "mergingv2", "qkv_bias": False}),
        ((64, 32, 32), 1, {"window_size": 4, "depths": (1, 2, 3, 1)}),
        ((64, 32, 32), 1, {"use_flash_attention": True, "patch_norm": True}),
        ((64, 32, 32), 1, {"normalize": False}),
    )
    for name in NAMES
]


def is_told_by_others(roi, _batch, arguments, name) -> bool:
    """Whether the others of the matrix also fail where this one fails because of the rewrite."""
    return not (name == "cpu" and arguments) and roi != (64, 32, 96)


@pytest.mark.parametrize(
    ("roi", "batch", "arguments", "attention"),
    [
        pytest.param(
            *(*entry[:3], NAMES[entry[3]]),
            id="-".join(map(str, entry)),
            marks=[pytest.mark.exhaustive] if is_told_by_others(*entry) else [],
        )
        for entry in MATRIX
    ],
)
def test_the_rewritten_network_computes_the_same(roi, batch, arguments, attention):
    network = swin_unetr(**arguments)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    rewritten = rewrite_for_export(network, roi, attention)
    assert rewritten is not network
    windows = noise(batch, roi, arguments.get("in_channels", 1))
    with torch.inference_mode():
        assert relative_error(network(windows), rewritten(windows)) <= 1e-5
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.fixture(scope="module")
def strong() -> tuple[SwinUNETR, torch.Tensor, torch.Tensor]:
    """A network whose large scores make masks and position tables matter, windows, and what it says of them.

    They also make rounding matter: so in double precision.
    """
    network = swin_unetr()
    for name, parameter in network.named_parameters():
        if "relative_position_bias_table" in name or "qkv" in name:
            parameter.mul_(20)
    network, windows = network.double(), noise(1, (64, 64, 64)).double()
    with torch.inference_mode():
        return network, windows, network(windows)


@pytest.mark.parametrize("attention", STYLES, ids=["cpu", "gpu"])
def test_strong_attention_is_the_same_too(strong, attention):
    network, windows, expected = strong
    rewritten = rewrite_for_export(network, (64, 64, 64), attention)
    with torch.inference_mode():
        assert relative_error(expected, rewritten(windows)) <= 1e-10


@pytest.mark.parametrize("size", [(48, 48, 48), (24, 24, 24), (12, 12, 12), (6, 6, 6), (32, 8, 7), (7, 14, 21)])
@pytest.mark.parametrize("shift", [(0, 0, 0), (3, 3, 3)])
def test_windows_and_masks_are_those_of_monai(size, shift):
    table = window_table(size, (7, 7, 7), shift)
    n, windows = int(np.prod(table.length)), sum(table.counts)
    assert len(table.counts) == len(table.regions) <= MOST_PATTERNS
    assert len(table.fetch) == windows * n
    # Every token goes to one place and comes back from it.
    assert np.array_equal(table.fetch[table.back], np.arange(np.prod(size)))
    own = tuple(0 if length <= 7 else step for length, step in zip(size, shift, strict=True))
    padded = [-(-length // side) * side for length, side in zip(size, table.length, strict=True)]
    if any(own):
        expected = compute_mask(padded, table.length, own, "cpu").numpy() != 0
        chosen = np.repeat(np.arange(len(table.counts)), table.counts)
        found = (table.regions[:, :, None] != table.regions[:, None, :])[chosen]
        # The same masks, sorted by pattern.
        assert sorted(mask.tobytes() for mask in found) == sorted(mask.tobytes() for mask in expected)
    else:
        assert not table.regions.any()


def test_no_dense_mask_is_kept():
    rewritten = rewrite_for_export(swin_unetr(), (96, 96, 96))
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in rewritten.buffers())
    assert buffers < 4_000_000


@pytest.mark.parametrize("roi", [(30, 32, 32), (48, 48, 48)])
def test_a_window_that_the_network_does_not_take_leaves_it_unchanged(roi):
    network = swin_unetr()
    assert rewrite_for_export(network, roi) is network


def test_other_networks_stay_as_they_are():
    unet = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=[4, 8], strides=[2])
    flat = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2)
    assert rewrite_for_export(unet, (32, 32, 32)) is unet
    assert rewrite_for_export(flat, (64, 64, 64)) is flat
