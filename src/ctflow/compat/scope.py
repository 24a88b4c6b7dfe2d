"""A process-wide change, for concurrent calls of several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Undo = Callable[[], None]


class SharedChange:
    """The first call that needs a change makes it, the last one undoes it.

    Other threads of the process see it meanwhile: the changed libraries keep this state for the whole process.

    Args:
        make: Makes the change and returns a function that undoes it.
    """

    def __init__(self, make: Callable[[], Undo]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._calls = 0
        self._undo: Undo | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The change, within a block."""
        with self._lock:
            if not self._calls:
                self._undo = self._make()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls and self._undo is not None:
                    self._undo()
                    self._undo = None
