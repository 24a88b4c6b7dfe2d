"""Compares two images whose pixels must be decoded for that, in a process of its own.

Decoders are written in C and read what any peer may send. So the node does not decode: a process does, with limits of
time, memory and files; if it exceeds them, or crashes, it is ended, and the images count as different.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import threading
from io import BytesIO
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom import uid

from ctflow.compat.pydicom import lenient
from ctflow.compat.python import bare_start
from ctflow.core.processes import begin_child
from ctflow.dicom.read.pixels.stored import READABLE

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Not the lossy ones: what they decode to is not what was sent first. JPEG 2000 may be either: its values decide.
DECODED = frozenset(map(str, READABLE)) - {str(uid.HTJ2K), str(uid.JPEGLSNearLossless)}
LARGEST = 64 * 2**20  # bytes of a file: a compressed Enhanced CT of some hundred frames
_MOST_MEMORY = 3 * 2**30  # of the process, address space
_MOST_S = 20.0  # for two images, and the start of the process
_IDLE_S = 60.0
_MOST_OPEN_FILES = 64

log = logging.getLogger(__name__)


class Comparer:
    """Compares images, one pair at a time, in a process that is started when it is needed.

    Args:
        limit_s: Seconds for one pair; then the process is ended.
        wait_s: Seconds that a caller waits for those before it.
    """

    def __init__(self, limit_s: float = _MOST_S, wait_s: float = 2 * _MOST_S) -> None:
        self._limit_s, self._wait_s = limit_s, wait_s
        self._turn = threading.Lock()
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def is_same(self, kept: Path, came: bytes) -> bool | None:
        """Whether two files hold the same attributes and the same decoded pixels.

        Args:
            kept: A DICOM file.
            came: The content of another one.

        Returns:
            False also where this is unknown; None if too many others wait.
        """
        if len(came) > LARGEST or kept.stat().st_size > LARGEST:
            return False
        if not self._turn.acquire(timeout=self._wait_s):
            return None
        try:
            return self._ask(kept, came)
        except OSError as error:  # no memory or descriptors for a process
            self._end()
            log.warning("two images cannot be compared: %s", type(error).__name__)
            return False
        finally:
            self._turn.release()

    def _ask(self, kept: Path, came: bytes) -> bool:
        for _ in range(2):  # one that had nothing to do has ended by itself
            connection, process = self._started()
            watchdog = threading.Timer(self._limit_s, process.kill)
            watchdog.start()
            try:
                connection.send_bytes(os.fsencode(kept))
                connection.send_bytes(came)
                if connection.recv_bytes(1) == _TAKEN:
                    return self._answer(connection)
            except (EOFError, ConnectionError):
                self._end()
            finally:
                watchdog.cancel()
        return False

    def _answer(self, connection: Connection) -> bool:
        try:
            return connection.recv_bytes(1) == _SAME
        except (EOFError, ConnectionError):
            self._end()
            log.warning("two images cannot be compared: the process that decoded them ended, or took too long")
            return False

    def _started(self) -> tuple[Connection, SpawnProcess]:
        if self._connection is None or self._process is None or not self._process.is_alive():
            self._end()
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=run_comparer, args=(theirs,), name="comparer", daemon=True)
            try:
                with bare_start():
                    self._process.start()
            except BaseException:
                self._process = None
                raise
            finally:
                theirs.close()
        return self._connection, self._process

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None

    def close(self) -> None:
        """End the process."""
        with self._turn:
            self._end()


_TAKEN, _SAME, _OTHER = b"t", b"s", b"o"


def run_comparer(connection: Connection) -> None:
    """The process: take two files, say whether they are the same, until none comes for a minute."""
    begin_child()
    logging.disable(logging.CRITICAL)  # values of a peer
    os.nice(5)
    with contextlib.suppress(EOFError, OSError):
        import pydicom.pixels  # noqa: PLC0415  # with its decoders, before files are limited

        _limit()
        while connection.poll(_IDLE_S):
            kept = Path(os.fsdecode(connection.recv_bytes(4096)))
            came = connection.recv_bytes(LARGEST)
            connection.send_bytes(_TAKEN)
            try:
                same = is_same_decoded(pydicom.dcmread(kept), pydicom.dcmread(BytesIO(came)))
            except Exception:  # noqa: BLE001  # anything that a decoder may raise: they count as different
                same = False
            connection.send_bytes(_SAME if same else _OTHER)


def _limit() -> None:
    for kind, most in (
        (resource.RLIMIT_AS, _MOST_MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MOST_OPEN_FILES),
    ):
        resource.setrlimit(kind, (most, most))


@lenient()
def is_same_decoded(one: Dataset, other: Dataset) -> bool:
    """Whether two images have the same attributes and the same decoded pixels."""
    from ctflow.node.receive.headers import is_same_dataset  # noqa: PLC0415

    if "PixelData" not in one or "PixelData" not in other:
        return False
    pixels = [_decoded(each) for each in (one, other)]
    if pixels[0] != pixels[1]:
        return False
    for each, its in ((one, other), (other, one)):
        del each.PixelData
        # Lossless codecs add these (DCMTK's dcmcjpeg the second).
        if each.get("LossyImageCompression") == "00" and "LossyImageCompression" not in its:
            del each.LossyImageCompression
        if "DerivationDescription" in each and "DerivationDescription" not in its:
            del each.DerivationDescription
    big = [each.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian for each in (one, other)]
    return is_same_dataset(one, other, swapped=big[0] != big[1])


def _decoded(dataset: Dataset) -> tuple[object, ...]:
    from pydicom.pixels.utils import pixel_array  # noqa: PLC0415

    values = pixel_array(dataset, raw=True)
    return values.shape, values.astype(values.dtype.newbyteorder("=")).tobytes()
