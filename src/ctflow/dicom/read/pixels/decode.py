"""Read many slices at once: decode compressed ones in processes, read native ones in threads."""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from ctflow.compat.pydicom import lenient
from ctflow.compat.python import bare_start
from ctflow.core.processes import begin_child, usable_cpus
from ctflow.core.shared_memory import SharedMemory
from ctflow.dicom.read.pixels.stored import PixelFormat, read_stored, unsupported
from ctflow.dicom.read.scan import Instance

# A process takes about 0.5 s to start, a 512 x 512 JPEG 2000 slice 40 ms to decode: fewer are faster in-process.
LEAST_SLICES = 64
MOST_PROCESSES = 8
MOST_THREADS = 8  # each reads and rescales several GB/s: more would wait for memory
_EACH = 2  # slices assigned to a process: the current one and the next
_AHEAD = 3  # slices of shared memory per process: decoded slices wait there for earlier ones

Slice = npt.NDArray[np.uint16]
_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass
class _Decoder:
    """A process, our end of its pipe, and the slices assigned to it, in that order."""

    process: SpawnProcess
    connection: Connection
    is_ready: bool = False
    given: deque[int] = field(default_factory=deque)

    def end(self) -> None:
        """End it at once: a process holds nothing that would be lost, and its slice may hang."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


class SliceReader:
    """Reads the slices of one series, in processes where that is faster.

    Processes start at once and `read` waits for them, so the caller can do other work meanwhile. `close` ends them.
    """

    def __init__(self, instances: Sequence[Instance]) -> None:
        """Args: instances: All slices, in any order."""
        self._shared: SharedMemory | None = None
        self._decoders: list[_Decoder] = []
        encoded = sum(instance.pixel_offset is None for instance in instances)
        count = min(usable_cpus(), MOST_PROCESSES)
        # A daemonic process may not have children.
        if encoded >= LEAST_SLICES and count >= 2 and not multiprocessing.current_process().daemon:
            try:
                self._start(count)
            except (OSError, ImportError) as error:
                self._give_up(type(error).__name__)
            except BaseException:  # no caller has this reader yet to close it
                self.close()
                raise

    def _start(self, count: int) -> None:
        # Not forked: this process may have threads and a GPU, which a fork does not survive.
        context = multiprocessing.get_context("spawn")
        self._shared = SharedMemory()
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_decoder, args=(theirs, self._shared), daemon=True)
            try:
                with bare_start():
                    process.start()
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            self._decoders.append(_Decoder(process, ours))

    def _give_up(self, why: str) -> None:
        self.close()
        facts = {"reason": "no-decoder"}
        log.warning("no decoder process starts; one process decodes all slices: %s", why, extra={"facts": facts})

    def close(self) -> None:
        """End the processes and release the shared memory."""
        for decoder in self._decoders:
            decoder.process.kill()
        for decoder in self._decoders:
            decoder.end()
        self._decoders = []
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def read(
        self, instances: Sequence[Instance], forms: Sequence[PixelFormat], rows: int, columns: int
    ) -> Generator[Slice, None, None]:
        """Read the stored values of every slice.

        Args:
            instances: The slices, in the order of the results.
            forms: The format of each.
            rows: Height of all.
            columns: Width of all.

        Yields:
            (rows, columns) uint16 of each slice, in order (see `read_stored`), valid until the next.

        Raises:
            BrokenSeries: The pixel data is shorter than the image.
            UnsupportedPixels: A slice does not decode, or crashed its decoder.
        """
        if self._shared is not None:
            shape = (len(self._decoders) * _AHEAD, rows, columns)
            try:
                slots = self._shared.allocate(shape, np.uint16)
            except (OSError, MemoryError) as error:
                self._give_up(type(error).__name__)
            else:
                yield from self._decoded(list(zip(instances, forms, strict=True)), slots)
                return
        for instance, form in zip(instances, forms, strict=True):
            yield read_stored(instance, form, rows, columns)

    def _decoded(self, slices: list[tuple[Instance, PixelFormat]], slots: Slice) -> Generator[Slice, None, None]:
        count, rows, columns = slots.shape
        outcomes: dict[int, Exception | None] = {}
        given = 0
        for d, (instance, form) in enumerate(slices):
            while True:
                given = self._give(slices, slots.shape, given, min(d + count, len(slices)))
                if d in outcomes or not self._decoders:
                    break
                self._receive(slices, outcomes)
            if d in outcomes:
                error = outcomes.pop(d)
                if error is not None:
                    raise error
            else:  # every process ended before it was assigned a slice
                slots[d % count] = read_stored(instance, form, rows, columns)
            yield slots[d % count]

    def _give(self, slices: list[tuple[Instance, PixelFormat]], shape: tuple[int, ...], given: int, until: int) -> int:
        """Assign slices from `given` on to processes with too few; return the next one to assign."""
        for _ in range(_EACH):
            for decoder in self._decoders:
                if given < until and decoder.is_ready and len(decoder.given) < _EACH:
                    instance, form = slices[given]
                    # The header stays here: a decoder needs less, and it holds the patient's name.
                    task = replace(instance, header=Dataset()), form, given % shape[0], shape
                    decoder.given.append(given)
                    given += 1
                    with suppress(OSError):  # it has ended; `_receive` notices
                        decoder.connection.send(task)
        return given

    def _receive(self, slices: list[tuple[Instance, PixelFormat]], outcomes: dict[int, Exception | None]) -> None:
        """Wait for messages of the processes: the outcome of a slice, or the end of a process."""
        heard = wait([decoder.connection for decoder in self._decoders])
        for decoder in [decoder for decoder in self._decoders if decoder.connection in heard]:
            try:
                word = decoder.connection.recv()
            except (EOFError, OSError):
                self._ended(decoder, slices, outcomes)
                continue
            if decoder.is_ready:
                outcomes[decoder.given.popleft()] = word
            decoder.is_ready = True

    def _ended(
        self,
        decoder: _Decoder,
        slices: list[tuple[Instance, PixelFormat]],
        outcomes: dict[int, Exception | None],
    ) -> None:
        self._decoders.remove(decoder)
        decoder.end()
        if decoder.given:
            instance, _ = slices[decoder.given[0]]
            what = "it crashed its decoder, or memory is short: have it sent again"
            outcomes[decoder.given[0]] = unsupported(instance, what, reason="decoder-ended")
        elif not self._decoders:
            facts = {"reason": "decoders-ended"}
            log.warning("the decoder processes have ended; one process decodes the rest", extra={"facts": facts})


@lenient()
def run_decoder(connection: Connection, shared: SharedMemory) -> None:
    """Decode slices into shared memory until the pipe is closed; the first message says that it is ready."""
    begin_child()
    with suppress(EOFError, OSError):  # the other end is closed
        connection.send(None)
        while True:
            connection.send(_outcome(shared, *connection.recv()))


def _outcome(
    shared: SharedMemory, instance: Instance, form: PixelFormat, slot: int, shape: tuple[int, int, int]
) -> Exception | None:
    """Decode a slice into its slot; return None, or the exception."""
    try:
        shared.array(shape, np.uint16)[slot] = read_stored(instance, form, shape[1], shape[2])
    except Exception as error:  # noqa: BLE001  # the parent raises it, as it would without a process in between
        return error
    return None


def in_threads(work: Callable[[int], _T], count: int) -> Generator[_T, None, None]:
    """Yield `work(0)` to `work(count - 1)` in order; several run at a time, for work that mostly releases the GIL."""
    with ThreadPoolExecutor(min(usable_cpus(), MOST_THREADS)) as pool:
        yield from pool.map(work, range(count))
