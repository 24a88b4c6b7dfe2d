"""The log of cases that run at the same time, in the order in which they would run one after another."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from ctflow.core.processes import Line

_WAITS = "_ctflow_waits"


class InOrder:
    """Shows the lines of each case once all earlier cases have finished; until then they wait.

    Lines of this thread belong to the `current` case; lines of other threads pass at once.

    Args:
        count: Number of cases; `expect` adds one.
    """

    def __init__(self, count: int) -> None:
        self.current: int | None = None
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._showing = False
        self._turn = -1  # of no case yet
        self._finished: set[int] = set()
        self._waiting: dict[int, deque[Callable[[], None]]] = {number: deque() for number in range(count)}
        self._handlers = list(logging.getLogger().handlers)
        for handler in self._handlers:
            handler.addFilter(self._passes)

    def open(self) -> None:
        """The first case's lines may be shown."""
        with self._lock:
            self._turn = max(self._turn, 0)
            self._show()

    def expect(self, number: int) -> None:
        """One more case, the next one, will come."""
        with self._lock:
            self._waiting[number] = deque()

    def add(self, number: int, line: Line) -> None:
        """Show a line of a case's process now, or in its turn."""
        with self._lock:
            self._waiting[number].append(line.log)
            self._show()

    def finish(self, number: int) -> None:
        """No more lines of this case will come."""
        with self._lock:
            self._finished.add(number)
            self._show()

    def close(self) -> None:
        """Show all that waits, in order; nothing waits from now on."""
        with self._lock:
            self._turn = max(self._turn, 0)
            self._finished.update(self._waiting)
            self.current = None
            self._show()
        for handler in self._handlers:
            handler.removeFilter(self._passes)

    def _show(self) -> None:
        while self._turn in self._waiting:
            lines = self._waiting[self._turn]
            while lines:
                self._showing = True
                try:
                    lines.popleft()()
                finally:
                    self._showing = False
            if self._turn not in self._finished:
                return
            self._finished.discard(self._turn)
            del self._waiting[self._turn]
            self._turn += 1

    def _passes(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        with self._lock:
            if getattr(record, _WAITS, False):  # another handler asks
                return self._showing
            if self._showing or self.current in (None, self._turn) or self.current not in self._waiting:
                return True  # of no case, of the case whose turn it is, or of one whose lines have all been shown
            setattr(record, _WAITS, True)
            self._waiting[self.current].append(partial(logging.getLogger(record.name).handle, record))
            return False
