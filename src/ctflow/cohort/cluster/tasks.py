"""What the driver and its workers say to each other: small values, never a volume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.outcome import MarkName, RowName, RowOutcome
from ctflow.cohort.shares.attempt import RowAttempt
from ctflow.cohort.watch import NodeState
from ctflow.core.errors import CtflowError
from ctflow.core.model import Model
from ctflow.settings.run import Settings


@dataclass(frozen=True)
class WorkerPlan:
    """What all workers of a run have in common.

    Attributes:
        destination: As `destination_from_text` takes it; a folder's path is absolute.
        base: The manifest's folder, absolute.
        settings: The run's.
        stamp: What all outcomes have in common.
        digest: Of the model's weights.
        opened: Makes the model and what segments with it: a machine reads the model from its own path.
    """

    destination: str
    base: Path
    settings: Settings
    stamp: RowOutcome
    digest: str
    opened: Callable[[Settings], tuple[Model, Any]]


@dataclass(frozen=True)
class RowTask:
    """An attempt at a row, for a worker.

    Attributes:
        row: The row.
        number: Of the attempt, from 1.
        is_alone: Whether its worker may have no other row: an earlier attempt ended with its worker.
        earlier: Markers of the row's earlier result.
        losses: How many machines were lost while they had it, which is no fault of the row's.
    """

    row: CohortRow
    number: int
    is_alone: bool
    earlier: tuple[MarkName, ...] = ()
    losses: int = 0

    @property
    def name(self) -> RowName:
        """The row's."""
        return self.row.id, self.row.fingerprint

    @classmethod
    def from_attempt(cls, attempt: RowAttempt) -> RowTask:
        """The task of an attempt that has not begun."""
        return cls(attempt.row, attempt.number, attempt.is_alone, attempt.earlier)

    @property
    def attempt(self) -> RowAttempt:
        """The attempt that a worker makes."""
        return RowAttempt(self.row, self.number, self.is_alone, self.earlier)

    def again(self) -> RowTask:
        """After it failed."""
        return replace(self, number=self.number + 1)

    def alone(self) -> RowTask:
        """After its worker ended: this row may be why."""
        return replace(self, number=self.number + 1, is_alone=True)

    def elsewhere(self) -> RowTask:
        """After its machine was lost, or failed."""
        return replace(self, losses=self.losses + 1)


@dataclass(frozen=True)
class WorkerReady:
    """From a worker: it can take rows.

    Attributes:
        limit: How many at a time.
        version: ctflow's.
    """

    limit: int
    version: str


@dataclass(frozen=True)
class RowCommitted:
    """From a worker: a row's result and marker are at the destination."""

    outcome: RowOutcome
    state: NodeState


@dataclass(frozen=True)
class RowFailed:
    """From a worker: the attempt failed and another may pass."""

    reason: str
    state: NodeState


@dataclass(frozen=True)
class WorkerFault:
    """From a worker: it ends, because its machine or the destination fails."""

    error: CtflowError


WorkerAnswer = RowCommitted | RowFailed | WorkerFault
