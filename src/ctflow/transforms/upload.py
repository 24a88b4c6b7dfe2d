"""Upload an array to the device without waiting."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK_BYTES = 2**25  # pinned at once for an upload


def uploaded(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Upload an array; it reaches a GPU in chunks through pinned memory, without waiting."""
    source = torch.from_numpy(array)
    if device.type != "cuda":
        return source.to(device)
    uploaded = torch.empty(source.shape, dtype=source.dtype, device=device)
    rows = max(_CHUNK_BYTES * len(source) // source.nbytes, 1)
    for start in range(0, len(source), rows):
        # torch keeps the pinned chunk until its copy is done, and then reuses the memory for another.
        chunk = source[start : start + rows].pin_memory()
        uploaded[start : start + rows].copy_(chunk, non_blocking=True)
    return uploaded
