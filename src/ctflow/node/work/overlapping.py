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
from ctflow.node.work.messages import Answer, Setup, Task, TaskOutcome
from ctflow.node.work.models import OpenModels
from ctflow.node.work.worker import (
    CaseWork,
    answered,
    complete,
    folder_of_result,
    give_memory_back,
    is_answered,
    link_files,
    model_of_task,
    outcome_of,
    place_of_cases,
    works_of_task,
)
from ctflow.pipeline.case import Case, attempt
from ctflow.pipeline.overlap.cases import most_cases
from ctflow.pipeline.overlap.processes import CasesInProcesses
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
        models: Its models.
        count: Most tasks at a time.
    """

    def __init__(
        self,
        connection: Connection,
        send: Callable[[object], None],
        setup: Setup,
        models: OpenModels,
        count: int,
    ) -> None:
        self._connection, self._send_word, self._setup = connection, send, setup
        self._models = models
        self._works: dict[int, CaseWork] = {}  # by their case's candidate, which stays the same
        self._cases = CasesInProcesses((), setup.settings, Path(), count=count, more=True)

    def run(self) -> None:
        """Run tasks until the pipe closes; what runs then is given up, and nothing half-written stays."""
        with self._cases as cases:
            threading.Thread(target=self._take_tasks, name="tasks", daemon=True).start()
            for case in cases.loaded():
                work = self._works[id(case.candidate)]
                done = attempt(case, partial(self._segmented, work, case))
                give_memory_back(done, work.choice, self._models)
                cases.write(done, self._models.facts(work.choice, work.settings))

    def _segmented(self, work: CaseWork, case: Case) -> Case:
        """Segment a case; its model is opened first if it is not."""
        return segment_case(case, self._models.segmenter(work.choice, work.settings), prepare=self._cases.prepare)

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
        choice = model_of_task(task, self._setup, self._models)
        if isinstance(choice, TaskOutcome):
            return choice
        model = self._models.facts(choice, choice.settings)
        folder = folder_of_result(task, self._setup, choice, model)
        if is_answered(task, folder):
            return answered(task, folder, model, started)
        works = works_of_task(task, link_files(task), self._setup, choice, self._models, folder)
        if isinstance(works, TaskOutcome):
            return works
        volumes = _Volumes(len(works))
        for place, work in enumerate(works):
            done = partial(self._done, task, folder, model, started, volumes, place)
            self._works[id(work.case.candidate)] = work
            self._cases.add(work.case, place_of_cases(works, folder), done, work.settings)
        return None

    def _done(
        self, task: Task, folder: Path, model: Model, started: float, volumes: _Volumes, place: int, case: Case
    ) -> None:
        self._works.pop(id(case.candidate), None)
        cases = volumes.with_done(place, case)
        if cases is None:
            return

        def outcome() -> TaskOutcome:
            complete(cases, folder)
            return answered(task, folder, model, started)

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
