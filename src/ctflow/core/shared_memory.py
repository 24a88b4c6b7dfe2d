"""Unnamed shared memory for arrays: the system frees it however a process ends."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt


class SharedMemory:
    """One array at a time in memory that a process shares with another that it starts.

    It is passed to a process as an argument at its start, and grows to the size of each array. It has no name that
    could outlive the processes, and no file system that could be full: Docker gives /dev/shm 64 MB.

    Args:
        descriptor: Of the memory to attach to; None makes an empty one.

    Raises:
        OSError: The system provides none.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _nameless_file() if descriptor is None else descriptor
        self._memory: mmap.mmap | None = None
        self._unpin: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[Callable[[Any], SharedMemory], tuple[Any]]:
        """Pickle it for a process that is being started; it cannot be sent otherwise."""
        return _joined, (DupFd(self._descriptor),)

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of this shape and type, with any content; earlier arrays then share its memory.

        Raises:
            MemoryError: There is not enough of it.
            OSError: It cannot be had for another reason, such as too many open files.
        """
        size = _bytes_of(shape, dtype)
        if size > os.fstat(self._descriptor).st_size:
            with _short_memory():
                os.ftruncate(self._descriptor, size)
        return self.array(shape, dtype)

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """What `allocate` returned, in either process; stays valid while referenced, even after `close`.

        Raises:
            MemoryError, OSError: As of `allocate`.
        """
        size = _bytes_of(shape, dtype)
        if self._memory is None or len(self._memory) < size:
            self._give_up()  # an earlier array may be the last that needs it
            with _short_memory():
                self._memory = mmap.mmap(self._descriptor, size)
        return np.frombuffer(self._memory, dtype, math.prod(shape)).reshape(shape)

    def pin(self, pin: Callable[[int, int], Callable[[], None] | None]) -> None:
        """Let a device's driver pin this process's view of the memory, until that is given up.

        Args:
            pin: Takes an address and a size in bytes, and returns what undoes it, or None if it cannot. Called once for
                each view.
        """
        if self._memory is not None and self._unpin is None:
            view = np.frombuffer(self._memory, np.uint8)
            self._unpin = pin(view.ctypes.data, view.nbytes) or _nothing

    def _give_up(self) -> None:
        if self._unpin is not None:
            self._unpin()
        self._memory = self._unpin = None

    def close(self) -> None:
        """Detach from the memory."""
        self._give_up()
        os.close(self._descriptor)
        self._descriptor = -1


def _nothing() -> None:
    """What undoes nothing."""


@contextmanager
def _short_memory() -> Iterator[None]:
    """Too little memory as a MemoryError, as of every other array; a limit of file sizes (`ulimit -f`) counts here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EFBIG):
            raise MemoryError from error
        raise


def _joined(descriptor: Any) -> SharedMemory:
    return SharedMemory(descriptor.detach())


def _nameless_file() -> int:
    """A file in memory, outside any file system that may be full; otherwise on the disk."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # some containers forbid it
            return os.memfd_create("ctflow")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _bytes_of(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    return max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
