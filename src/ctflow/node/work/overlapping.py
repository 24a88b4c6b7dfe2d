"""The tasks of a worker that overlap: while one series is segmented, processes read the next and write the last.

A thread takes tasks and finds their cases; the worker's first thread segments them in order; answers are sent when a
result is on disk, in any order.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from ctflow.core.model import Model
from ctflow.node.work.worker import (
    Answer,
    Setup,
    Task,
    TaskOutcome,
    answered,
    cases_of_task,
    complete,
    folder_of_result,
    is_answered,
    link_files,
    outcome_of,
    place_of_cases,
)
from ctflow.pipeline.case import Case
from ctflow.pipeline.overlap.cases import most_cases
from ctflow.pipeline.overlap.processes import CasesInProcesses
from ctflow.pipeline.segmenter import Segmenter
from ctflow.pipeline.stages import segment_case
from ctflow.settings.run import Settings

_USUAL_VOXELS = 600 * 512 * 512  # of the CTs that are to come


def tasks_at_a_time(settings: Settings, workers: int) -> int:
    """How many tasks a worker takes at a time, by the settings, or its share of CPUs and memory."""
    return settings.cases_in_flight or most_cases(_USUAL_VOXELS, workers)


class OverlappingTasks:
    """The tasks of a worker.

    Args:
        connection: Gives tasks.
        send: Sends an answer, from any thread.
        setup: The worker's.
        model: Its model.
        segmenter: Open.
        count: Most tasks at a time.
    """

    def __init__(
        self,
        connection: Connection,
        send: Callable[[object], None],
        setup: Setup,
        model: Model,
        segmenter: Segmenter,
        count: int,
    ) -> None:
        self._connection, self._send_word, self._setup = connection, send, setup
        self._model, self._segmenter = model, segmenter
        self._cases = CasesInProcesses((), setup.settings, Path(), count=count, more=True)

    def run(self) -> None:
        """Run tasks until the pipe closes; what runs then is given up, and nothing half-written stays."""
        with self._cases as cases:
            threading.Thread(target=self._take_tasks, name="tasks", daemon=True).start()
            for case in cases.loaded():
                cases.write(segment_case(case, self._segmenter, prepare=cases.prepare), self._model)

    def _take_tasks(self) -> None:
        try:
            while True:
                self._begin(self._connection.recv())
        except (OSError, EOFError):
            self._cases.end()

    def _begin(self, task: Task) -> None:
        outcome = outcome_of(task, lambda: self._begun(task))
        if outcome is not None:
            self._answer(task, outcome)

    def _begun(self, task: Task) -> TaskOutcome | None:
        """Let a task's case be read; return its outcome if there is nothing to compute."""
        started = time.monotonic()
        folder = folder_of_result(task, self._setup, self._model)
        if is_answered(task, folder):
            return answered(folder, self._model, started)
        cases = cases_of_task(task, link_files(task), self._setup, self._model, folder)
        if isinstance(cases, TaskOutcome):
            return cases
        volumes = _Volumes(len(cases))
        for place, case in enumerate(cases):
            done = partial(self._done, task, folder, started, volumes, place)
            self._cases.add(case, place_of_cases(cases, folder), done)
        return None

    def _done(self, task: Task, folder: Path, started: float, volumes: _Volumes, place: int, case: Case) -> None:
        cases = volumes.with_done(place, case)
        if cases is None:
            return

        def outcome() -> TaskOutcome:
            complete(cases, folder)
            return answered(folder, self._model, started)

        self._answer(task, outcome_of(task, outcome))

    def _answer(self, task: Task, outcome: TaskOutcome) -> None:
        shutil.rmtree(task.scratch, ignore_errors=True)
        try:
            self._send_word(Answer(task.job.key, outcome))
        except OSError:  # the node has gone
            self._cases.end()


class _Volumes:
    """The cases of a task, which end in any order, in two threads."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, dict[int, Case]()
        self._lock = threading.Lock()

    def with_done(self, place: int, case: Case) -> list[Case] | None:
        """All cases in their order when the last one is done, else None."""
        with self._lock:
            self._done[place] = case
            return [self._done[each] for each in range(self._count)] if len(self._done) == self._count else None
