"""Python's `multiprocessing` starts processes that run nothing of the user's script, and leaves signals as they were.

A spawned process runs the script's top level first, which for one without a `__main__` guard is everything it does.
The helper that Python starts with it also unblocks SIGINT and SIGTERM: issue 127586 of python/cpython, fixed in
Python 3.14. Read for Python 3.11 to 3.13. Its collector looks at all objects again and again while they are made.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import ModuleType

_STARTING = threading.Lock()


@contextmanager
def bare_start() -> Iterator[None]:
    """Start processes that run nothing of the user's script, and with this thread's signals as they were.

    Only what a terminal sends waits, until `ctflow.core.processes.begin_child`: an import would end in a traceback.
    """
    with _STARTING:  # else each of two threads would take the other's stand-in for the script
        script, mask = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, ())
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            resource_tracker.ensure_running()  # else `start` does it, and lets Ctrl-C in
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
            yield
        finally:
            sys.modules["__main__"] = script
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage in cycles meanwhile: where a million objects are made and kept, it takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
