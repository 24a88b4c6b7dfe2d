"""Upload an array to the device without waiting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK_BYTES = 2**25  # pinned at once for an upload
_FOR_ALL_GPUS = 1  # cudaHostRegisterPortable

log = logging.getLogger(__name__)


def uploaded(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Upload an array; it reaches a GPU from pinned memory, if need be in chunks through some, without waiting."""
    source = torch.from_numpy(array)
    if device.type != "cuda":
        return source.to(device)
    if source.is_pinned():
        return source.to(device, non_blocking=True)
    uploaded = torch.empty(source.shape, dtype=source.dtype, device=device)
    rows = max(_CHUNK_BYTES * len(source) // source.nbytes, 1)
    for start in range(0, len(source), rows):
        # torch keeps the pinned chunk until its copy is done, and then reuses the memory for another.
        chunk = source[start : start + rows].pin_memory()
        uploaded[start : start + rows].copy_(chunk, non_blocking=True)
    return uploaded


def pin_for_gpus(address: int, size: int) -> Callable[[], None] | None:
    """Pin memory so that GPUs read it at their link's speed, without this process's CPUs, which may be busy.

    Args:
        address: Of the memory, at the start of a page.
        size: In bytes.

    Returns:
        What unpins it, which must happen before the memory is unmapped; None if the driver refuses: uploads then copy
        in chunks.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(address, size, _FOR_ALL_GPUS))
    if code == 0:
        return partial(_unpin, address)
    log.info("uploads copy their data first: the driver pins no memory (CUDA error %d)", code)
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # takes the error, which CUDA would raise at the next launch
    return None


def _unpin(address: int) -> None:
    try:
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)  # an upload may still read it
    except RuntimeError as error:  # a fault of the device, which its case tells: nothing reads any more
        log.debug("the device does not answer before memory is unpinned (%s)", type(error).__name__)
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
