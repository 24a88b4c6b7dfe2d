"""Steps with numbers that no honest bundle has: computed as MONAI does, or named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import CropForeground, Pad, Resize
from ctflow.transforms.crop import crop_foreground, pad
from ctflow.transforms.resample import resize
from ctflow.transforms.state import GridState
from reasons import raises_reason


def state(*shape: int) -> GridState:
    picks = tuple(np.arange(size) for size in shape)
    back = tuple(np.eye(size) for size in shape)
    return GridState(torch.ones(shape, dtype=torch.int16), np.eye(4), (0, 1, 2), back, picks)


@pytest.mark.parametrize("value", [40_000.0, -40_000.0, 1e9, 32_767.0, -0.5, 3.0])
def test_padding_with_any_number_keeps_it(value):
    found = pad(state(2, 2, 2), Pad("border", (1,) * 6, False, "constant", value)).image
    assert found.dtype == (torch.int16 if value in (32_767.0, 3.0) else torch.float32)
    assert float(found[0, 0, 0]) == value
    cropped = crop_foreground(state(2, 2, 2), CropForeground(1, value=value)).image
    assert float(cropped[0, 0, 0]) == value


@pytest.mark.parametrize("mode", ["area", "linear", "nearest", "nearest-exact"])
def test_an_axis_without_voxels_is_named(mode):
    with raises_reason(UnsupportedPixels, "scaling", names="Resized"):
        resize(state(256, 256, 2), Resize((32,), mode))
