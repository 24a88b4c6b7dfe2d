"""A cohort's run on a terminal: a bar with failures, rate and time left, a line a machine; plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from ctflow.report.terminal import BarProgress, LineProgress

_ROWS = "segmenting rows"
_LINE_S = 60.0  # between plain lines
_RATED = 200  # commits from which a rate is taken
_RATED_S = 600.0  # and how old they may be
_MOST_MACHINES = 8
_WIDTHS = (12, 9, 11, 7)  # of the columns behind a machine's name
_GOOD = frozenset({"done", "partly"})


class EndedRow(Protocol):
    """What is shown of a row that is committed."""

    @property
    def status(self) -> str:
        """As of `ctflow.cohort.outcome.MarkName`."""


class MachineState(Protocol):
    """What is shown of a machine; as `ctflow.cohort.watch.NodeState`."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def under_way(self) -> int:
        """Rows that it has."""

    @property
    def done(self) -> int:
        """Rows that it committed."""

    @property
    def gpu_busy(self) -> float | None:
        """Share of the time in which its GPUs computed."""

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""


class Rate:
    """Commits a second, and from it the time that is left.

    Args:
        now: The clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._times: deque[float] = deque([now()], maxlen=_RATED)

    def add(self) -> None:
        """A row was committed."""
        self._times.append(self._now())
        while self._times[-1] - self._times[0] > _RATED_S and len(self._times) > 2:
            self._times.popleft()

    @property
    def a_second(self) -> float | None:
        """Commits a second of late; None before the second one."""
        elapsed = max(self._now(), self._times[-1]) - self._times[0]
        return (len(self._times) - 1) / elapsed if len(self._times) > 2 and elapsed > 0 else None

    def left_s(self, rows: int) -> float | None:
        """Seconds until so many rows more are committed."""
        rate = self.a_second
        return rows / rate if rate else None


@dataclass
class _ShownMachine:
    state: MachineState
    rate: Rate = field(default_factory=Rate)


class RowsShown:
    """What a run's rows and machines came to so far; told by `ctflow.cohort.watch.CohortWatcher`'s calls.

    Args:
        show: Called after each change, without a lock.
    """

    def __init__(self, show: Callable[[], None]) -> None:
        self._show, self._lock = show, threading.Lock()
        self._machines: dict[str, _ShownMachine] = {}
        self._statuses: Counter[str] = Counter()
        self._rate = Rate()
        self.total = self.repeats = 0

    def began(self, rows: int, before: Mapping[Any, int]) -> None:
        """The run begins with so many rows; some were committed before."""
        with self._lock:
            self.total, self._rate = rows, Rate()
            self._statuses = Counter(before)
        self._show()

    def committed(self, outcome: EndedRow) -> None:
        """A row is committed."""
        with self._lock:
            self._statuses[outcome.status] += 1
            self._rate.add()
        self._show()

    def retried(self, row_id: str, reason: str, attempt: int) -> None:
        """A row will be tried again."""
        with self._lock:
            self.repeats += 1
        self._show()

    def node(self, state: MachineState) -> None:
        """A machine's state."""
        with self._lock:
            machine = self._machines.setdefault(state.name, _ShownMachine(state))
            for _ in range(max(state.done - machine.state.done, 0)):
                machine.rate.add()
            machine.state = state
            if state.is_gone:
                del self._machines[state.name]
        self._show()

    @property
    def done(self) -> int:
        """Rows that are committed, whatever their status."""
        return self._statuses.total()

    @property
    def faults(self) -> str:
        """Rows that are not segmented, in words; empty if there are none."""
        with self._lock:
            found = [f"{count:,} {status}" for status, count in sorted(self._statuses.items()) if status not in _GOOD]
        return ", ".join(each for each in found if not each.startswith("0 "))

    @property
    def speed(self) -> str:
        """The rate in words."""
        with self._lock:
            return rate_in_words(self._rate.a_second)

    @property
    def left(self) -> str:
        """The time that is left, in words; empty if it is not known yet, or over."""
        with self._lock:
            seconds = self._rate.left_s(self.total - self._statuses.total())
        return f"{time_in_words(seconds)} left" if seconds else ""

    @property
    def machines(self) -> list[tuple[str, ...]]:
        """Name, rows under way, rows committed, rate and GPU of each machine, in words."""
        with self._lock:
            found = [(machine.state, machine.rate.a_second) for _, machine in sorted(self._machines.items())]
        return [
            (
                "".join(letter if letter.isprintable() else "?" for letter in state.name),
                f"{state.under_way} under way",
                f"{state.done:,} done",
                rate_in_words(rate),
                "" if state.gpu_busy is None else f"GPU {100 * state.gpu_busy:.0f} %",
            )
            for state, rate in found
        ]


def rate_in_words(a_second: float | None) -> str:
    """CTs a second, a minute or an hour, whichever is at least one."""
    if not a_second:
        return ""
    units = (("s", 1), ("min", 60), ("h", 3600))
    unit, seconds = next((each for each in units if a_second * each[1] >= 1), units[-1])
    return f"{a_second * seconds:.1f} CT/{unit}"


def time_in_words(seconds: float) -> str:
    """A length of time such as 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


class RowLines(LineProgress):
    """Writes a line at each quarter of the rows, and a minute after the last; `shown` takes what happens.

    Args:
        stream: Gets the lines.
        now: The clock.
    """

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._now, self._told_s, self._told_quarter = now, now(), 0
        self.shown = RowsShown(self._say)
        self._turn = threading.Lock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """As `LineProgress`; rows are told by `shown`."""
        if stage != "rows":
            super().__call__(stage, done, total)

    def _say(self) -> None:
        shown = self.shown
        with self._turn:
            quarter = 4 * shown.done // shown.total if shown.total else 0
            if self._told_quarter == quarter and self._now() - self._told_s < _LINE_S:
                return
            self._told_s, self._told_quarter = self._now(), quarter
            facts = [fact for fact in (shown.faults, shown.speed, shown.left) if fact]
            self._stream.write("; ".join([f"{_ROWS}: {shown.done:,} of {shown.total:,}", *facts]) + "\n")
            machines = shown.machines
            for machine in machines[:_MOST_MACHINES] if len(machines) > 1 else []:
                self._stream.write(f"  {machine[0]}: {', '.join(filter(None, machine[1:]))}\n")
            if len(machines) > _MOST_MACHINES:
                self._stream.write(f"  and {len(machines) - _MOST_MACHINES} machines more\n")
            self._stream.flush()


class RowBars(BarProgress):
    """Draws a bar for the rows with the lines of the machines below it, and bars of other stages.

    Args:
        bars: The live display.
    """

    def __init__(self, bars: _Bars) -> None:
        super().__init__(bars)
        self._drawn, self.shown = bars, RowsShown(self._show)
        bars.shown = self.shown
        self._rows: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """As `BarProgress`; rows are told by `shown`."""
        if stage != "rows":
            super().__call__(stage, done, total)
            self._drawn.update(self._tasks[stage], visible=done < total)

    def _show(self) -> None:
        shown = self.shown
        if not shown.total:
            return
        if self._rows is None:
            self._rows = self._drawn.add_task(_ROWS, total=shown.total)
        self._drawn.update(self._rows, completed=shown.done)


class _Bars(RichProgress):
    """Bars, and below them the machines."""

    def __init__(self, console: Console) -> None:
        self.shown: RowsShown | None = None  # before the display asks for it
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,}/{task.total:,}", justify="right"),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn four times a second."""
        yield from super().get_renderables()
        shown = self.shown
        if shown is None or not shown.total:
            return
        facts = Text("  ")
        for words, style in ((shown.faults, "red"), (shown.speed, ""), (shown.left, "cyan")):
            if words:
                facts.append("  " if len(facts) > 2 else "").append(words, style)
        yield facts
        machines = shown.machines
        grid = Table.grid(padding=(0, 2))
        grid.add_column(
            no_wrap=True, overflow="ellipsis", max_width=max(min(28, self.console.width - sum(_WIDTHS) - 10), 6)
        )
        for width in _WIDTHS:  # the name gives way first
            grid.add_column(justify="right", no_wrap=True, min_width=width)
        for machine in machines[:_MOST_MACHINES]:
            grid.add_row(Text(f"  {machine[0]}", style="dim"), *machine[1:])
        yield grid
        if len(machines) > _MOST_MACHINES:
            yield Text(f"  and {len(machines) - _MOST_MACHINES} machines more", style="dim")


@contextmanager
def rows_display(stream: TextIO) -> Iterator[RowBars | RowLines]:
    """A display of a cohort's run, live if the stream is a terminal.

    Args:
        stream: Gets it.

    Yields:
        A `ctflow.core.progress.Progress` whose `shown` takes what happens to rows.
    """
    if not stream.isatty():
        yield RowLines(stream)
        return
    drawn = _Bars(Console(file=stream))
    bars = RowBars(drawn)
    with drawn, _log_above():
        yield bars


@contextmanager
def _log_above() -> Iterator[None]:
    """Let the log's lines scroll past above the display instead of into it: rich has replaced sys.stderr."""
    moved = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
            moved.append((handler, handler.setStream(sys.stderr)))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
