"""Processes that each load and write one case at a time, and the thread that leads them."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

from ctflow.compat.python import bare_start
from ctflow.core.atomic import remove_temporary_folder
from ctflow.core.entry_point import log as entry_log
from ctflow.core.errors import BackendUnavailable, CtflowError
from ctflow.core.model import Model
from ctflow.core.processes import Line, most_open_files, usable_cpus, words_of_exit_code
from ctflow.core.progress import Progress
from ctflow.pipeline.case import Case, attempt
from ctflow.pipeline.overlap.gpu import few_threads, pin
from ctflow.pipeline.overlap.messages import InOrder
from ctflow.pipeline.overlap.place import CaseProcess, Place, loaded_case
from ctflow.pipeline.overlap.process import (
    CaseMemory,
    Forget,
    Idle,
    Load,
    Loaded,
    Outcome,
    SlicesRead,
    Write,
    run_case_process,
)
from ctflow.pipeline.stages import load_case, prepare_result
from ctflow.settings.run import Settings

_LOOK_S = 0.1
_END_S = 10.0
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
    """

    def __init__(
        self, cases: Sequence[Case], settings: Settings, output: Path, progress: Progress, *, count: int
    ) -> None:
        self._settings, self._output, self._progress = settings, output, progress
        self._places = [Place(number, case) for number, case in enumerate(cases)]
        self._count = max(1, min(count, len(self._places), (most_open_files() - _OWN_FILES) // _PROCESS_FILES))
        self._cpus = max(1, usable_cpus() // max(self._count, 1))
        self._processes: list[CaseProcess] = []
        self._given = 0
        self._written = 0  # whose progress was shown
        self._changed = threading.Condition()
        self._fault: BaseException | None = None
        self._is_ending = False
        self._woken, self._waker = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._lead, name="cases", daemon=True)

    def __enter__(self) -> CasesInProcesses:
        self._messages = InOrder(len(self._places))
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
                self._end(each)
            self._woken.close()
            self._waker.close()
            self._messages.close()

    # ------------------------------------------------------------------------------------- in the thread that segments

    @property
    def done(self) -> tuple[Case, ...]:
        """As `CasesOfRun.done`."""
        return tuple(place.done for place in self._places if place.done is not None)

    @property
    def times_s(self) -> tuple[dict[str, float], ...]:
        """When each case was `given` to a process, `loaded`, `begun`, `handed` over and `done`, by perf_counter."""
        return tuple(place.times_s for place in self._places)

    def loaded(self) -> Iterator[Case]:
        """As `CasesOfRun.loaded`."""
        self._messages.open()
        with few_threads(self._cpus):
            for place in self._places:
                self._messages.current = place.number
                case = load_case(place.case, self._progress) if self._is_loaded_here(place) else self._found(place)
                place.note("begun")
                yield case
        self._messages.current = None

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

        self._settle(place, write_case(case, model, self._settings, self._output, self._progress))

    def finished(self) -> tuple[Case, ...]:
        """As `CasesOfRun.finished`."""
        self._wait(lambda: all(place.done is not None for place in self._places), self._catch_up)
        self._catch_up()
        return self.done

    def _place_of(self, case: Case) -> Place:
        return next(each for each in self._places if each.case.key == case.key)

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
        for place in [place for place in self._places if place.is_writing and place.case.error and not place.done]:
            from ctflow.pipeline.write import superseded  # noqa: PLC0415  # seldom needed here

            before, self._messages.current = self._messages.current, place.number
            self._settle(place, superseded(place.case, self._output))
            self._messages.current = before
        while self._written < len(self._places) and self._places[self._written].done is not None:
            if self._places[self._written].is_writing:
                self._progress("write", 0, 1)
                self._progress("write", 1, 1)
            self._written += 1

    def _shared(self, place: Place, case: Case, model: Model, ready: list[tuple[CaseProcess, Write]]) -> Case:
        """Share a segmented case's labels with its process; or fail the case as the process has."""
        process, before, place.loaded = place.process, place.loaded, None
        if process is None or before is None:
            return replace(case, error=place.case.error)
        found = case.segmented
        arrays = {
            "labels": process.memory.share("labels", found.labels),
            "fractions": process.memory.share("fractions", found.fractions),
        }
        word = Write(
            replace(found, labels=found.labels[:0], fractions=None),
            arrays,
            {name: value for name, value in case.stage_seconds.items() if name not in before.stage_seconds},
            case.warnings[len(before.warnings) :],
            replace(model, weights={}),
            self._settings,
            self._output,
        )
        ready.append((process, word))
        return case

    def _settle(self, place: Place, done: Case) -> None:
        """Note a case as done that its process need not write."""
        with self._changed:
            process, place.process, place.loaded, place.done = place.process, None, None, done
            if process is not None:
                process.place = None
        if process is not None:
            self._send(process, Forget())
        self._messages.finish(place.number)
        self._wake()

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
                ready = wait([self._woken, *(each.connection for each in self._processes)])
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
            while process.is_ready and self._given < len(self._places):
                place = self._places[self._given]
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
        for _ in range(min(self._count - len(self._processes), len(self._places) - self._given - waiting)):
            if self._started() is None:
                return

    def _started(self) -> CaseProcess | None:
        """A new process; None, and the next case in this one, if none can be started and none is there."""
        try:
            return self._start()
        except OSError as error:
            if not self._processes:
                self._take_here(f"no process starts for a case: {type(error).__name__}")
            return None

    def _take_here(self, why: str) -> None:
        """Let this process do all of the next case."""
        if self._given == len(self._places):
            return
        place = self._places[self._given]
        self._given += 1
        if not any(each.is_here for each in self._places):
            self._messages.add(place.number, Line(logging.WARNING, __name__, f"{why}; this one does all of it"))
        with self._changed:
            place.is_here = True
            self._changed.notify_all()

    def _start(self) -> CaseProcess:
        # Not forked: this process has threads and a GPU, which a fork does not survive.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with closing(theirs), ExitStack() as failing:
            failing.callback(ours.close)
            memory = CaseMemory()
            failing.callback(memory.close)
            process = context.Process(
                target=run_case_process,
                args=(theirs, memory, logging.getLogger().getEffectiveLevel()),
                kwargs={"debug": entry_log.level == logging.DEBUG},
                name="case",
            )
            with bare_start():
                process.start()
            failing.pop_all()
        started = CaseProcess(process, ours, memory)
        self._processes.append(started)
        return started

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
            self._messages.finish(place.number)

    def _ended(self, process: CaseProcess) -> None:
        """Fail the case of a process that has ended."""
        self._processes.remove(process)
        process.process.join()
        how = words_of_exit_code(process.process.exitcode)
        place = process.place
        with self._changed:
            self._end(process)
        if place is None:
            if not process.has_begun:
                self._take_here(f"no process starts for a case: it ended {how}")
            return
        what = f"series {place.case.candidate.series.digest}: the process that reads and writes it ended {how}"
        error: CtflowError = BackendUnavailable(f"{what}: run it again", reason="worker-ended")
        self._messages.add(place.number, Line(logging.ERROR, __name__, error.described))
        with self._changed:
            place.process = None
            place.case = replace(place.case, error=error)
            self._changed.notify_all()

    def _end(self, process: CaseProcess) -> None:
        """End a process and remove what it has left."""
        with process.sending:
            process.connection.close()
        process.process.kill()
        process.process.join()
        if process.place is not None and process.process.pid is not None:
            remove_temporary_folder(self._output, process.place.case.key, process.process.pid)
        process.process.close()
        process.memory.close()
