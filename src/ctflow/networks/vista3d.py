"""MONAI's VISTA-3D with automatic prompts: the logits of fixed classes, without points that a user sets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME = "vista3d132"  # MONAI's function, whose only published weights are those of the bundle "vista3d"


class AutomaticVista3d(nn.Module):
    """The encoder, the decoder of classes and the head of VISTA-3D.

    The names of its weights are those of MONAI's network, including the branch of points, which is not computed.

    Args:
        classes: Indices of the classes, as in the bundle's `label_prompt`; the order of the logits' channels.
        background: Whether a channel of zeros comes before them, so that the argmax is MONAI's `VistaPostTransformd`:
            a voxel belongs to a class only if its logit is above 0.
        arguments: Those of MONAI's `vista3d132`.

    Raises:
        ValueError: There are no classes.
    """

    def __init__(self, classes: Sequence[int], *, background: bool = False, **arguments: Any) -> None:
        super().__init__()
        if not classes:
            raise ValueError(f"{NAME} needs classes")
        self._count, self._background = len(classes), background
        made = importlib.import_module("monai.networks.nets").vista3d132(**arguments)
        self.image_encoder, self.point_head, self.class_head = made.image_encoder, made.point_head, made.class_head
        # A single class is asked for twice: MONAI's class head squeezes away the axis of one.
        self.register_buffer(
            "_classes", torch.tensor([*classes, *classes[:1]])[: max(len(classes), 2), None], persistent=False
        )

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, classes, D, H, W)."""
        features = self.image_encoder(windows, with_point=False, with_label=True)[1]
        logits: Tensor = self.class_head(features, self._classes)[0]
        logits = logits.transpose(0, 1)[:, : self._count]
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1) if self._background else logits
