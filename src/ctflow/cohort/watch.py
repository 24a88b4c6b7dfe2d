"""Who watches a run of a cohort: told what becomes of rows and how the machines fare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ctflow.cohort.outcome import RowOutcome, RowStatus


@dataclass(frozen=True)
class NodeState:
    """What a machine does at a moment.

    Attributes:
        name: The machine's, or a process's of it.
        under_way: Rows that are read, segmented or written.
        done: Rows that it committed in this run, whatever their status.
        gpu_busy: Share of the last ten seconds in which its GPUs computed, 0 to 1; None if not known.
        is_gone: Whether the process has ended; nothing more will be told of it.
    """

    name: str
    under_way: int
    done: int
    gpu_busy: float | None = None
    is_gone: bool = False


class CohortWatcher(Protocol):
    """Is told what happens in a run, from several threads; must return soon and not raise."""

    def began(self, rows: int, before: Mapping[RowStatus, int]) -> None:
        """The run begins: how many rows its share has, and those by status that were committed before."""

    def committed(self, outcome: RowOutcome) -> None:
        """A row's result is committed."""

    def retried(self, row_id: str, reason: str, attempt: int) -> None:
        """An attempt at a row failed for a reason, and the row will be tried again."""

    def node(self, state: NodeState) -> None:
        """A machine's state, whenever a row begins or ends there."""


class Unwatched:
    """A watcher that looks away."""

    def began(self, rows: int, before: Mapping[RowStatus, int]) -> None:
        """As `CohortWatcher.began`."""

    def committed(self, outcome: RowOutcome) -> None:
        """As `CohortWatcher.committed`."""

    def retried(self, row_id: str, reason: str, attempt: int) -> None:
        """As `CohortWatcher.retried`."""

    def node(self, state: NodeState) -> None:
        """As `CohortWatcher.node`."""


UNWATCHED = Unwatched()


class Watchers:
    """Several watchers as one.

    Args:
        watchers: Are told in this order.
    """

    def __init__(self, *watchers: CohortWatcher) -> None:
        self._watchers = watchers

    def began(self, rows: int, before: Mapping[RowStatus, int]) -> None:
        """As `CohortWatcher.began`."""
        for each in self._watchers:
            each.began(rows, before)

    def committed(self, outcome: RowOutcome) -> None:
        """As `CohortWatcher.committed`."""
        for each in self._watchers:
            each.committed(outcome)

    def retried(self, row_id: str, reason: str, attempt: int) -> None:
        """As `CohortWatcher.retried`."""
        for each in self._watchers:
            each.retried(row_id, reason, attempt)

    def node(self, state: NodeState) -> None:
        """As `CohortWatcher.node`."""
        for each in self._watchers:
            each.node(state)
