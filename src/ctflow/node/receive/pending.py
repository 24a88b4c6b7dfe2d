"""Pending connections wait here, without a thread, until they request an association.

A silent or slow socket costs only a file descriptor: C-ECHO is answered among hundreds of them.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import selectors
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ctflow.node.receive.secured import HELLO, NO_TLS_HERE, Handshake, HandshakeFailed
from ctflow.node.receive.titles import HEADER, TLS_WANTED
from ctflow.node.receive.transport import ABORT, length_of_request

PeerAddress = tuple[str, int]
# pynetdicom uses select(), which takes no descriptor above 1023, and many systems give a process 1024: pending
# connections (one each) and associations (two each, see `settings.MOST_ASSOCIATIONS`) must leave some for the rest.
MOST_WAITING = 256
_LOOK_AGAIN_S = 0.02  # at a partial request: the selector would report it readable all the time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Security:
    """What TLS means to the listener.

    Attributes:
        context: The context for the next connection; None if the node has no TLS.
        may_be_plain: Whether an address may come without TLS.
        rejected: Called with the address and the reason when a connection is closed for lack of TLS, or by it.
    """

    context: Callable[[], ssl.SSLContext] | None = None
    may_be_plain: Callable[[str], bool] = lambda _host: True
    rejected: Callable[[str, str], None] = lambda _host, _why: None


WITHOUT_TLS = Security()


class PendingConnections(threading.Thread):
    """Accepts connections and passes on those whose A-ASSOCIATE-RQ has arrived, whole and of a valid length.

    Args:
        listening: The bound and listening socket; closed at the end.
        may_come: Whether an address may connect.
        hand_on: Takes a connection with its request, and its TLS; must not block.
        is_full: While true, requests wait.
        most_pdu: Most bytes of a PDU.
        patience_s: A request must arrive within so many seconds of its connection.
        refused: Called with the address and the reason when a connection is closed.
        security: TLS.
    """

    def __init__(
        self,
        listening: socket.socket,
        *,
        may_come: Callable[[str], bool],
        hand_on: Callable[[socket.socket, PeerAddress, Handshake | None], None],
        is_full: Callable[[], bool],
        most_pdu: int,
        patience_s: float,
        refused: Callable[[str, str], None],
        security: Security,
    ) -> None:
        super().__init__(name="listener", daemon=True)
        self._listening = listening
        self._may_come = may_come
        self._hand_on = hand_on
        self._is_full = is_full
        self._most_pdu = most_pdu
        self._patience_s = patience_s
        self._refused = refused
        self._security = security
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[socket.socket, tuple[PeerAddress, float]] = {}
        self._partial: set[socket.socket] = set()
        self._handshakes: dict[socket.socket, Handshake] = {}
        self._told, self._tell = socket.socketpair()

    def stop(self) -> None:
        """Accept nothing more and close pending connections; returns when that is done. May be called twice."""
        with contextlib.suppress(OSError):  # it has ended
            self._tell.send(b"x")
        self.join()

    def run(self) -> None:
        """Run until `stop`."""
        self._listening.setblocking(False)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._told, selectors.EVENT_READ)
        try:
            while self._one_round():
                pass
        finally:
            for connection in list(self._waiting):
                self._drop(connection)
            self._selector.close()
            for each in (self._listening, self._told, self._tell):
                each.close()

    def _one_round(self) -> bool:
        ready = [key.fileobj for key, _ in self._selector.select(_LOOK_AGAIN_S if self._partial else 1.0)]
        if self._told in ready:
            return False
        if self._listening in ready:
            self._accept()
        for connection in [*self._partial, *(each for each in ready if each in self._waiting)]:
            self._look_at(connection)
        now = time.monotonic()
        for connection, (_, deadline) in list(self._waiting.items()):
            if now > deadline:
                self._drop(connection, f"no association was requested within {self._patience_s:g} s")
        return True

    def _accept(self) -> None:
        for _ in range(64):  # then the pending ones are checked
            try:
                connection, address = self._listening.accept()
            except OSError:  # none is left, the peer has gone, or no descriptors are free: the next round shows which
                return
            if not self._may_come(str(address[0])):
                self._refused(str(address[0]), "its address is not among the peers")
                connection.close()
                continue
            if len(self._waiting) >= MOST_WAITING:
                self._drop(next(iter(self._waiting)), "too many pending connections; this one waited longest")
            connection.setblocking(False)
            self._waiting[connection] = ((str(address[0]), int(address[1])), time.monotonic() + self._patience_s)
            self._selector.register(connection, selectors.EVENT_READ)

    def _look_at(self, connection: socket.socket) -> None:
        """Pass a connection on, let it wait, or close it."""
        try:
            head, here = self._seen(connection)
        except BlockingIOError:
            return
        except HandshakeFailed as error:
            self._reject(connection, str(error))
            return
        except OSError:
            head = b""
        if not head:  # the peer closed it
            self._drop(connection)
            return
        is_plain = connection not in self._handshakes
        length = length_of_request(head, self._most_pdu) if len(head) == HEADER else -1
        if length is None:
            self._abort(connection)
            self._drop(connection, "its first PDU is not an association request, or is too long")
        elif length >= 0 and is_plain and not self._security.may_be_plain(self._waiting[connection][0][0]):
            with contextlib.suppress(OSError):
                connection.send(TLS_WANTED)
            self._reject(connection, "it came without TLS")
        elif length >= 0 and here >= HEADER + length and not self._is_full():
            handshake = self._handshakes.get(connection)
            address, _ = self._forget(connection)
            self._hand_on_safely(connection, address, handshake)
        elif connection not in self._partial:
            self._selector.unregister(connection)
            self._partial.add(connection)

    def _seen(self, connection: socket.socket) -> tuple[bytes, int]:
        """The head of a connection's first PDU, as far as it is here, and how much of the PDU is."""
        if connection in self._handshakes:
            return self._handshakes[connection].look()
        head = connection.recv(HEADER, socket.MSG_PEEK)
        if head[:1] != bytes([HELLO]):
            return head, bytes_here(connection)
        if self._security.context is None:
            with contextlib.suppress(OSError):
                connection.send(NO_TLS_HERE)
            raise HandshakeFailed("it speaks TLS, and this port has none (the group tls of the settings)")
        self._handshakes[connection] = Handshake(connection, self._security.context())
        return self._handshakes[connection].look()

    def _abort(self, connection: socket.socket) -> None:
        handshake = self._handshakes.get(connection)
        if handshake is not None:
            handshake.tell(ABORT)
            return
        with contextlib.suppress(OSError):
            connection.send(ABORT)

    def _reject(self, connection: socket.socket, why: str) -> None:
        host = self._waiting[connection][0][0]
        with contextlib.suppress(OSError):  # unread bytes would turn the end into a reset, and its answer might be lost
            connection.recv(bytes_here(connection))
        self._drop(connection, why)
        self._security.rejected(host, why)

    def _hand_on_safely(self, connection: socket.socket, address: PeerAddress, handshake: Handshake | None) -> None:
        """Keep one connection's failure (for example no memory for its threads) from ending all others."""
        try:
            connection.setblocking(True)
            self._hand_on(connection, address, handshake)
        except Exception:
            log.exception("a connection could not be accepted")
            self._refused(address[0], "it could not be accepted; the log says why")
            connection.close()

    def _forget(self, connection: socket.socket) -> tuple[PeerAddress, float]:
        if connection in self._partial:
            self._partial.remove(connection)
        else:
            self._selector.unregister(connection)
        self._handshakes.pop(connection, None)
        return self._waiting.pop(connection)

    def _drop(self, connection: socket.socket, why: str | None = None) -> None:
        (host, _), _ = self._forget(connection)
        if why is not None:
            self._refused(host, why)
        # A refused peer should see an end, and nothing should linger here for peers that never close.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0 if why is None else 1))
        connection.close()


def bytes_here(connection: socket.socket) -> int:
    """How many bytes the kernel holds for a socket."""
    count = array.array("i", [0])
    fcntl.ioctl(connection, termios.FIONREAD, count)
    return count[0]
