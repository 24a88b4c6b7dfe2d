"""Processes that each load and write one case at a time, and the thread that leads them."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from ctflow.core.errors import BackendUnavailable, CtflowError
from ctflow.core.model import Model
from ctflow.core.processes import Line, most_open_files, usable_cpus, words_of_exit_code
from ctflow.core.progress import Progress, silent
from ctflow.pipeline.case import Case, attempt
from ctflow.pipeline.overlap.gpu import few_threads, pin
from ctflow.pipeline.overlap.messages import InOrder
from ctflow.pipeline.overlap.place import CaseProcess, Place, loaded_case, shared_result, started_process
from ctflow.pipeline.overlap.process import (
    Forget,
    Idle,
    Load,
    Loaded,
    Outcome,
    SlicesRead,
    Write,
)
from ctflow.pipeline.stages import load_case, prepare_result
from ctflow.settings.run import Settings

_LOOK_S = 0.1
_END_S = 10.0
_KEEP_S = 30.0  # processes without a case, while more cases may come
_PROCESS_FILES = 16  # of this process, for each: a pipe, two of its life, its memory, each array
_OWN_FILES = 48  # for a model, an engine, and what writes a result

log = logging.getLogger(__name__)


class CasesInProcesses:
    """Cases in processes: each reads a case, waits until it is segmented, and writes it.

    Results, their order and the order of messages are those of `CasesInTurn`. A process that ends fails its case.

    Args:
        cases: The cases.
        settings: The run's.
        output: Gets the results' folders.
        progress: Receives slices and files, in the thread that made this.
        count: Most processes, and so cases in memory, at a time.
        more: Whether `add` may add cases, until `end`; a process is then ready before the first one.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        settings: Settings,
        output: Path,
        progress: Progress = silent,
        *,
        count: int,
        more: bool = False,
    ) -> None:
        self._settings, self._progress = settings, progress
        self._places = {number: Place(number, case, output) for number, case in enumerate(cases)}
        self._next = len(self._places)
        self._keeps_places, self._may_come, self._is_ahead, self._is_over = not more, more, more, False
        most = count if more else min(count, self._next)
        self._count = max(1, min(most, (most_open_files() - _OWN_FILES) // _PROCESS_FILES))
        self._cpus = max(1, usable_cpus() // self._count)
        self._processes: list[CaseProcess] = []
        self._given = 0
        self._written = 0  # whose progress was shown
        self._changed = threading.Condition()
        self._fault: BaseException | None = None
        self._is_ending = False
        self._woken, self._waker = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._lead, name="cases", daemon=True)

    def __enter__(self) -> CasesInProcesses:
        self._messages = InOrder(self._next)
        self._thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._wake(is_ending=True)
            self._thread.join()
            for each in self._processes:
                if each.place is None:
                    each.process.kill()
                else:
                    each.process.terminate()  # it removes what it has half-written
            deadline = time.monotonic() + _END_S
            for each in self._processes:
                each.process.join(max(deadline - time.monotonic(), 0.0))
        finally:  # even after a second Ctrl-C
            for each in self._processes:
                each.end()
            self._woken.close()
            self._waker.close()
            self._messages.close()

    # ------------------------------------------------------------------------------------- in the thread that segments

    def add(self, case: Case, output: Path, on_done: Callable[[Case], None], settings: Settings | None = None) -> None:
        """Add a case, from any thread, which may have its own settings.

        `on_done` is told in one of two threads, and then the case is forgotten.
        """
        with self._changed:
            self._messages.expect(self._next)
            self._places[self._next] = Place(self._next, case, output, on_done, settings)
            self._next += 1
            self._changed.notify_all()
        self._wake()

    def end(self) -> None:
        """No more cases will come, and `loaded` ends before the next one."""
        with self._changed:
            self._may_come, self._is_over = False, True
            self._changed.notify_all()

    @property
    def done(self) -> tuple[Case, ...]:
        """As `CasesOfRun.done`."""
        return tuple(place.done for place in self._all() if place.done is not None)

    @property
    def times_s(self) -> tuple[dict[str, float], ...]:
        """When each case was `given` to a process, `loaded`, `begun`, `handed` over and `done`, by perf_counter."""
        return tuple(place.times_s for place in self._all())

    def loaded(self) -> Iterator[Case]:
        """As `CasesOfRun.loaded`."""
        self._messages.open()
        with few_threads(self._cpus):
            for number in itertools.count():
                self._wait(partial(self._is_known, number), self._catch_up)
                place = self._places.get(number)
                if place is None or self._is_over:
                    break
                self._messages.current = number
                case = load_case(place.case, self._progress) if self._is_loaded_here(place) else self._found(place)
                place.note("begun")
                yield case
                self._messages.current = None

    def _is_known(self, number: int) -> bool:
        """Whether a case has come, or will not."""
        return number < self._next or not self._may_come

    def prepare(self, case: Case) -> Case:
        """As `CasesOfRun.prepare`: its process, if it has one, does it."""
        return prepare_result(case) if self._place_of(case).is_here else case

    def write(self, case: Case, model: Model) -> None:
        """As `CasesOfRun.write`."""
        place = self._place_of(case)
        place.note("handed")
        with self._changed:
            failed = place.case.error  # its process has ended meanwhile
            place.is_writing = case.error is None and failed is None and not place.is_here
        if place.is_writing:
            ready: list[tuple[CaseProcess, Write]] = []
            with self._changed:  # the process cannot be ended meanwhile
                case = attempt(case, lambda: self._shared(place, case, model, ready))
            for process, word in ready:  # without the lock: a process may be telling something first
                self._send(process, word)
            if case.error is None:
                return
        elif failed is not None and case.error is None:
            case = place.case
        from ctflow.pipeline.write import write_case  # noqa: PLC0415  # seldom needed here

        self._settle(place, write_case(case, model, place.settings or self._settings, place.output, self._progress))

    def finished(self) -> tuple[Case, ...]:
        """As `CasesOfRun.finished`."""
        self._wait(lambda: all(place.done is not None for place in self._all()), self._catch_up)
        self._catch_up()
        return self.done

    def _place_of(self, case: Case) -> Place:
        return next(each for each in self._all() if each.case.candidate is case.candidate)

    def _all(self) -> tuple[Place, ...]:
        return tuple(self._places.values())

    def _is_loaded_here(self, place: Place) -> bool:
        """Wait until a case is loaded; return whether no process could be started for it."""
        total = len(place.case.candidate.series.instances)
        latest = SlicesRead(0, total)

        def show() -> None:
            nonlocal latest
            self._catch_up()
            steps = [place.steps.popleft() for _ in range(len(place.steps))] or [latest]
            for step in steps:
                self._progress("read", step.done, step.total)
            latest = steps[-1]

        self._progress("read", 0, total)
        self._wait(lambda: place.told is not None or place.is_here or place.case.error is not None, show)
        show()
        return place.is_here

    def _found(self, place: Place) -> Case:
        """A case that its process has loaded, or failed to."""
        with self._changed:  # the process cannot be ended meanwhile
            process, told = place.process, place.told
            if process is None or told is None:
                return place.case
            place.loaded = attempt(place.case, lambda: loaded_case(place.case, told, process.memory))
            pin(process.memory["volume"])
            return place.loaded

    def _wait(self, is_over: Callable[[], bool], show: Callable[[], None]) -> None:
        """Wait, showing the progress meanwhile: whatever interrupts the work is raised there."""
        while True:
            with self._changed:
                if self._fault is not None:
                    raise RuntimeError("the thread that leads the cases' processes failed") from self._fault
                if is_over() or self._changed.wait_for(is_over, _LOOK_S):
                    return
            show()

    def _catch_up(self) -> None:
        """Fail the cases whose process ended while it wrote them, and show the progress of those written."""
        for place in [place for place in self._all() if place.is_writing and place.case.error and not place.done]:
            from ctflow.pipeline.write import superseded  # noqa: PLC0415  # seldom needed here

            before, self._messages.current = self._messages.current, place.number
            self._settle(place, superseded(place.case, place.output))
            self._messages.current = before
        while (shown := self._places.get(self._written)) is not None and shown.done is not None:
            if shown.is_writing:
                self._progress("write", 0, 1)
                self._progress("write", 1, 1)
            self._written += 1
            if not self._keeps_places:
                with self._changed:
                    del self._places[shown.number]

    def _shared(self, place: Place, case: Case, model: Model, ready: list[tuple[CaseProcess, Write]]) -> Case:
        """Share a segmented case's labels with its process; or fail the case as the process has."""
        process, before, place.loaded = place.process, place.loaded, None
        if process is None or before is None:
            return replace(case, error=place.case.error)
        settings = place.settings or self._settings
        ready.append((process, shared_result(case, before, process.memory, model, settings, place.output)))
        return case

    def _settle(self, place: Place, done: Case) -> None:
        """Note a case as done that its process need not write."""
        with self._changed:
            process, place.process, place.loaded, place.done = place.process, None, None, done
            if process is not None:
                process.place = None
        if process is not None:
            self._send(process, Forget())
        self._tell_done(place)
        self._wake()

    def _tell_done(self, place: Place) -> None:
        self._messages.finish(place.number)
        if place.on_done is not None and place.done is not None:
            place.on_done(place.done)

    def _wake(self, *, is_ending: bool = False) -> None:
        self._is_ending = self._is_ending or is_ending
        self._waker.send(None)

    def _send(self, process: CaseProcess, word: object) -> bool:
        """Send to a process; if it has ended, the thread that leads the processes will find that out."""
        try:
            with process.sending:
                process.connection.send(word)
        except OSError:
            log.debug("a case's process does not take %s", type(word).__name__)
            return False
        return True

    # ---------------------------------------------------------------------- in the thread that leads the processes

    def _lead(self) -> None:
        try:
            while not self._is_ending:
                self._give()
                keep_s = None if self._keeps_places else _KEEP_S
                ready = wait([self._woken, *(each.connection for each in self._processes)], keep_s)
                if not ready:
                    self._end_idle()
                if self._woken in ready:
                    self._woken.recv()
                for each in [each for each in self._processes if each.connection in ready]:
                    self._receive(each)
        except BaseException as error:  # noqa: BLE001  # raised where the cases are waited for
            with self._changed:
                self._fault = error
                self._changed.notify_all()

    def _give(self) -> None:
        """Start processes for the next cases, and give these to those that are ready."""
        for process in [each for each in self._processes if each.is_ready]:
            while process.is_ready and (place := self._places.get(self._given)) is not None:
                try:
                    if not self._send(process, Load(place.case, self._cpus)):
                        return  # it has ended: another one gets the case
                except Exception as error:  # noqa: BLE001  # headers may be nested too deeply for pickle
                    self._take_here(f"a case's headers do not reach a process: {type(error).__name__}")
                    continue
                self._given += 1
                process.place, place.process, process.is_ready = place, process, False
                place.note("given")
        waiting = sum(each.place is None for each in self._processes)
        wanted = max(self._next - self._given, self._is_ahead and not self._processes)
        for _ in range(min(self._count - len(self._processes), wanted - waiting)):
            if self._started() is None:
                return

    def _end_idle(self) -> None:
        """End the processes that have no case, except one: each keeps the memory of its largest."""
        for process in [each for each in self._processes if each.is_ready][1:]:
            self._processes.remove(process)
            process.end()

    def _started(self) -> CaseProcess | None:
        """A new process; None, and the next case in this one, if none can be started and none is there."""
        try:
            process = started_process()
        except OSError as error:
            if not self._processes:
                self._take_here(f"no process starts for a case: {type(error).__name__}")
            return None
        self._processes.append(process)
        return process

    def _take_here(self, why: str) -> None:
        """Let this process do all of the next case."""
        place = self._places.get(self._given)
        if place is None:
            return
        self._given += 1
        if not any(each.is_here for each in self._all()):
            self._messages.add(place.number, Line(logging.WARNING, __name__, f"{why}; this one does all of it"))
        with self._changed:
            place.case, place.is_here = place.case.whole, True
            self._changed.notify_all()

    def _receive(self, process: CaseProcess) -> None:
        place = process.place
        try:
            word = process.connection.recv()
        except (EOFError, OSError):
            self._ended(process)
            return
        if isinstance(word, Idle):
            process.is_ready = process.has_begun = True
            return
        if place is None:
            return  # the last lines of a case that ended here
        if isinstance(word, Line):
            self._messages.add(place.number, word)
            return
        with self._changed:
            if isinstance(word, SlicesRead):
                place.steps.append(word)
            elif isinstance(word, Loaded):
                place.told = word
                place.note("loaded")
            elif isinstance(word, Outcome):
                place.done, place.process, process.place = word.applied_to(place.case), None, None
            self._changed.notify_all()
        if place.done is not None:
            place.note("done")
            self._tell_done(place)

    def _ended(self, process: CaseProcess) -> None:
        """Fail the case of a process that has ended."""
        self._processes.remove(process)
        process.process.join()
        how = words_of_exit_code(process.process.exitcode)
        place = process.place
        with self._changed:
            process.end()
        if place is None:
            if not process.has_begun:
                self._is_ahead = False
                self._take_here(f"no process starts for a case: it ended {how}")
            return
        what = f"series {place.case.candidate.series.digest}: the process that reads and writes it ended {how}"
        error: CtflowError = BackendUnavailable(f"{what}: run it again", reason="worker-ended")
        self._messages.add(place.number, Line(logging.ERROR, __name__, error.described))
        with self._changed:
            place.process = None
            place.case = replace(place.case, error=error)
            self._changed.notify_all()
