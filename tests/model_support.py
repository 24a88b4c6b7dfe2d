"""A small network for tests of engines: random weights, which are the same each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.networks.nets import UNet

from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.core.volume import Size3


def unet_model(arguments: Mapping[str, Any], roi: Size3) -> Model:
    """A model of two classes with a UNet of these arguments."""
    torch.manual_seed(0)
    network = UNet(**arguments)
    spec = ModelSpec(
        "m", "1", NetworkSpec("UNet", arguments), 1, 2, (), roi, 0.25, "gaussian", 4, "softmax", None, (), "", False
    )
    return Model(spec, network.state_dict(), "d" * 64)
