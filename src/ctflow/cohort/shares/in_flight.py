"""The rows of a run: given to the overlapping pipeline as it takes them, tried again, and committed."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import TracebackType

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.outcome import RowOutcome
from ctflow.cohort.shares.attempt import MOST_ATTEMPTS, RowAttempt
from ctflow.cohort.watch import UNWATCHED, CohortWatcher, NodeState
from ctflow.core.errors import OutputError, ResourceError, StoreFailed
from ctflow.core.model import ModelSpec
from ctflow.core.processes import usable_cpus
from ctflow.engines.utilization import GpuMeter
from ctflow.pipeline.case import Case
from ctflow.pipeline.overlap.finding import CaseFinder
from ctflow.pipeline.overlap.processes import CasesInProcesses
from ctflow.settings.run import Settings

AHEAD = 2  # rows whose headers are read while all processes have one
_FINDERS = 4  # a series may have to be fetched; with local files one of them would do
_FINDER_CPUS = 8  # with so many, each of them reads headers in a process of its own
_MOST_IN_SUCCESSION = 20  # failures of the machine: by then it is certain that all other rows would fail, too
# What a machine lacks for one series, and may have for others.
_OF_ROW = frozenset({"worker-ended", "out-of-memory", "temporary-too-small"})
_END_S = 5.0
_RECENT_S = 10.0  # what a state says of the GPUs

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RunSetup:
    """What all rows of a run have in common.

    Attributes:
        base: The manifest's folder.
        spec: The model's.
        settings: The run's.
        stamp: What all outcomes have in common.
        watcher: Is told what becomes of the rows.
        gpus: Knows how busy the GPUs are; entered.
    """

    base: Path
    spec: ModelSpec
    settings: Settings
    stamp: RowOutcome
    watcher: CohortWatcher = UNWATCHED
    gpus: GpuMeter = field(default_factory=lambda: GpuMeter(()))


class RowsInFlight:
    """Rows on their way through the pipeline; a context manager whose end leaves the rest for the next start.

    Some threads find the rows' series, another one commits; in memory are the cases of as many rows as the pipeline has
    processes, and two more.

    Args:
        cases: The pipeline.
        destination: Gets the results.
        setup: What they have in common.
        count: How many cases the pipeline takes at a time.
        rows: Attempts that are known now, read as they are taken. Those of `add` follow them.
        on_committed: Is told in the thread that commits.
        on_again: Gets an attempt that is to be repeated, in that thread; None repeats it here, after all others.
    """

    def __init__(
        self,
        cases: CasesInProcesses,
        destination: RowDestination,
        setup: RunSetup,
        count: int,
        *,
        rows: Iterable[RowAttempt] = (),
        on_committed: Callable[[RowOutcome], None] = lambda outcome: None,
        on_again: Callable[[RowAttempt], None] | None = None,
    ) -> None:
        self._rows: Iterator[RowAttempt] = iter(rows)
        self._first: deque[RowAttempt] = deque()  # of the rows: looked at, not taken
        self._added: deque[RowAttempt] = deque()
        self._may_come = True
        self._cases, self._destination, self._setup = cases, destination, setup
        self._most, self._in_succession, self._refused_in_succession = count + AHEAD, 0, 0
        self._on_committed, self._on_again = on_committed, on_again
        self._under_way: set[RowAttempt] = set()
        self._done = 0
        self._committed_s = time.perf_counter()
        self._changed = threading.Condition()
        self._fault: BaseException | None = None
        self._is_ending = False
        self._finders = [
            threading.Thread(target=self._find_all, name=f"rows-{number}", daemon=True)
            for number in range(min(_FINDERS, self._most))
        ]
        self._finding = len(self._finders)
        self._commits = ThreadPoolExecutor(1, "commits")

    def __enter__(self) -> RowsInFlight:
        for finder in self._finders:
            finder.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            is_early = kind is not None or self._is_ending or self._fault is not None
            self._is_ending = True
            self._changed.notify_all()
        if is_early:
            self._destination.hurry()
        self._commits.shutdown(cancel_futures=True)  # a commit that has begun is completed
        deadline = time.monotonic() + _END_S
        for finder in self._finders:  # it may be waiting for a file server
            finder.join(max(deadline - time.monotonic(), 0.0))
        for attempt in list(self._under_way):  # no fault of theirs
            attempt.release()
            self._destination.end(attempt.name)

    def add(self, attempt: RowAttempt) -> None:
        """Add an attempt, from any thread."""
        with self._changed:
            self._added.append(attempt)
            self._changed.notify_all()

    def end(self) -> None:
        """No more rows will be added from outside: the pipeline ends once all are committed."""
        with self._changed:
            self._may_come = False
            self._changed.notify_all()

    def stop(self) -> None:
        """End the pipeline now, from any thread; rows under way stay open."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._cases.end()

    def check(self) -> None:
        """Raise what ended the run before all rows were committed."""
        with self._changed:
            if self._fault is not None:
                raise self._fault

    # ---------------------------------------------------------------------------------- in the threads that find

    def _find_all(self) -> None:
        try:
            with ExitStack() as stack:
                finder = stack.enter_context(CaseFinder()) if usable_cpus() >= _FINDER_CPUS else None
                while (attempt := self._next()) is not None:
                    self._begin(attempt, finder)
        except BaseException as error:  # noqa: BLE001  # raised in `check`
            self._fail(error)
        finally:
            with self._changed:
                self._finding -= 1
                is_last = self._finding == 0
            if is_last:
                self._cases.end()

    def _next(self) -> RowAttempt | None:
        """The next attempt, once there is place; None once all rows are committed, or the run ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._has_place)
            if self._is_over:
                return None
            attempt = (self._first or self._added).popleft()
            self._under_way.add(attempt)
        self._tell_state()
        return attempt

    @property
    def _waiting(self) -> RowAttempt | None:
        """The attempt whose turn it is."""
        if not self._first:
            self._first.extend(islice(self._rows, 1))
        return next(chain(self._first, self._added), None)

    @property
    def _has_place(self) -> bool:
        waiting = self._waiting
        if waiting is None:
            return False
        if waiting.is_alone or any(attempt.is_alone for attempt in self._under_way):
            return not self._under_way
        return len(self._under_way) < self._most

    @property
    def _is_over(self) -> bool:
        if self._is_ending or self._fault is not None:
            return True
        return not self._may_come and not self._under_way and self._waiting is None

    def _begin(self, attempt: RowAttempt, finder: CaseFinder | None) -> None:
        self._destination.begin(attempt.name)
        folder = self._destination.workspace(attempt.row.id)
        setup = self._setup
        cases = attempt.begin(folder, setup.base, setup.spec, setup.settings, finder)
        for place, case in enumerate(cases):  # as they are found: a slow location holds up no other row
            self._cases.add(case, folder, partial(self._take, attempt, place))
        if not cases:
            self._conclude(attempt)

    # --------------------------------------------------------------------------------- in the threads of the pipeline

    def _take(self, attempt: RowAttempt, place: int, case: Case) -> None:
        if attempt.take(place, case):
            self._conclude(attempt)

    def _conclude(self, attempt: RowAttempt) -> None:
        with self._changed:
            if not self._is_ending:
                self._commits.submit(self._concluded, attempt)

    # ---------------------------------------------------------------------------------- in the thread that commits

    def _concluded(self, attempt: RowAttempt) -> None:
        with self._changed:
            if self._fault is not None:  # rows that ended before it was known stay open, too
                return
        try:
            again = self._is_to_be_tried_again(attempt)
            if again:
                self._discard(attempt)
            else:
                self._commit(attempt)
            attempt.release()
            self._destination.end(attempt.name)
        except BaseException as error:  # noqa: BLE001  # raised in `check`
            self._fail(error)
            return
        with self._changed:
            self._under_way.discard(attempt)
            if again and self._on_again is None:
                self._added.append(attempt.next())  # after all others: a file server may have recovered by then
            self._changed.notify_all()
        self._tell_state()
        if again and self._on_again is not None:
            self._on_again(attempt)

    def _discard(self, attempt: RowAttempt) -> None:
        reason = attempt.errors[0].reason
        log.warning("row %s: attempt %d failed (%s) and will be repeated", attempt.row.id, attempt.number, reason)
        self._destination.discard(attempt.folder)
        self._setup.watcher.retried(attempt.row.id, reason, attempt.number)

    def _is_to_be_tried_again(self, attempt: RowAttempt) -> bool:
        """Count failures; raise what would end every other row in the same way: it is no fault of the row."""
        for error in attempt.errors:
            if isinstance(error, OutputError):
                raise error
        faults = [error for error in attempt.errors if _is_of_machine(error)]
        self._in_succession = self._in_succession + 1 if faults else 0
        if self._in_succession >= _MOST_IN_SUCCESSION:
            log.error("the machine failed %d rows in succession: the run ends, and they stay open", self._in_succession)
            raise faults[0]
        return attempt.may_pass and attempt.number < MOST_ATTEMPTS

    def _commit(self, attempt: RowAttempt) -> None:
        now = time.perf_counter()
        busy = self._setup.gpus.share(self._committed_s, now)
        self._committed_s = now
        stamp = replace(self._setup.stamp, gpu_busy=busy)
        outcome = attempt.concluded(self._setup.spec, stamp)
        try:
            self._destination.commit(attempt.folder, outcome, attempt.earlier)
            self._refused_in_succession = 0
        except StoreFailed as error:
            self._refused_in_succession += 1
            if error.reason != "store-refused" or self._refused_in_succession >= _MOST_IN_SUCCESSION:
                raise
            attempt.refuse(self._destination.workspace(attempt.row.id), error)
            outcome = attempt.concluded(self._setup.spec, stamp)
            self._destination.commit(attempt.folder, outcome, attempt.earlier)  # raises if it refuses this, too
        log.info("row %s: %s (%s) in %.1f s", outcome.id, outcome.status, outcome.reason, outcome.seconds)
        with self._changed:
            self._done += 1
        self._on_committed(outcome)
        self._setup.watcher.committed(outcome)

    def _tell_state(self) -> None:
        now = time.perf_counter()
        with self._changed:
            busy = self._setup.gpus.share(now - _RECENT_S, now)
            state = NodeState(self._setup.stamp.node, len(self._under_way), self._done, busy)
        self._setup.watcher.node(state)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._fault = self._fault or error
            self._changed.notify_all()


def _is_of_machine(error: BaseException | None) -> bool:
    """Whether an error says that the machine fails, such as a GPU that has gone, and not the row."""
    from ctflow.engines.contract import is_of_gpu  # noqa: PLC0415  # torch takes seconds

    if isinstance(error, ResourceError):
        return error.reason not in _OF_ROW
    while error is not None:
        if is_of_gpu(error):
            return True
        error = error.__cause__
    return False
