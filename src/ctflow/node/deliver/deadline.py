"""An end for an exchange with a server that never comes to one."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def ended_after(seconds: float, opened: socket.socket) -> Iterator[None]:
    """Shut a connection that is still in use after some seconds: an answer of a byte a minute must hold no thread.

    Each byte resets a socket's own timeout.

    Raises:
        TimeoutError: It was shut, whatever its reader made of that.
    """
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with suppress(OSError):  # it has ended
            opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if is_over.is_set():
            raise TimeoutError(errno.ETIMEDOUT, "its answer is too slow")
