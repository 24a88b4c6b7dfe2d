"""Progress of the work, for display, and what a process waited for until its first window, for the log."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives a stage's advance.

    Called from the working thread; must be quick, and may raise only KeyboardInterrupt, which ends the work.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` units of `stage` as finished (0 of n opens the stage, n of n closes it)."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""


class Startup:
    """The seconds of each part of a start, told once.

    Nothing is noted before `begin`: a service waits for its first CT, which is no part of its start.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._parts: dict[str, float] = {}

    def begin(self) -> None:
        """Take the start of this process as the beginning."""
        self._parts, self._since = {}, time.perf_counter() - _age_s()

    def lap(self, part: str) -> None:
        """Count the time since the last lap to a part."""
        if self._since is not None:
            now = time.perf_counter()
            self._parts[part] = self._parts.get(part, 0.0) + now - self._since
            self._since = now

    def first_window(self) -> None:
        """Tell the parts: from now on windows are computed."""
        if self._since is not None:
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items())
            log.info("first window %.1f s after the start of the process: %s", sum(self._parts.values()), parts)
            self._since = None


def _age_s() -> float:
    """Seconds since this process started; 0 where the system does not tell."""
    try:
        started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return 0.0


startup = Startup()
