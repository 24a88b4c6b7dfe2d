"""Limits on a peer's PDUs: bounded length and bounded time, before anything is buffered.

pynetdicom reads a PDU of any length that its header names (300 MB from a peer that has not even named itself), and
waits forever for the rest of one. This socket sits in between and ends such a connection.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from ctflow.node.receive.titles import HEADER, mended_titles

ASSOCIATE_REQUEST = 0x01
LEAST_REQUEST = 2**16  # bytes always allowed for an A-ASSOCIATE-RQ; 128 contexts with all syntaxes take 20 kB
LARGEST_MESSAGE = 2**29  # bytes of one instance; an Enhanced CT of 1000 frames
LARGEST_TOGETHER = 3 * 2**29  # bytes of all instances being received
_SLACK = 12  # some senders count the header of a PDU or of its first item, others do not
# A-ABORT by the service provider: invalid PDU parameter value (PS3.8 9.3.8)
ABORT = bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, 6])


class Shared:
    """Bytes of the messages being received on all connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, count: int) -> int:
        """Change the sum and return it."""
        with self._lock:
            self._bytes += count
            return self._bytes


def length_of_request(head: bytes, most_pdu: int) -> int | None:
    """Length of the A-ASSOCIATE-RQ that begins with these six bytes; None if it is not one, or too long."""
    kind, _, length = struct.unpack(">BBL", head)
    return length if kind == ASSOCIATE_REQUEST and length <= max(most_pdu, LEAST_REQUEST) else None


class LimitedSocket(socket.socket):
    """A connected socket that reads only whole PDUs of a bounded length.

    Args:
        connected: Gives up its connection; blocking.
        most_pdu: Most bytes of a PDU; a longer one ends the connection before it is read.
        patience_s: A PDU must arrive within so many seconds of its first byte; an answer must leave in this time.
        shared: Bytes of the messages of all connections.
        refused: Called with the reason when the connection is ended because of the peer's data.

    Attributes:
        certificate: Fingerprint of the peer's certificate, empty if it has none; None without TLS.
    """

    certificate: str | None = None

    def __init__(
        self,
        connected: socket.socket,
        *,
        most_pdu: int,
        patience_s: float,
        shared: Shared,
        refused: Callable[[str], None],
    ) -> None:
        super().__init__(connected.family, connected.type, connected.proto, fileno=connected.detach())
        # The kernel keeps the time: Python's own timeout costs one more system call for each one.
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(patience_s))
        self._most = most_pdu
        self._patience_s = patience_s
        self._wait_s = 0.0
        self._shared = shared
        self._refused = refused
        self._is_first = True  # PDU: the request for the association
        self._head = b""  # of the next PDU, as far as it has arrived and was not taken
        self._left = 0
        self._deadline = 0.0
        self._message = 0

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """The whole rest of the PDU, even if fewer bytes are requested, and nothing of the next one.

        pynetdicom requests 4 kB at a time until it has the PDU.
        """
        if self._head or not self._left:
            self._fill_head()
            head, self._head = self._head[:bufsize], self._head[bufsize:]
            return head
        body = bytes(self.receive(self._left))
        if self._is_first:
            self._is_first, body = False, mended_titles(body)
        return body

    def pending(self) -> int:
        """How much has been taken from the kernel and not been read: nothing."""
        return 0

    def next_kind(self) -> int | None:
        """Wait for the head of the next PDU and return its type; None if the peer closed the connection.

        The head stays here: `recv` returns it, and `begin_pdu` takes it.

        Raises:
            OSError: The connection is closed, or was ended because of the peer's data.
        """
        self._fill_head()
        return self._head[0] if len(self._head) == HEADER else None

    def begin_pdu(self) -> int:
        """Take the head of a PDU after `next_kind`; return how many bytes follow, for `receive` and `receive_into`."""
        self._head = b""
        return self._left

    def receive(self, count: int) -> bytearray:
        """`count` bytes of the PDU; fewer if the peer closed the connection."""
        data = bytearray(count)
        with memoryview(data) as view:
            done = self.receive_into(view)
        del data[done:]
        return data

    def receive_into(self, view: memoryview) -> int:
        """Fill a part of a buffer with the next bytes of the PDU; return how many came before the peer closed it.

        Raises:
            OSError: The connection is closed, or was ended because the PDU took too long.
        """
        done = 0
        while done < len(view):
            try:
                count = self._fill(view[done:])
            except BlockingIOError:
                continue  # the time is over, as the next round detects
            if not count:
                break
            done += count
        self._left -= done
        return done

    def _fill(self, view: memoryview) -> int:
        """Some bytes of the peer's, at least one; 0 at the end."""
        # All in one call, without the interpreter's lock: a PDU comes in dozens of segments.
        return self._receive(view, socket.MSG_WAITALL)

    def _receive(self, view: memoryview, flags: int = 0) -> int:
        """From the kernel; a BlockingIOError when the time for this PDU is over."""
        self._set_wait()
        return super().recv_into(view, 0, flags)

    def take_rest(self, count: int) -> None:
        """Take so many bytes from the kernel, which nobody will read."""
        super().recv(count, socket.MSG_DONTWAIT)

    def _fill_head(self) -> None:
        """Read the missing part of a PDU's head, and check the length that it names."""
        if self._left or len(self._head) == HEADER:
            return
        self._deadline = time.monotonic() + self._patience_s
        self._left = HEADER
        try:
            self._head = bytes(self.receive(HEADER))
        finally:
            self._left = 0
        if len(self._head) < HEADER:
            return
        kind, _, length = struct.unpack(">BBL", self._head)
        most = max(self._most, LEAST_REQUEST) if kind == ASSOCIATE_REQUEST else self._most + _SLACK
        self._count(length)
        if length > most:
            self._refuse(f"a PDU of {length} bytes, more than {most}")
        if self._message > LARGEST_MESSAGE or self._shared.add(0) > LARGEST_TOGETHER:
            self._refuse(f"a message of {self._message} bytes or more")
        self._left = length

    def _set_wait(self) -> None:
        """Set the kernel's timeout to the time left for this PDU, only if it has changed much."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            self._refuse(f"a PDU that takes longer than {self._patience_s:g} s")
        if abs(left_s - self._wait_s) > 0.1 * self._patience_s:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(left_s))
            self._wait_s = left_s

    def _count(self, count: int) -> None:
        self._message += count
        self._shared.add(count)

    def _refuse(self, why: str) -> None:
        self._refused(why)
        with contextlib.suppress(OSError):  # it may be closed already
            self._write(ABORT, socket.MSG_DONTWAIT)
        raise ConnectionAbortedError(why)

    def send(self, data: object, flags: int = 0) -> int:
        """Send an answer: the message before it has been taken."""
        self._count(-self._message)
        return self._write(data, flags)

    def _write(self, data: Any, flags: int = 0) -> int:
        return super().send(data, flags)

    def shutdown(self, how: int) -> None:
        """Shut down, even if the peer was faster: pynetdicom closes only after this."""
        with contextlib.suppress(OSError):
            super().shutdown(how)

    def close(self) -> None:
        """Close; an unfinished message no longer counts."""
        self._count(-self._message)
        super().close()


def _timeval(seconds: float) -> bytes:
    """Seconds in setsockopt's format; zero would mean forever."""
    micros = max(int(seconds * 1_000_000), 1)
    return struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)
