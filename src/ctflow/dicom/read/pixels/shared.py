"""Memory that this process and its decoders share: a slice is written where it is read, and nothing else is sent."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

_ITEM_BYTES = 2


class SharedSlices:
    """Room for slices of uint16 without a name: whatever ends which process, the system takes it back.

    It goes to a process as an argument of its start, and gets its size when that is known.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Make an empty room, or join one.

        Args:
            descriptor: Of the room to join.

        Raises:
            OSError: The system gives none.
        """
        self._descriptor = _nameless_file() if descriptor is None else descriptor
        self._shape: tuple[int, int, int] | None = None
        self._array: npt.NDArray[np.uint16] | None = None

    def __reduce__(self) -> tuple[Callable[[Any], SharedSlices], tuple[Any]]:
        """What a process that is being started gets; there is no other way to send one."""
        return _joined, (DupFd(self._descriptor),)

    def allocate(self, shape: tuple[int, int, int]) -> npt.NDArray[np.uint16]:
        """Give the room its size: (slices, rows, columns).

        Raises:
            OSError: There is no space for it.
        """
        os.ftruncate(self._descriptor, _bytes_of(shape))
        return self.array(shape)

    def array(self, shape: tuple[int, int, int]) -> npt.NDArray[np.uint16]:
        """The room of this size; the array lives as long as anyone refers to it, also after `close`."""
        if self._array is None or shape != self._shape:
            self._shape = shape
            self._array = np.frombuffer(mmap.mmap(self._descriptor, _bytes_of(shape)), np.uint16).reshape(shape)
        return self._array

    def close(self) -> None:
        """Leave the room."""
        os.close(self._descriptor)
        self._array = None


def _joined(descriptor: Any) -> SharedSlices:
    return SharedSlices(descriptor.detach())


def _nameless_file() -> int:
    """In memory, and of no file system that may be full; else on the disk."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # some containers forbid it
            return os.memfd_create("ctflow-slices")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _bytes_of(shape: tuple[int, int, int]) -> int:
    slices, rows, columns = shape
    return slices * rows * columns * _ITEM_BYTES
