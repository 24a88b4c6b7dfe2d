"""MONAI's VISTA-3D with automatic prompts: the logits of fixed classes, without points that a user sets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME = "vista3d132"  # MONAI's function, whose only published weights are those of the bundle "vista3d"
_FEWEST = 2  # MONAI's class head squeezes away the axis of a single class


class AutomaticVista3d(nn.Module):
    """The encoder, the decoder of classes and the head of VISTA-3D.

    The names of its weights are those of MONAI's network, including the branch of points, which is not computed.

    Args:
        classes: Indices of the classes, as in the bundle's `label_prompt`; the order of the logits' channels.
        arguments: Those of MONAI's `vista3d132`.

    Raises:
        ValueError: There are fewer than two classes.
    """

    def __init__(self, classes: Sequence[int], **arguments: Any) -> None:
        super().__init__()
        if len(classes) < _FEWEST:
            raise ValueError(f"{NAME} needs at least {_FEWEST} classes")
        made = importlib.import_module("monai.networks.nets").vista3d132(**arguments)
        self.image_encoder, self.point_head, self.class_head = made.image_encoder, made.point_head, made.class_head
        self.register_buffer("_classes", torch.tensor(classes)[:, None], persistent=False)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, classes, D, H, W)."""
        features = self.image_encoder(windows, with_point=False, with_label=True)[1]
        logits: Tensor = self.class_head(features, self._classes)[0]
        return logits.transpose(0, 1)
