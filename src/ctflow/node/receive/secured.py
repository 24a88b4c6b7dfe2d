"""TLS of the DICOM port: a handshake without a thread, and a socket that enforces the limits behind it.

The kernel's socket carries records, and OpenSSL works in memory: so the listener can leave a half-done handshake at any
byte, and what limits time on a plain connection limits it here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

from ctflow.node.receive.titles import HEADER
from ctflow.node.receive.transport import LEAST_REQUEST, LimitedSocket, length_of_request
from ctflow.node.tls import fingerprint, tls_failure

HELLO = 0x16  # first byte of a TLS connection: a handshake record
# Alert record: fatal, handshake failure. For a peer that speaks TLS where there is none.
NO_TLS_HERE = bytes([0x15, 3, 1, 0, 2, 2, 40])
_RECORDS = 2**16  # bytes taken from the kernel at a time: four records


class HandshakeFailed(Exception):
    """A peer's handshake failed; the text says why, without anything that the peer chose."""


class Handshake:
    """A connection that began with TLS, until its association request has arrived.

    Args:
        connection: Its socket, which does not block.
        context: The node's.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection = connection
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.came = bytearray()
        self._is_done = False

    def look(self) -> tuple[bytes, int]:
        """Take what has arrived.

        Returns:
            The head of the first PDU, as far as it has come, and how many bytes of the PDU have; (b"", 0) at the end.

        Raises:
            BlockingIOError: More must come first.
            HandshakeFailed: The handshake failed.
            OSError: The connection is broken.
        """
        while not self._is_whole():
            try:
                if self._step():
                    continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                if self._is_done:
                    return b"", 0
                raise HandshakeFailed("the peer ended the handshake") from None
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):  # the alert that tells the peer
                    self._flush()
                raise HandshakeFailed(tls_failure(error)) from error
            self._flush()
            records = self._connection.recv(_RECORDS)
            if records:
                self.incoming.write(records)
            else:
                self.incoming.write_eof()
        return bytes(self.came[:HEADER]), len(self.came)

    def _step(self) -> bool:
        """One step of the handshake, or of reading the request after it; False at the end of the connection."""
        if not self._is_done:
            self.tls.do_handshake()
            self._is_done = True
            self._flush()
            return True
        # No more than the request is decrypted here; what follows it stays encrypted, and bounded by the kernel.
        data = self.tls.read(self._missing())
        self.came += data
        if not data:
            raise ssl.SSLZeroReturnError
        return True

    def _missing(self) -> int:
        if len(self.came) < HEADER:
            return HEADER - len(self.came)
        length = length_of_request(bytes(self.came[:HEADER]), LEAST_REQUEST)
        return 0 if length is None else HEADER + length - len(self.came)

    def _is_whole(self) -> bool:
        return self._is_done and self._missing() == 0

    def _flush(self) -> None:
        while self.outgoing.pending:
            data = self.outgoing.read()
            # The kernel takes the few kilobytes of a handshake at once, or the peer reads nothing.
            if self._connection.send(data) < len(data):
                raise HandshakeFailed("the peer reads nothing")

    def tell(self, pdu: bytes) -> None:
        """Send a PDU before the end, if that can be done at once."""
        with contextlib.suppress(OSError, HandshakeFailed):
            self.tls.write(pdu)
            self._flush()


class SecuredSocket(LimitedSocket):
    """A `LimitedSocket` behind TLS.

    Args:
        connected: Gives up its connection; blocking.
        handshake: That of this connection; done, with the request.
        limits: As for a `LimitedSocket`.
    """

    def __init__(self, connected: socket.socket, handshake: Handshake, **limits: Any) -> None:
        super().__init__(connected, **limits)
        self._tls, self._incoming, self._outgoing = handshake.tls, handshake.incoming, handshake.outgoing
        self._came = handshake.came
        self._records = memoryview(bytearray(_RECORDS))
        self.certificate = fingerprint(self._tls.getpeercert(binary_form=True))

    def pending(self) -> int:
        """How much has been taken from the kernel and not been read."""
        return len(self._came) + self._tls.pending() + self._incoming.pending

    def _fill(self, view: memoryview) -> int:
        if self._came:
            part = bytes(self._came[: len(view)])
            del self._came[: len(part)]
            view[: len(part)] = part
            return len(part)
        while True:
            try:
                return self._tls.read(len(view), view)  # type: ignore[return-value]  # its count, with a buffer
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return 0
            count = self._receive(self._records)
            if count:
                self._incoming.write(self._records[:count])
            else:
                self._incoming.write_eof()

    def _write(self, data: Any, flags: int = 0) -> int:
        count = self._tls.write(data)
        with memoryview(self._outgoing.read()) as records:
            sent = 0
            while sent < len(records):
                sent += super()._write(records[sent:], flags)
        return count

    def shutdown(self, how: int) -> None:
        """Tell the peer that nothing follows, as TLS wants it, and shut down."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()  # does not wait for the peer's word
        with contextlib.suppress(OSError):
            super()._write(self._outgoing.read(), socket.MSG_DONTWAIT)
        super().shutdown(how)
