from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR, BasicUNet, SegResNet, SwinUNETR, UNet
from torch import nn

from ctflow.core.model import ModelSpec, NetworkSpec
from ctflow.networks.head import fold_two_class_head

ROI = (64, 32, 32)


def spec_of(activation: str = "softmax", channels: int = 2, threshold: float | None = None) -> ModelSpec:
    return ModelSpec(
        "m", "1", NetworkSpec("UNet", {}), 1, channels, (), ROI, 0.25, "constant", 1, activation, threshold, (), "",
        False,
    )  # fmt: skip


def made(network: type[nn.Module], **arguments) -> nn.Module:
    torch.manual_seed(0)
    return network(in_channels=1, out_channels=2, **arguments).eval().requires_grad_(False)


FOLDED = {
    "SwinUNETR": (SwinUNETR, {"feature_size": 12}),
    "UNETR": (UNETR, {"img_size": ROI, "feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2}),
    "SegResNet": (SegResNet, {"init_filters": 8}),
    "BasicUNet": (BasicUNet, {"features": (4, 4, 8, 8, 8, 4)}),
}


@pytest.mark.parametrize("name", FOLDED)
def test_one_channel_says_what_two_did(name):
    kind, arguments = FOLDED[name]
    network = made(kind, **arguments)
    one, folded = fold_two_class_head(network, spec_of())
    assert folded
    windows = torch.rand(1, 1, *ROI, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        two, difference = network(windows), one(windows)
    assert difference.shape == (1, 1, *ROI)
    assert (difference.sigmoid() - two.softmax(1)[:, 1:2]).abs().max() <= 1e-5
    marked, expected = difference[:, 0] > 0, two.argmax(1) > 0
    # Only where the two logits are equal to the last digit may rounding decide.
    assert (two[:, 1] - two[:, 0])[marked != expected].abs().max() <= 1e-6 if bool((marked != expected).any()) else True


@pytest.mark.parametrize(
    "spec",
    [spec_of("sigmoid"), spec_of("none"), spec_of(channels=3), spec_of(threshold=0.3)],
    ids=lambda s: s.activation,
)
def test_other_models_keep_their_channels(spec):
    network = made(BasicUNet)
    assert fold_two_class_head(network, spec) == (network, False)


class Scaled(nn.Module):
    """A last convolution whose output is not the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 2, 1)

    def forward(self, x):
        return self.convolution(x).square()


class Swapped(Scaled):
    """The convolution that was registered last is not the last that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv3d(1, 2, 1)

    def forward(self, x):
        return self.convolution(x) + 0 * self.other(x)


@pytest.mark.parametrize("network", [Scaled(), Swapped(), nn.Conv3d(1, 2, 1), nn.Identity()], ids=repr)
def test_a_head_that_is_not_plain_is_left_alone(network):
    assert fold_two_class_head(network, spec_of()) == (network, False)


def test_a_residual_head_is_left_alone():
    network = made(UNet, spatial_dims=3, channels=[4, 8], strides=[2], num_res_units=1)
    assert fold_two_class_head(network, spec_of()) == (network, False)
