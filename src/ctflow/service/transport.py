"""What a peer may put on the wire: PDUs of a bounded length, in bounded time, before anything is buffered.

pynetdicom reads a PDU of any length that its header names (300 MB from a peer that has not even named itself), and
waits for the rest of one for ever. This socket stands in between and ends such a connection.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

HEADER = 6  # bytes: type, reserved, length (DICOM PS3.8 9.3)
ASSOCIATE_REQUEST = 0x01
LEAST_REQUEST = 2**16  # bytes that an A-ASSOCIATE-RQ may have at least; 128 contexts with all syntaxes take 20 kB
LARGEST_MESSAGE = 2**29  # bytes of one instance; an Enhanced CT of 1000 frames
LARGEST_TOGETHER = 3 * 2**29  # bytes of all that are being received
_SLACK = 12  # some senders count the header of a PDU, or of its first item, and some do not
# A-ABORT by the service provider: invalid PDU parameter value (PS3.8 9.3.8)
ABORT = bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, 6])


class Shared:
    """Bytes of messages that all connections are receiving."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def add(self, count: int) -> int:
        """Change the sum and say what it is now."""
        with self._lock:
            self._bytes += count
            return self._bytes


def length_of_request(head: bytes, most_pdu: int) -> int | None:
    """Length of the A-ASSOCIATE-RQ that begins with these six bytes; None where it is none, or too long."""
    kind, _, length = struct.unpack(">BBL", head)
    return length if kind == ASSOCIATE_REQUEST and length <= max(most_pdu, LEAST_REQUEST) else None


class LimitedSocket(socket.socket):
    """A connected socket that reads whole PDUs of a bounded length and nothing else.

    Args:
        connected: Gives its connection away.
        most_pdu: Bytes of a PDU; more end the connection before they are read.
        patience_s: A PDU must be here so many seconds after its first byte; an answer must leave in this time.
        shared: Bytes of the messages of all connections.
        refused: Told why, where the connection is ended for what the peer sent.
    """

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
        self.settimeout(patience_s)
        self._most = most_pdu
        self._patience_s = patience_s
        self._shared = shared
        self._refused = refused
        self._head = b""
        self._left = 0
        self._deadline = 0.0
        self._message = 0

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """The next bytes of the PDU; up to its end, also where fewer are asked for.

        pynetdicom asks for 4 kB at a time and goes on until it has the PDU. It gets as much of the PDU as there is,
        which takes a thirtieth of the calls.
        """
        if not self._left:
            return self._receive_head(bufsize, flags)
        data = self._receive(self._left, flags)
        self._left -= len(data)
        return data

    def _receive_head(self, bufsize: int, flags: int) -> bytes:
        if not self._head:
            self._deadline = time.monotonic() + self._patience_s
        data = self._receive(min(bufsize, HEADER - len(self._head)), flags)
        self._head += data
        if len(self._head) == HEADER:
            head, self._head = self._head, b""
            kind, _, self._left = struct.unpack(">BBL", head)
            most = max(self._most, LEAST_REQUEST) if kind == ASSOCIATE_REQUEST else self._most + _SLACK
            self._count(self._left)
            if self._left > most:
                self._refuse(f"a PDU of {self._left} bytes, more than {most}")
            if self._message > LARGEST_MESSAGE or self._shared.add(0) > LARGEST_TOGETHER:
                self._refuse(f"a message of {self._message} bytes and more")
        return data

    def _receive(self, count: int, flags: int) -> bytes:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            self._refuse(f"a PDU that takes longer than {self._patience_s:g} s")
        self.settimeout(left_s)
        return super().recv(count, flags)

    def _count(self, count: int) -> None:
        self._message += count
        self._shared.add(count)

    def _refuse(self, why: str) -> None:
        self._refused(why)
        with contextlib.suppress(OSError):  # it may be gone already
            self.settimeout(0)
            super().send(ABORT)
        raise ConnectionAbortedError(why)

    def send(self, data: object, flags: int = 0) -> int:
        """An answer: the message before it has been taken."""
        self._count(-self._message)
        self.settimeout(self._patience_s)
        return super().send(data, flags)  # type: ignore[arg-type]  # any buffer, as the base has it

    def shutdown(self, how: int) -> None:
        """As the base has it, also where the peer was faster: pynetdicom closes only after this."""
        with contextlib.suppress(OSError):
            super().shutdown(how)

    def close(self) -> None:
        """Close; what was being received is no longer."""
        self._count(-self._message)
        super().close()
