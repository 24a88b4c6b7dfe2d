"""Slices' stored values, one after another; compressed ones come from several processes, as threads do not help."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from ctflow.dicom.pixels import PixelFormat, read_stored, unsupported
from ctflow.dicom.scan import Instance

# A process starts in about a second, a JPEG 2000 slice of 512 x 512 takes 26 ms: fewer are sooner done here.
LEAST_SLICES = 64
LARGEST_POOL = 8
_AHEAD = 3  # slices that wait for each process: results must not pile up

Slice = npt.NDArray[np.uint16]


def read_slices(
    instances: Sequence[Instance], forms: Sequence[PixelFormat], rows: int, columns: int
) -> Generator[Slice, None, None]:
    """Read the stored values of every slice.

    Args:
        instances: The slices.
        forms: The format of each.
        rows: Height of all.
        columns: Width of all.

    Yields:
        (rows, columns) uint16 of each slice, in order (see `read_stored`). Closing the generator ends the processes.

    Raises:
        BrokenSeries: The pixel data is shorter than the image.
        UnsupportedPixels: A slice does not decode, or a decoder did not survive it.
    """
    encoded = sum(instance.pixel_offset is None for instance in instances)
    workers = min(_cores(), LARGEST_POOL)
    if encoded < LEAST_SLICES or workers < 2:
        for instance, form in zip(instances, forms, strict=True):
            yield read_stored(instance, form, rows, columns)
        return
    yield from _in_processes(instances, forms, rows, columns, workers)


def _in_processes(
    instances: Sequence[Instance], forms: Sequence[PixelFormat], rows: int, columns: int, workers: int
) -> Generator[Slice, None, None]:
    # Not forked: this process may have threads and a GPU, which a fork does not survive.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    waiting: deque[tuple[Instance, Future[Slice]]] = deque()

    def first() -> Slice:
        instance, future = waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise unsupported(
                instance, "it, or a slice soon after it, ended its decoder: have it sent again"
            ) from error

    try:
        for instance, form in zip(instances, forms, strict=True):
            # The header stays here: it is larger than what a decoder needs, and holds the patient's name.
            small = replace(instance, header=Dataset())
            waiting.append((instance, pool.submit(read_stored, small, form, rows, columns)))
            if len(waiting) >= workers * _AHEAD:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
