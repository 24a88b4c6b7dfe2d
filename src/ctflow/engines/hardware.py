"""The hardware here: the GPU, its driver, torch's arithmetic switches.

The switches belong to the whole process, and calls of several threads at the same time may want different ones.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ctflow.core.errors import DeviceOutOfMemory
from ctflow.engines.contract import Precision

_SwitchValues = tuple[bool, bool, bool]  # tf32 of products, tf32 of cuDNN, determinism of cuDNN


def gpu_identity(device: str) -> str:
    """Name, compute capability and driver of a GPU: a plan runs on no other."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, compute capability {found.major}.{found.minor}, driver {driver_version()}"


def driver_version() -> str:
    """The NVIDIA driver's version, from its own library; "unknown" where that cannot be queried."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return "unknown"
    try:
        return text.value.decode() if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0 else "unknown"
    finally:
        nvml.nvmlShutdown()


@contextmanager
def memory_for(what: str, device: str) -> Iterator[None]:
    """Name what a GPU has too little memory for.

    Raises:
        DeviceOutOfMemory: In place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(f"{device} has too little memory for {what}") from error


class _Switches:
    """The switches of the calls in progress: the first call sets them, the last one restores them."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._calls = 0
        self._wanted = self._before = (False, False, False)

    def enter(self, wanted: _SwitchValues) -> None:
        # A caller that waits here holds the turn, so that calls with the other setting cannot starve it.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._calls or self._wanted == wanted)
            if not self._calls:
                self._before, self._wanted = _values(), wanted
                _set(wanted)
            self._calls += 1

    def leave(self) -> None:
        with self._changed:
            self._calls -= 1
            if not self._calls:
                _set(self._before)
                self._changed.notify_all()


@contextmanager
def switches(precision: Precision) -> Iterator[None]:
    """Enable tf32 only for calls inside that ask for it, with the same result each time; then restore the switches.

    Calls of several threads overlap if they want the same setting; else the later one waits. Do not nest them.

    Args:
        precision: Number format of the heavy arithmetic.
    """
    tf32 = precision == "tf32"
    # cuDNN's transposed convolutions in fp32 sum in another order each time, and the SEG must be the same file.
    _SHARED.enter((tf32, tf32, True))
    try:
        yield
    finally:
        _SHARED.leave()


def _values() -> _SwitchValues:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic


def _set(values: _SwitchValues) -> None:
    cudnn = torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = values


_SHARED = _Switches()
