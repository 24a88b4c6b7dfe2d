"""Connections wait here, without a thread, until they have asked for an association.

A socket that says nothing, or says it slowly, costs a file descriptor and no more: C-ECHO is answered under hundreds.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import selectors
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable

from ctflow.node.receive.titles import HEADER
from ctflow.node.receive.transport import ABORT, length_of_request

PeerAddress = tuple[str, int]
# pynetdicom asks select(), which knows no descriptor above 1023, and many systems give a process 1024: those that wait
# (one each) and those that talk (two each, see `settings.MOST_ASSOCIATIONS`) must leave some for everything else.
MOST_WAITING = 256
_LOOK_AGAIN_S = 0.02  # at a request that is here in part: the selector would call it readable all the time

log = logging.getLogger(__name__)


class PendingConnections(threading.Thread):
    """Accepts connections and hands on those whose A-ASSOCIATE-RQ is here, whole and of a lawful length.

    Args:
        listening: The bound and listening socket; closed at the end.
        may_come: Whether an address may connect at all.
        hand_on: Takes a connection with its request; must not block.
        is_full: While it says so, requests wait.
        most_pdu: Bytes of a PDU.
        patience_s: A request must be here so many seconds after its connection.
        refused: Told the address and why, where a connection is closed.
    """

    def __init__(
        self,
        listening: socket.socket,
        *,
        may_come: Callable[[str], bool],
        hand_on: Callable[[socket.socket, PeerAddress], None],
        is_full: Callable[[], bool],
        most_pdu: int,
        patience_s: float,
        refused: Callable[[str, str], None],
    ) -> None:
        super().__init__(name="listener", daemon=True)
        self._listening = listening
        self._may_come = may_come
        self._hand_on = hand_on
        self._is_full = is_full
        self._most_pdu = most_pdu
        self._patience_s = patience_s
        self._refused = refused
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[socket.socket, tuple[PeerAddress, float]] = {}
        self._partial: set[socket.socket] = set()
        self._told, self._tell = socket.socketpair()

    def stop(self) -> None:
        """Accept nothing more and close what waits; returns when that is done. May be called twice."""
        with contextlib.suppress(OSError):  # it has ended
            self._tell.send(b"x")
        self.join()

    def run(self) -> None:
        """Until `stop`."""
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
        for _ in range(64):  # then those that wait are looked at
            try:
                connection, address = self._listening.accept()
            except OSError:  # none is left, the peer is gone again, or there are no descriptors: the next round tells
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
        """Hand a connection on, let it wait, or close it."""
        try:
            head = connection.recv(HEADER, socket.MSG_PEEK)
            here = bytes_here(connection)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if not head:  # the peer closed it
            self._drop(connection)
            return
        length = length_of_request(head, self._most_pdu) if len(head) == HEADER else -1
        if length is None:
            with contextlib.suppress(OSError):
                connection.send(ABORT)
            self._drop(connection, "its first PDU is not an association request, or is too long")
        elif length >= 0 and here >= HEADER + length and not self._is_full():
            address, _ = self._forget(connection)
            self._hand_on_safely(connection, address)
        elif connection not in self._partial:
            self._selector.unregister(connection)
            self._partial.add(connection)

    def _hand_on_safely(self, connection: socket.socket, address: PeerAddress) -> None:
        """Whatever one connection leads to (no memory for its threads, say) must not be the end of all others."""
        try:
            connection.setblocking(True)
            self._hand_on(connection, address)
        except Exception:
            log.exception("a connection could not be accepted")
            self._refused(address[0], "it could not be accepted; the log says why")
            connection.close()

    def _forget(self, connection: socket.socket) -> tuple[PeerAddress, float]:
        if connection in self._partial:
            self._partial.remove(connection)
        else:
            self._selector.unregister(connection)
        return self._waiting.pop(connection)

    def _drop(self, connection: socket.socket, why: str | None = None) -> None:
        (host, _), _ = self._forget(connection)
        if why is not None:
            self._refused(host, why)
        # Whoever was refused should see an end, and nothing should linger here for those that never close.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0 if why is None else 1))
        connection.close()


def bytes_here(connection: socket.socket) -> int:
    """How many bytes the kernel holds for a socket."""
    count = array.array("i", [0])
    fcntl.ioctl(connection, termios.FIONREAD, count)
    return count[0]
