"""Slices' stored values, one after another; compressed ones come from several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
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
from ctflow.processes import bare_start, begin_child

# A process starts in about a second, a JPEG 2000 slice of 512 x 512 takes 40 ms: fewer are sooner done here.
LEAST_SLICES = 64
LARGEST_POOL = 8
_AHEAD = 3  # slices that wait for each process: results must not pile up

Slice = npt.NDArray[np.uint16]

log = logging.getLogger(__name__)


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
    pool = _started_pool(workers) if encoded >= LEAST_SLICES and workers >= 2 else None
    if pool is not None:
        yield from _in_processes(pool, instances, forms, rows, columns, workers * _AHEAD)
        return
    for instance, form in zip(instances, forms, strict=True):
        yield read_stored(instance, form, rows, columns)


def _started_pool(workers: int) -> ProcessPoolExecutor | None:
    """A pool of running processes; None where the system gives none (a daemon's process, no semaphores, no memory)."""
    if multiprocessing.current_process().daemon:
        return None
    # Not forked: this process may have threads and a GPU, which a fork does not survive.
    try:
        with bare_start():
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin_child)
    except (OSError, ImportError) as error:
        log.warning("slices are decoded in one process, as none can be started: %s", type(error).__name__)
        return None
    try:
        with bare_start():
            first, *_ = [pool.submit(int) for _ in range(workers)]  # all start at once
            first.result()
    except (OSError, BrokenProcessPool) as error:
        pool.shutdown(wait=False, cancel_futures=True)
        log.warning("slices are decoded in one process, as none can be started: %s", type(error).__name__)
        return None
    return pool


def _in_processes(
    pool: ProcessPoolExecutor,
    instances: Sequence[Instance],
    forms: Sequence[PixelFormat],
    rows: int,
    columns: int,
    ahead: int,
) -> Generator[Slice, None, None]:
    waiting: deque[tuple[Instance, Future[Slice]]] = deque()

    def first() -> Slice:
        instance, future = waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool as error:
            what = "it, or a slice soon after it, ended its decoder, or memory is short: have it sent again"
            raise unsupported(instance, what) from error

    try:
        for instance, form in zip(instances, forms, strict=True):
            # The header stays here: it is larger than what a decoder needs, and holds the patient's name.
            small = replace(instance, header=Dataset())
            try:
                with bare_start():  # a process more may start here
                    future = pool.submit(read_stored, small, form, rows, columns)
            except BrokenProcessPool as error:  # an earlier slice's, which is the first of those that wait
                future = Future()
                future.set_exception(error)
            waiting.append((instance, future))
            if len(waiting) >= ahead:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
