"""pynetdicom's two threads an association, woken by what happens instead of looking a thousand times a second.

25 associations spend more of a core on looking than on receiving. Both loops end each round by asking a queue that is
mostly empty; the queues here answer when there is something to do. Nothing else of pynetdicom is changed.
"""

from __future__ import annotations

import os
import queue
import select
import socket
from collections.abc import Callable
from typing import Any

_LONGEST_S = 0.05  # until a loop looks at its timers and at whether it is to end
_PAUSE_S = 0.0002  # pynetdicom sleeps so long between rounds, and while it waits for the other thread's end


class PatientQueue(queue.Queue[Any]):
    """A queue that is asked "is there anything?" and waits a moment before it says no."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `queue.Queue.get`, but without `block` it waits for a moment."""
        return super().get(True, timeout if block else _LONGEST_S)


class AnswerQueue(queue.Queue[Any]):
    """Messages of an association that only asks: none is given to the loop that looks for requests.

    pynetdicom pauses that loop while it waits for an answer, and may see it paused as it just goes on: then the loop
    takes the answer for a request and drops it, and whoever asked waits until his patience ends.
    """

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `queue.Queue.get`, but without `block` there is nothing."""
        if not block:
            raise queue.Empty
        return super().get(True, timeout)


class BellQueue(queue.Queue[Any]):
    """A queue that rings when something is put into it."""

    def __init__(self, ring: Callable[[], None]) -> None:
        super().__init__()
        self._ring = ring

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """As `queue.Queue.put`."""
        super().put(item, block, timeout)
        self._ring()


class EventQueue(queue.Queue[Any]):
    """Events of the upper layer; where there is none, it waits until the socket or the user has something.

    Args:
        connection: The association's socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.bell)

    def ring(self) -> None:
        """End a wait."""
        os.eventfd_write(self.bell, 1)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `queue.Queue.get`, but without `block` it waits for a moment."""
        try:
            return super().get(False)
        except queue.Empty:
            self._wait()
            raise

    def _wait(self) -> None:
        poll = select.poll()  # knows descriptors of any number
        poll.register(self.bell, select.POLLIN)
        descriptor = self._connection.fileno()
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
        for ready, _ in poll.poll(_LONGEST_S * 1000):
            if ready == self.bell:
                os.eventfd_read(self.bell)


def make_patient(association: Any) -> None:
    """Give an association that has not started yet queues that wait.

    Args:
        association: A pynetdicom `Association` as acceptor, with its socket.
    """
    dul = association.dul
    events = EventQueue(dul.socket.socket)
    while not dul.event_queue.empty():
        events.put(dul.event_queue.get_nowait())
    dul.event_queue = events
    dul.to_provider_queue = BellQueue(events.ring)
    dul._run_loop_delay = _PAUSE_S  # it has no other name
    association.dimse.msg_queue = messages = PatientQueue()
    # A release or an abort ends the wait for a message, as (None, None) does in pynetdicom's own state machine.
    dul.to_user_queue = BellQueue(lambda: messages.put((None, None)))


def keep_answers(association: Any) -> None:
    """Have no answer lost to an association that asks and is asked nothing.

    Args:
        association: A pynetdicom `Association` as requestor, whose connection was just opened.
    """
    association.dimse.msg_queue = AnswerQueue()
