"""nnU-Net's networks with channels last compute what the package computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from monai.networks.nets import UNet
from torch import nn

from ctflow.networks.build import network_from_model
from ctflow.networks.channels_last.choice import channels_last_network, problem_of_network
from ctflow.networks.channels_last.unet import ChannelsLastUNet
from ctflow.networks.head import fold_two_class_head
from ctflow.networks.operations import TorchOperations
from model_support import small_model

CUBE = (32, 32, 32)
PLAIN = {"n_conv_per_stage": 2}
RESIDUAL = {"n_blocks_per_stage": [1, 2, 3]}
SHARED = {
    "input_channels": 1, "num_classes": 3, "n_stages": 3, "features_per_stage": [8, 16, 24], "conv_op": nn.Conv3d,
    "kernel_sizes": 3, "strides": [1, 2, 2], "conv_bias": True, "n_conv_per_stage_decoder": [2, 2],
    "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
FLAT = {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}


def network_of(**arguments: Any) -> nn.Module:
    """A network with weights and norms that are not what they begin as."""
    torch.manual_seed(0)
    kind = ResidualEncoderUNet if "n_blocks_per_stage" in arguments else PlainConvUNet
    network = kind(**{**SHARED, **arguments}).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d) and module.affine:
            module.weight.normal_(1, 0.4)
            module.bias.normal_(0, 0.4)
    return network


def computed(
    network: nn.Module, windows: torch.Tensor, dtype: torch.dtype = torch.float32, kind: type = TorchOperations
) -> torch.Tensor:
    roi = tuple(windows.shape[2:])
    assert problem_of_network(network, roi) is None
    with torch.inference_mode():
        return channels_last_network(network, roi, kind(dtype, "cpu"))(windows)


class StoredNorms(TorchOperations):
    """Convolutions do not apply norms, so that what several read is stored after its norm."""

    def normalizes(self, weight, shares, size, stride=(1, 1, 1)):
        return False


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (PLAIN, (2, 1, *CUBE)),
        ({"n_conv_per_stage": [1, 2, 3], "n_conv_per_stage_decoder": [1, 3]}, (1, 1, 16, 32, 24)),
        ({**PLAIN, "input_channels": 3, "num_classes": 40}, (2, 3, 16, 16, 16)),
        ({**PLAIN, "conv_bias": False}, (1, 1, 16, 16, 16)),
        ({**PLAIN, "norm_op_kwargs": {"eps": 1e-5}}, (1, 1, 16, 16, 16)),
        ({**PLAIN, "dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}}, (1, 1, 16, 16, 16)),
        ({**PLAIN, **FLAT}, (2, 1, 6, 16, 24)),
        ({**PLAIN, "kernel_sizes": [3, 5, 3]}, (1, 1, 16, 16, 16)),
        (RESIDUAL, (2, 1, *CUBE)),
        ({**RESIDUAL, **FLAT, "input_channels": 2}, (1, 2, 6, 16, 24)),
        ({**RESIDUAL, "stem_channels": 12, "features_per_stage": [8, 16, 16]}, (1, 1, 16, 16, 16)),
    ],
    ids=str,
)
def test_it_computes_what_the_package_computes(arguments, shape):
    network = network_of(**arguments)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    windows = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(windows)
    found = computed(network, windows)
    assert found.is_contiguous()
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert relative_error(expected, found) <= 1e-5
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_it_computes_the_same_where_no_convolution_applies_norms():
    network, windows = network_of(**PLAIN), torch.rand(1, 1, *CUBE)
    with torch.inference_mode():
        expected = network(windows)
    stored = []

    class Counted(StoredNorms):
        def activated(self, x, norm):
            stored.append(x.shape[1:4])
            return super().activated(x, norm)

    assert relative_error(expected, computed(network, windows, kind=Counted)) <= 1e-5
    assert stored.count(CUBE) == 3  # before the second convolution of each block, and the skip once for both readers


@pytest.mark.parametrize("arguments", [PLAIN, RESIDUAL], ids=["plain", "residual"])
def test_half_precision_keeps_statistics_in_float32(arguments):
    network, windows = network_of(**arguments), torch.rand(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert relative_error(network(windows), computed(network, windows, torch.bfloat16)) <= 5e-2


def test_two_classes_become_their_difference():
    network, windows = network_of(**PLAIN, num_classes=2), torch.rand(1, 1, *CUBE)
    folded, is_folded = fold_two_class_head(network, TwoClasses(), probe=False)
    assert is_folded
    with torch.inference_mode():
        logits = network(windows)
    assert relative_error(logits[:, 1:] - logits[:, :1], computed(folded, windows)) <= 1e-5


class TwoClasses:
    activation, out_channels, threshold = "softmax", 2, None


@pytest.mark.parametrize(
    ("arguments", "roi", "named"),
    [
        (PLAIN, (32, 32, 30), "32 x 32 x 30 is no multiple of 4 x 4 x 4"),
        (PLAIN, (4, 4, 4), "a single voxel"),
        ({**PLAIN, "strides": [2, 2, 2]}, CUBE, "its first stage has the stride"),
        ({**PLAIN, "kernel_sizes": 2}, CUBE, "kernel of even size"),
        ({**PLAIN, "norm_op_kwargs": {"eps": 1e-3}}, CUBE, "eps 0.001, not 1e-05"),
        ({**PLAIN, "norm_op_kwargs": {"track_running_stats": True}}, CUBE, "InstanceNorm3d"),
        ({**PLAIN, "norm_op": nn.BatchNorm3d, "norm_op_kwargs": {}}, CUBE, "BatchNorm3d"),
        ({**PLAIN, "norm_op": None}, CUBE, "its norm is NoneType"),
        ({**PLAIN, "nonlin": nn.ReLU}, CUBE, "its activation is ReLU, not LeakyReLU"),
        ({**PLAIN, "nonlin": None}, CUBE, "its activation is NoneType"),
        ({**RESIDUAL, "nonlin": None}, CUBE, "its activation is NoneType"),
        ({**PLAIN, "nonlin_kwargs": {"negative_slope": 0.2}}, CUBE, "slope 0.2, not 0.01"),
        ({**PLAIN, "nonlin_first": True}, CUBE, "before the norms"),
        ({**PLAIN, "deep_supervision": True}, CUBE, "deep supervision"),
        ({**RESIDUAL, "block": BottleneckD, "bottleneck_channels": [4, 4, 4]}, CUBE, "BottleneckD"),
    ],
    ids=str,
)
def test_what_it_does_not_compute_it_names(arguments, roi, named):
    network = network_of(**arguments)
    assert named in problem_of_network(network, roi)
    with pytest.raises(ValueError, match="cannot be computed with channels last"):
        ChannelsLastUNet(network, roi, TorchOperations(torch.float32, "cpu"))


@pytest.mark.parametrize("name", ["averaged UNets", "DynUNet"])
def test_other_networks_are_not_taken(name):
    assert problem_of_network(network_from_model(small_model(name, CUBE)), CUBE) is not None
    unet = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=[4, 8], strides=[2])
    assert problem_of_network(unet, CUBE) is not None
