"""SIGINT, SIGTERM and SIGHUP under Holoscan, which would take them for itself and end the process with exit code 1."""

from __future__ import annotations

import os
import signal
import threading

from ctflow.core.entry_point import ending_signals
from ctflow.core.errors import EXIT_INTERRUPTED
from ctflow.core.progress import Progress


class Interruption:
    """Waits for a signal in a thread of its own.

    Make it before NumPy, torch and Holoscan start their threads: they inherit the mask, so that no handler of theirs
    ever runs, whichever thread the system chooses. The first signal stops the work at its next advance, with everything
    cleaned up; the second ends the process.
    """

    def __init__(self) -> None:
        self._asked, self._signals = threading.Event(), {signal.SIGINT, *ending_signals()}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        signal.sigwait(self._signals)
        self._asked.set()
        signal.sigwait(self._signals)
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
