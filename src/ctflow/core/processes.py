"""ctflow's own child processes: how they start and end, their share of the CPUs, and their log."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from ctflow.core.entry_point import keep_values_out, traceback_without_texts

_most_cpus = 0  # of this process, if another one shares them out


def begin_child() -> None:
    """Ignore Ctrl-C and a closed terminal: the parent ends its children. End with a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, its container's share of time rounded up, its parent's word."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(count, _most_cpus or count)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        return count


def most_open_files() -> int:
    """How many files this process may have open at a time (`ulimit -n`)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def use_cpus(most: int) -> None:
    """Let this process take no more than so many CPUs from now on: its parent has others for the rest."""
    global _most_cpus  # noqa: PLW0603  # a property of the process
    _most_cpus = most


@dataclass(frozen=True)
class Line:
    """A line of a child's log, for its parent's."""

    level: int
    name: str
    message: str

    def log(self) -> None:
        """Log it here, under its own name."""
        logging.getLogger(self.name).log(self.level, "%s", self.message)


def log_to_parent(connection: Connection, level: int) -> None:
    """Send this process's log to its parent as `Line` objects, without values of data sets that libraries quote."""
    sender = _Sender(connection)
    keep_values_out(sender)
    logging.basicConfig(level=level, handlers=[sender], force=True)


class _Sender(logging.Handler):
    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            message += "\n" + traceback_without_texts(record.exc_info[1])
        with contextlib.suppress(OSError):
            self._connection.send(Line(record.levelno, record.name, message))


def words_of_exit_code(code: int | None) -> str:
    """How a process ended."""
    if code is not None and code < 0:
        return f"with signal {signal.Signals(-code).name}"
    return f"with exit code {code}"


def available_memory() -> int:
    """Bytes that processes may still take: of the machine, and of the container's limit."""
    found = [_of_machine()]
    for name in ("memory.max", "memory.high"):
        with contextlib.suppress(OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
            limit = int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii"))
            found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    return max(0, min(found))


def _of_machine() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
