"""A model's result for one volume, and what all stages share; without torch, which reading and writing do not need."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctflow.core.errors import DeviceOutOfMemory
from ctflow.engines.contract import EngineInfo
from ctflow.export.figures import Agreement, Measured
from ctflow.window.body import Body


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A model's result for one volume.

    Attributes:
        labels: (D, H, W) uint8 on the source grid; 0 is background.
        fractions: (S, D, H, W) uint8, each segment's probability in 255ths, if a fractional SEG was requested.
        engine: The engine that computed it.
        window: Window settings as used: roi, overlap, blend, and the smallest batch size of any device; where not the
            whole volume was looked at, also which part, how many windows were computed, and of how many; how many hold
            a single HU value, if any do.
        warnings: Warnings about the computation of this volume.
        agreement: The engine's comparison, on this CT or an earlier one; None for PyTorch in fp32, the
            reference, and where a warning says why nothing was compared.
        measured: The engines from which "auto" chose, now or when it first chose here.
        body: Where the body is; None if none was found.
    """

    labels: npt.NDArray[np.uint8]
    engine: EngineInfo
    window: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    fractions: npt.NDArray[np.uint8] | None = None
    agreement: Agreement | None = None
    measured: tuple[Measured, ...] = ()
    body: Body | None = None


@contextmanager
def memory_of(device: str) -> Iterator[None]:
    """Turn any out-of-memory error of torch into the named one, with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # by name: it may come from torch, which is not imported here
            raise DeviceOutOfMemory(
                f"{device} has too little memory for this volume: end other programs on it, or use --device cpu"
            ) from error
        if "allocate memory" not in str(error):  # torch's CPU allocator has no error class
            raise
        raise DeviceOutOfMemory("this computer has too little memory for this volume") from error


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the wall time of a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
