"""pynetdicom's two threads per association, woken by events; its upper layer for ctflow's reader; its log is off.

25 associations spend more of a core on polling a thousand times a second than on receiving (issues 59 and 650 of
pydicom/pynetdicom describe the delay of its loops). Both loops end each round by polling a queue that is mostly empty;
the queues here answer when there is something to do.

Read for 3.0.4, which the extra `serve` pins: with another version read `dul.py`, `dimse.py`, `fsm.py`,
`association.py` and `service_class.py` again.

Gain: 25 associations without requests take 0.08 s of CPU a second, without it 0.59 s (7.4 times). While each sends 10
images, an image takes 2.9 ms of CPU, without it 4.6 ms (both with `node/receive/shortcut`, which builds on it;
benchmarks/own_code.py store, 2026-11-29: AMD EPYC, 2 cores at a load of 6, Python 3.11.7).
"""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_LONGEST_S = 0.05  # until a loop checks its timers and whether to end
_DATA_TRANSFER = "Sta6"  # PS3.8 9.2
_CLOSING = "Sta13"
_PAUSE_S = 0.0002  # pynetdicom's sleep between rounds, and while it waits for the other thread's end


class _WaitingQueue(queue.Queue[Any]):
    """A queue that waits a moment before a non-blocking `get` fails."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `queue.Queue.get`, but without `block` it waits for a moment."""
        return super().get(True, timeout if block else _LONGEST_S)


class _AnswerQueue(queue.Queue[Any]):
    """Messages of a requestor's association: none goes to the loop that looks for requests.

    pynetdicom pauses that loop while it waits for an answer, and may see it paused just as it continues: then the loop
    mistakes the answer for a request and drops it, and the requestor waits until its timeout.
    """

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `queue.Queue.get`, but without `block` always empty."""
        if not block:
            raise queue.Empty
        return super().get(True, timeout)


class _BellQueue(queue.Queue[Any]):
    """A queue that wakes its reader when an item is put into it."""

    def __init__(self, ring: Callable[[], None]) -> None:
        super().__init__()
        self._ring = ring

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """As `queue.Queue.put`."""
        super().put(item, block, timeout)
        self._ring()


class _EventQueue(queue.Queue[Any]):
    """Events of the upper layer; if there is none, it waits until the socket or the user has data.

    Args:
        connection: The association's socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._pending: Callable[[], int] = getattr(connection, "pending", lambda: 0)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_open, self._closing = True, threading.Lock()

    def close(self) -> None:
        """Close the bell, from the reading thread; without this, descriptors wait for a collection of garbage."""
        with self._closing:
            if self._is_open:
                self._is_open = False
                os.close(self.bell)

    def __del__(self) -> None:
        self.close()

    def ring(self) -> None:
        """End a wait."""
        with self._closing:
            if self._is_open:
                os.eventfd_write(self.bell, 1)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `queue.Queue.get`, but without `block` it waits for a moment."""
        try:
            return super().get(False)
        except queue.Empty:
            self._wait()
            raise

    def _wait(self) -> None:
        if self._pending():
            return
        poll = select.poll()  # takes descriptors of any number
        poll.register(self.bell, select.POLLIN)
        descriptor = self._connection.fileno()
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
        for ready, _ in poll.poll(_LONGEST_S * 1000):
            if ready == self.bell:
                os.eventfd_read(self.bell)


def wake_by_events(association: Any) -> None:
    """Give an association that has not started yet queues that wait.

    Args:
        association: A pynetdicom `Association` as acceptor, with its socket.
    """
    dul = association.dul
    events = _EventQueue(dul.socket.socket)
    while not dul.event_queue.empty():
        events.put(dul.event_queue.get_nowait())
    dul.event_queue = events
    _close_at_the_end(dul, events)
    dul.to_provider_queue = _BellQueue(events.ring)
    _read_what_is_pending(dul)
    _take_every_event(association)
    dul._run_loop_delay = _PAUSE_S  # it has no other name
    association.dimse.msg_queue = messages = _WaitingQueue()
    # A release or an abort ends the wait for a message, as (None, None) does in pynetdicom's own state machine.
    dul.to_user_queue = _BellQueue(lambda: messages.put((None, None)))


def _close_at_the_end(thread: Any, events: _EventQueue) -> None:
    """Close the bell when the reading thread, which has not started yet, ends."""
    others = thread.run

    def run() -> None:
        try:
            others()
        finally:
            events.close()

    thread.run = run


def _read_what_is_pending(dul: Any) -> None:
    """Have data read that a socket with TLS took from the kernel: pynetdicom asks this of an `SSLSocket` alone."""
    pending = getattr(dul.socket.socket, "pending", None)
    others = dul._is_transport_event
    if pending is None:
        return

    def is_transport_event() -> bool:
        if dul.socket.socket is None or not pending():
            return bool(others())
        dul._read_pdu_data()
        return True

    dul._is_transport_event = is_transport_event


def _take_every_event(association: Any) -> None:
    """Keep what PS3.8 does not foresee from ending the thread that would close the connection.

    A request that is followed by an abort or by nonsense at once is accepted after the state machine has left its
    state ("Evt7" in "Sta13"), and one that says what cannot be, such as a presentation context of an even number, is
    found out only in the state machine: pynetdicom raises, its thread ends, and the connection may stay open for ever.
    """
    from pynetdicom import evt  # noqa: PLC0415  # an optional package: the extra `serve`
    from pynetdicom.fsm import InvalidEventError  # noqa: PLC0415

    dul = association.dul
    machine = dul.state_machine
    others = machine.do_action

    def do_action(event: str) -> None:
        try:
            others(event)
        except Exception as error:  # noqa: BLE001  # a request's nonsense raises all sorts
            if isinstance(error, InvalidEventError) and machine.current_state == _CLOSING:
                return  # its timer, or the peer, closes the connection
            log.warning("association ended: %s", type(error).__name__)
            if association.is_established:
                evt.trigger(association, evt.EVT_ABORTED, {})
            association.is_aborted, association.is_established = True, False
            association._kill = dul._kill_thread = True
            if dul.socket is not None:
                dul.socket.close()
            dul.to_user_queue.put(None)  # the other thread waits for a request

    machine.do_action = do_action


def keep_answers(association: Any) -> None:
    """Keep a requestor's association, which receives no requests, from losing an answer.

    Args:
        association: A pynetdicom `Association` as requestor, whose connection was just opened.
    """
    association.dimse.msg_queue = _AnswerQueue()


class UpperLayer:
    """The parts of an association's `DULServiceProvider` that ctflow's own reader needs.

    Args:
        association: A pynetdicom `Association` as acceptor that has not started yet, after `wake_by_events`.
    """

    def __init__(self, association: Any) -> None:
        self._association, self._dul = association, association.dul
        self._others = association.dul._read_pdu_data
        self.connection: Any = association.dul.socket.socket
        self.bell: int = association.dul.event_queue.bell

    def read_with(self, read: Callable[[], None]) -> None:
        """Have a function read PDUs; it calls `read_others` for those that it does not take."""
        self._dul._read_pdu_data = read

    def each_round(self, work: Callable[[], None]) -> None:
        """Have a function called many times a second in the reading thread, while the association transfers data."""
        others = self._dul._is_transport_event

        def is_transport_event() -> bool:
            if self.is_transferring:
                work()
            return bool(others())

        self._dul._is_transport_event = is_transport_event

    def read_others(self) -> None:
        """Read a PDU as pynetdicom does."""
        self._others()

    @property
    def is_transferring(self) -> bool:
        """Whether the association is in the data transfer state."""
        return bool(self._dul.state_machine.current_state == _DATA_TRANSFER)

    @property
    def has_work(self) -> bool:
        """Whether pynetdicom's own loop has work, or is to end."""
        return bool(self._dul._kill_thread or not self._dul.event_queue.empty())

    def heard(self) -> None:
        """Data came: restart the wait for the peer."""
        self._dul._idle_timer.restart()

    def lost(self) -> None:
        """The connection is closed."""
        self._dul.event_queue.put("Evt17")

    def invalid(self) -> None:
        """An invalid PDU came: the state machine aborts."""
        self._dul.event_queue.put("Evt19")

    def pass_on(self, pdu: bytes) -> None:
        """Pass a PDU to pynetdicom as if it had read it."""
        decoded, event = self._dul._decode_pdu(bytearray(pdu))
        self._dul._recv_pdu.put(decoded)
        self._dul.event_queue.put(event)

    def context(self, number: int) -> tuple[str, str] | None:
        """Abstract and transfer syntax of an accepted presentation context; None for any other number."""
        found = self._association._accepted_cx.get(number)
        return None if found is None else (str(found.abstract_syntax), str(found.transfer_syntax[0]))

    @property
    def most_pdu(self) -> int:
        """Most bytes of a PDU that the peer takes; 0 is any."""
        return int(self._association.requestor.maximum_length or 0)

    def send(self, data: bytes) -> None:
        """Send PDUs."""
        self._dul.socket.send(data)


def without_logging() -> None:
    """From now on pynetdicom logs nothing: its lines quote data sets and AE titles. For ctflow's own processes."""
    from pynetdicom import _config  # noqa: PLC0415  # an optional package: the extra `serve`

    _config.LOG_HANDLER_LEVEL = "none"
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
