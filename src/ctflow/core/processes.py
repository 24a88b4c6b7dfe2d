"""Start of ctflow's own child processes: they ignore Ctrl-C and never outlive their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def begin_child() -> None:
    """Ignore Ctrl-C, as the parent ends its children, and end with a parent that was killed and cannot end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
