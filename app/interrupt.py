"""SIGINT and SIGTERM under Holoscan, which would take them for itself and end the process with exit code 1."""

from __future__ import annotations

import os
import signal
import threading

from ctflow.core.errors import EXIT_INTERRUPTED
from ctflow.core.progress import Progress

_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})


class Interruption:
    """Waits for a signal in a thread of its own.

    Make it before NumPy, torch and Holoscan start their threads: they inherit the mask, so that no handler of theirs
    ever runs, whichever thread the system chooses. The first signal stops the work at its next advance, with everything
    cleaned up; the second ends the process.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        signal.sigwait(_SIGNALS)
        self._asked.set()
        signal.sigwait(_SIGNALS)
        os._exit(EXIT_INTERRUPTED)

    def check(self) -> None:
        """Raise KeyboardInterrupt once a signal has come."""
        if self._asked.is_set():
            raise KeyboardInterrupt

    def stops(self, progress: Progress) -> Progress:
        """`progress`, but it raises KeyboardInterrupt once a signal has come."""

        def checked(stage: str, done: int, total: int) -> None:
            self.check()
            progress(stage, done, total)

        return checked
