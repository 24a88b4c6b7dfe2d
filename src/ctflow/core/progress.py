"""Progress of the work, for display."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives a stage's advance.

    Called from the working thread; must be quick, and may raise only KeyboardInterrupt, which ends the work.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` units of `stage` as finished (0 of n opens the stage, n of n closes it)."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""
