"""Where each row is: waiting, with a worker, or committed. No row is forgotten and none is given to two workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ctflow.cohort.cluster.tasks import RowTask
from ctflow.cohort.outcome import MarkName, RowName, RowOutcome
from ctflow.cohort.shares.attempt import MOST_ATTEMPTS

MOST_LOSSES = 9  # machines lost with the same row: on spot machines one or two are chance, so many are not
_SUSPICIOUS = 2  # by then the row may be why


class RowAccounts:
    """The rows of a run.

    First come those that were never tried, then those that failed, and last those whose worker ended: each of these is
    given to a worker that has no other row, as one row may have ended a worker that had ten.

    Args:
        tasks: All of them, read as they are given out.
    """

    def __init__(self, tasks: Iterable[RowTask]) -> None:
        self._fresh: Iterator[RowTask] = iter(tasks)
        self._waiting: deque[RowTask] = deque()
        self._again: deque[RowTask] = deque()
        self._alone: deque[RowTask] = deque()
        self._given: dict[RowName, RowTask] = {}
        self.committed: list[MarkName] = []

    @property
    def is_over(self) -> bool:
        """Whether every row is committed."""
        return not self._given and not self._fill() and not self._again and not self._alone

    @property
    def given(self) -> int:
        """How many rows workers have."""
        return len(self._given)

    def next(self, *, is_idle: bool) -> RowTask | None:
        """A row for a worker; None if none waits that it may have.

        Args:
            is_idle: Whether the worker has no row.
        """
        if self._fill():
            task = self._waiting.popleft()
        elif self._again:
            task = self._again.popleft()
        elif self._alone and is_idle:
            task = self._alone.popleft()
        else:
            return None
        self._given[task.name] = task
        return task

    def commit(self, task: RowTask, outcome: RowOutcome) -> None:
        """The row's result and marker are there."""
        del self._given[task.name]
        self.committed.append(outcome.name)

    def fail(self, task: RowTask) -> None:
        """The attempt failed, and the row is tried again after all others."""
        del self._given[task.name]
        (self._alone if task.is_alone else self._again).append(task.again())

    def die(self, task: RowTask) -> None:
        """The worker ended, and the row may be why."""
        del self._given[task.name]
        self._alone.append(task.alone())

    def lose(self, task: RowTask) -> None:
        """The machine was lost or failed: the row goes elsewhere, next."""
        del self._given[task.name]
        moved = task.elsewhere()
        if moved.losses >= MOST_LOSSES:
            while moved.number <= MOST_ATTEMPTS:
                moved = moved.alone()
            self._alone.append(moved)
        elif moved.is_alone or moved.losses >= _SUSPICIOUS:
            self._alone.append(replace(moved, is_alone=True))
        else:
            self._waiting.appendleft(moved)

    def _fill(self) -> bool:
        """Whether a row waits that was not tried, or only on a machine that was lost."""
        if not self._waiting:
            task = next(self._fresh, None)
            while task is not None and task.is_alone:  # they come last
                self._alone.append(task)
                task = next(self._fresh, None)
            if task is not None:
                self._waiting.append(task)
        return bool(self._waiting)
