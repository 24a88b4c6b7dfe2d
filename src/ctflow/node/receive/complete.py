"""Completes a series after a quiet period; the journal completes one at once if its sender gave a count.

It also finds that the computer's clock was set, as it is the first to act wrongly on it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from functools import partial

from ctflow.core.errors import OutputError
from ctflow.node.journal.clock import move_with_clock
from ctflow.node.journal.journal import Journal

_SHORTEST_S = 0.02  # between two checks: the longest extra wait of a quiet series
_LONGEST_S = 10.0  # between two checks: how long a clock that was set back goes unnoticed
_SET_S = 1.5  # a clock that differs more from the computer's uptime was set; a time server's steering is slower
_TELL_S = 60.0  # between two events of a clock that is set again and again
_SAME_MOMENT_S = 0.1  # a process may be stopped between two clocks
REFUSED_WAIT_S = 3600.0  # for instances that were refused while the disk was full

log = logging.getLogger(__name__)


class Completer(threading.Thread):
    """Completes quiet series.

    Args:
        journal: Finds and completes the series.
        quiet_s: A series without a new instance for so long is complete.
        refused_wait_s: A series whose refused instances did not come again for so long is set aside.
        by_study: Whether its whole study must be without a new instance for so long.
    """

    def __init__(
        self, journal: Journal, quiet_s: float, refused_wait_s: float = REFUSED_WAIT_S, *, by_study: bool = False
    ) -> None:
        super().__init__(name="completer", daemon=True)
        self._journal = journal
        self._quiet_s = quiet_s
        self._refused_wait_s = max(refused_wait_s, quiet_s)
        self._by_study = by_study
        self._ending = threading.Event()
        self._clocks = _clocks()
        self._told_at, self._untold_s = -_TELL_S, 0.0

    def run(self) -> None:
        """Run until `stop`."""
        look_at_refused = 0.0
        # While the node was down its senders could not continue, so their series do not count as complete.
        next_look = time.monotonic() + self._quiet_s
        while not self._ending.wait(min(max(next_look - time.monotonic(), 0.0), _LONGEST_S)):
            try:
                self._follow_clock()
                if time.monotonic() < next_look:
                    continue
                if time.monotonic() >= look_at_refused:
                    self._journal.give_up_refused(self._refused_wait_s)
                    look_at_refused = time.monotonic() + 60
                wait_s = self._look()
            except OutputError as error:  # the disk is full: completing can wait
                log.error("%s", error)  # noqa: TRY400  # named: no traceback needed
                wait_s = 1.0
            except (OSError, sqlite3.Error) as error:  # no descriptors: some may become free
                log.error("completing: %s", type(error).__name__)  # noqa: TRY400
                wait_s = 1.0
            next_look = time.monotonic() + wait_s

    def _follow_clock(self) -> None:
        """Move what waits if the clock was set, or the computer slept, since the last check."""
        wall, uptime, awake = _clocks()
        moved_s = (wall - self._clocks[0]) - (awake - self._clocks[2])
        slept_s = (uptime - self._clocks[1]) - (awake - self._clocks[2])
        if abs(moved_s) > _SET_S:
            told = f"the computer slept for {slept_s:.0f} s" if abs(moved_s - slept_s) < _SET_S else ""
            self._untold_s += moved_s
            if not told and awake - self._told_at >= _TELL_S:  # a clock that is set all the time fills no trail
                told = f"the clock was set {'back' if self._untold_s < 0 else 'forward'} by {abs(self._untold_s):.0f} s"
                self._told_at, self._untold_s = awake, 0.0
            self._journal.change(partial(move_with_clock, by_s=moved_s, tell=told))
            if told:
                log.warning("%s", told)
        self._clocks = (wall, uptime, awake)

    def _look(self) -> float:
        """Complete what is due; return the seconds until more can be due."""
        journal, quiet_s = self._journal, self._quiet_s
        due = journal.next_quiet_study_at(quiet_s) if self._by_study else journal.next_quiet_at(quiet_s)
        if due is None:
            return self._quiet_s  # a series received from now on is quiet after that at the earliest
        left_s = due - time.time()
        if left_s <= 0:
            complete = journal.complete_quiet_studies if self._by_study else journal.complete_quiet
            complete(quiet_s)
            return 0.0
        return max(min(left_s, self._quiet_s), _SHORTEST_S)

    def stop(self) -> None:
        """Stop completing series; returns when the thread has ended."""
        self._ending.set()
        self.join()


def _clocks() -> tuple[float, float, float]:
    """The time, the seconds since the computer started, and those of them in which it did not sleep, at one moment."""
    while True:
        before = time.monotonic()
        found = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), before
        if time.monotonic() - before < _SAME_MOMENT_S:
            return found
