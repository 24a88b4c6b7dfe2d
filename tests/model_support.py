"""Small networks for tests of engines: random weights, which are the same each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets import UNet

from ctflow.bundle.weights import digest_of_ensemble, weights_digest
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.core.volume import Size3
from ctflow.networks.build import network_from_spec

_SHARED = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
_TOPOLOGY = {
    "_target_": "TopologyInstance", "channel_mul": 0.125, "num_blocks": 2, "num_depths": 2, "use_downsample": True,
    "arch_code": [[[1, 0, 1, 1], [1, 1, 0, 1]], [[1, 2, 3, 4], [4, 0, 1, 2]]],
}  # fmt: skip
_STAGES = {
    "input_channels": 1, "num_classes": 3, "n_stages": 3, "features_per_stage": [4, 8, 8],
    "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "conv_bias": True, "n_conv_per_stage_decoder": [1, 1],
    "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
    "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
_NNUNET = "dynamic_network_architectures.architectures.unet."
_UNET = {**_SHARED, "channels": [4, 8], "strides": [2]}
# Of three classes, for windows whose sides are multiples of 16.
SMALL = {
    "averaged UNets": NetworkSpec("UNet", _UNET, members=3, shares=(0.5, 0.375, 0.125)),
    "stacked UNets": NetworkSpec("UNet", _UNET, members=2, combined="votes"),
    "SegResNet": NetworkSpec("SegResNet", {**_SHARED, "init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1],
                                           "dropout_prob": 0.2}),
    "DynUNet": NetworkSpec("DynUNet", {**_SHARED, "kernel_size": [3, 3, 3], "strides": [1, 2, [2, 2, 1]],
                                       "upsample_kernel_size": [2, [2, 2, 1]], "filters": [4, 8, 8],
                                       "norm_name": "instance", "deep_supervision": False, "res_block": True}),
    "DiNTS": NetworkSpec("DiNTS", {"dints_space": _TOPOLOGY, "in_channels": 1, "num_classes": 3,
                                   "use_downsample": True, "node_a": [[1, 1], [1, 1], [1, 1]]}),
    "VISTA3D": NetworkSpec("vista3d132", {"classes": [1, 3, 14], "encoder_embed_dim": 8, "in_channels": 1}),
    "PlainConvUNet": NetworkSpec(_NNUNET + "PlainConvUNet", {**_STAGES, "n_conv_per_stage": [1, 1, 1]}),
    "ResidualEncoderUNet": NetworkSpec(_NNUNET + "ResidualEncoderUNet", {**_STAGES, "n_blocks_per_stage": [1, 1, 1]}),
}  # fmt: skip


def unet_model(arguments: Mapping[str, Any], roi: Size3) -> Model:
    """A model of two classes with a UNet of these arguments."""
    torch.manual_seed(0)
    return _model(NetworkSpec("UNet", arguments), UNet(**arguments), 2, roi)


def small_model(name: str, roi: Size3) -> Model:
    """A model of three classes with one of the networks of `SMALL`."""
    torch.manual_seed(0)
    channels = 3 * (SMALL[name].members if SMALL[name].is_stacked else 1)
    return _model(SMALL[name], network_from_spec(SMALL[name]), channels, roi)


def _model(network: NetworkSpec, made: torch.nn.Module, classes: int, roi: Size3) -> Model:
    spec = ModelSpec(
        "m", "1", network, 1, classes, (), roi, 0.25, "gaussian", 4, "softmax", None, (), "", False
    )  # fmt: skip
    weights = made.state_dict()
    return Model(spec, weights, digest_of_ensemble(weights_digest(weights), network))
