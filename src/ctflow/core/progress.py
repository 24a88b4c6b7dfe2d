"""How the work tells a person how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives a stage's advance.

    Called from the thread that works; must be quick, and may raise nothing but KeyboardInterrupt, which ends the work.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say that `done` of `total` units of `stage` are finished (0 of n opens the stage, n of n closes it)."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""
