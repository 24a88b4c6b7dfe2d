"""How a process of ctflow's own starts: without the user's script, with its signals, never outliving its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_STARTING = threading.Lock()


@contextmanager
def bare_start() -> Iterator[None]:
    """Start processes that run nothing of the user's script, and with this thread's signals as they were.

    A spawned process runs the script's top level first, which for one without a `__main__` guard is everything it does;
    and the helper that Python starts beside it unblocks SIGINT and SIGTERM.
    """
    with _STARTING:  # of two threads, each would take the other's stand-in for the script
        script, mask = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, ())
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin_child() -> None:
    """Ctrl-C reaches every process of the terminal, and the first one ends the others; one that is killed cannot."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
