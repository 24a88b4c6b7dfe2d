"""Which networks are computed with channels last, and by which rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ctflow.core.volume import Size3
from ctflow.networks.channels_last.swin_unetr import ChannelsLastSwinUNETR, takes_swin_unetr
from ctflow.networks.channels_last.unet import ChannelsLastUNet, is_nnunet_module, problem_of_unet

KINDS = "SwinUNETR and nnU-Net's networks"
TAKEN = "SwinUNETR (first version, plain norms) and nnU-Net's networks (instance norms, leaky ReLU)"


def problem_of_network(network: nn.Module, roi: Size3) -> str | None:
    """Why a network is not computed with channels last, as the end of a sentence; None if it is."""
    if is_nnunet_module(network):
        return problem_of_unet(network, roi)
    return None if takes_swin_unetr(network, roi) else "it is another network, or has another form or window"


def channels_last_network(network: nn.Module, roi: Size3, ops: Any) -> Callable[[Tensor], Tensor]:
    """The rewrite of a network for windows of one size; arguments as of `ChannelsLastUNet`.

    Raises:
        ValueError: It is not supported; see `problem_of_network`.
    """
    made = ChannelsLastUNet if is_nnunet_module(network) else ChannelsLastSwinUNETR
    return made(network, roi, ops)
