"""Every window also mirrored, and the logits averaged: test-time augmentation as nnU-Net does it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ctflow.window.devices import Predict


def mirrored(predict: Predict, axes: Sequence[int]) -> Predict:
    """Average the logits of each window and of its mirror images.

    Args:
        predict: (B, C_in, *roi) -> (B, C, *roi); may return the same memory at every call.
        axes: Axes of the window, 0 to 2, that are mirrored in all combinations; none leaves `predict` as it is.

    Returns:
        The same function of the mean: of 2 ** len(axes) calls.

    Source: nnU-Net 2.8.1 `_internal_maybe_mirror_and_predict`.
    """
    if not axes:
        return predict
    dims = [axis + 2 for axis in axes]
    flips = [some for count in range(1, len(dims) + 1) for some in itertools.combinations(dims, count)]

    def mean(windows: Tensor) -> Tensor:
        total = predict(windows).clone()
        for some in flips:
            total += predict(windows.flip(some)).flip(some)
        return total / (len(flips) + 1)

    return mean
