"""An array onto the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK_BYTES = 2**25  # pinned at once for an upload


def uploaded(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; it reaches a GPU through pinned memory in chunks, and nothing waits for it."""
    source = torch.from_numpy(array)
    if device.type != "cuda":
        return source.to(device)
    uploaded = torch.empty(source.shape, dtype=source.dtype, device=device)
    rows = max(_CHUNK_BYTES * len(source) // source.nbytes, 1)
    for start in range(0, len(source), rows):
        # torch keeps the pinned chunk until its copy is done, and then takes the same memory for another.
        chunk = source[start : start + rows].pin_memory()
        uploaded[start : start + rows].copy_(chunk, non_blocking=True)
    return uploaded
