"""What a run waits for from the start of its process until the first window, and byte code, which makes it shorter."""

from __future__ import annotations

import compileall
import logging
import os
import sys
import time
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)


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


def compile_imported() -> tuple[int, int]:
    """Compile every imported module that has no byte code file.

    Python itself writes none where PYTHONDONTWRITEBYTECODE is set, and pip none with --no-compile: torch alone then
    takes 2 s longer to import, each time.

    Returns:
        How many modules were compiled, and of how many the byte code could not be written.
    """
    compiled = failed = 0
    for module in [each for each in sys.modules.values() if isinstance(each, ModuleType)]:
        spec = vars(module).get("__spec__")
        source, target = (getattr(spec, name, None) for name in ("origin", "cached"))
        if not source or not target or not source.endswith(".py") or Path(target).exists():
            continue
        compileall.compile_file(source, quiet=2)
        if Path(target).exists():
            compiled += 1
        else:
            failed += 1
    return compiled, failed
