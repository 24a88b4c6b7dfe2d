"""The thread that supervises one worker: it starts the process, gives it jobs, and tells the journal."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

from ctflow.compat.python import bare_start
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import BackendUnavailable, OutputError, counted
from ctflow.core.processes import Line, words_of_exit_code
from ctflow.node.journal.records import Job, Why
from ctflow.node.work.messages import Answer, HeldModels, NotReady, Ready, Setup, Task, TaskOutcome
from ctflow.node.work.worker import run_worker

if TYPE_CHECKING:
    from ctflow.node.work.pool import WorkerPool

MOST_ATTEMPTS = 5
FIRST_WAIT_S = 10.0  # then four times as long after each attempt: 10 s, 40 s, 3 min, 11 min
MOST_CASE_S = 4 * 3600.0  # a case of 1000 slices takes minutes on two cores; a longer one hangs
_LOOK_BESIDE_S = 0.2  # for a series beside those that run
_RESTART_S = 5.0  # a worker that cannot open must not be started in a tight loop

log = logging.getLogger(__name__)


class WorkerFailed(Exception):
    """The worker's process ended, or had to be ended, before it answered."""


def _digests(jobs: Sequence[Job]) -> str:
    return ", ".join(job.digest for job in jobs)


class Supervisor(threading.Thread):
    """Supervises one worker: starts its process, gives it jobs, updates the journal, restarts it if it died."""

    def __init__(self, pool: WorkerPool, setup: Setup, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._pool = pool
        self._setup = setup
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._killed = False
        self._running: dict[str, Job] = {}
        self._most = 1  # jobs at a time
        self._heard_at = 0.0
        self.is_open = False
        self.held = HeldModels((), {})
        self.fault = ""  # the last unexpected one, until a series succeeds again

    def run(self) -> None:
        """Run until the pool ends and nothing runs."""
        try:
            while self._running or not self._pool.ending.is_set():
                job = None if self._running and not self._has_space else self._next_job()
                if job is not None:
                    self._lead([job], partial(self._give, job))
                elif self._running:
                    self._lead([*self._running.values()], self._hear)
        finally:
            self._end_process()

    @property
    def _has_space(self) -> bool:
        """Whether the worker takes one more: a series that is tried again has a worker of its own."""
        first = all(job.attempts == 1 for job in self._running.values())
        return self.is_ready and first and len(self._running) < self._most

    def _next_job(self) -> Job | None:
        """The next job; None if there is none beside those that run, at the end, or after a wait for a fault."""
        is_ready = True
        try:
            if self._running:
                return self._pool.job_beside(tuple(self._running), self.held.models)
            is_ready = self.is_ready or self._start_process()
            if is_ready:
                return self._pool.next_job(lambda: self.is_ready, lambda: self.held.models)
        except OutputError as error:  # the disk is full: work can wait
            log.error("%s", error)  # noqa: TRY400  # named: no traceback needed
            is_ready = False
        except (OSError, sqlite3.Error):  # no memory for a process, no descriptors: both may become free
            log.exception("%s cannot continue now", self.name)
            is_ready = False
        except Exception as error:  # noqa: BLE001  # without its thread the device would stay unused
            self._met(error, self.name)
            self.is_open = is_ready = False
        if not is_ready:
            self._pool.ending.wait(_RESTART_S)
        return None

    def _met(self, error: Exception, what: str) -> str:
        """Log an unexpected fault and show it in `/readyz`; return the sentence that names it."""
        self.fault = str(unexpected(error, what))
        log.error("%s", self.fault)  # `unexpected` logs the traceback
        return self.fault

    def kill(self) -> None:
        """End the worker at once."""
        self._killed = True
        process = self._process
        if process is not None and process.is_alive():
            process.kill()

    # -- the process --------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether the worker's process lives and has opened its engine."""
        process = self._process
        return self.is_open and process is not None and process.is_alive()

    def _start_process(self) -> bool:
        """Start a worker and receive its first message; return whether it is open."""
        self._end_process()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_worker, args=(theirs, self._setup), name=self.name)
        try:
            with bare_start():
                self._process.start()
        except OSError as error:
            self._process = None
            what = f"its process cannot be started ({error.strerror})"
            self._pool.told(NotReady(BackendUnavailable(what, reason="worker-not-started")))
            raise
        finally:
            theirs.close()
        try:
            word = self._receive(None)
        except WorkerFailed as error:
            word = NotReady(BackendUnavailable(str(error), reason="worker-ended"))
        if not isinstance(word, (Ready, NotReady)):
            raise TypeError(f"a worker's first message is not {type(word).__name__}")
        if isinstance(word, NotReady) and not self._killed:
            log.error("%s: %s", self.name, word.error.described)
        self.is_open = isinstance(word, Ready)
        self._most = word.tasks if isinstance(word, Ready) else 1
        self.held = HeldModels(word.models, word.failed) if isinstance(word, Ready) else HeldModels((), {})
        self._pool.told(word)
        return self.is_open

    def _end_process(self) -> None:
        self.is_open = False
        if self._connection is not None:
            self._connection.close()  # a waiting worker sees the end and exits
            self._connection = None
        if self._process is not None:
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None

    def _receive(self, limit_s: float | None, look_s: float | None = None) -> object:
        """The worker's next message, None if there is none for `look_s`; lines of its log go to the node's.

        Raises:
            WorkerFailed: It ended, or was silent for too long and was ended.
        """
        connection, process = self._connection, self._process
        if connection is None or process is None:
            raise ValueError("start the process first")
        while True:
            left_s = None if limit_s is None else max(self._heard_at + limit_s - time.monotonic(), 0.0)
            waits = [each for each in (left_s, look_s) if each is not None]
            if not wait([connection, process.sentinel], min(waits, default=None)):
                if left_s is None or (look_s is not None and look_s < left_s):
                    return None
                process.kill()
                process.join()
                raise WorkerFailed(f"the worker did not answer for {limit_s or 0:g} s")
            self._heard_at = time.monotonic()
            try:
                if connection.poll():
                    word = connection.recv()
                    if not isinstance(word, Line):
                        return word
                    word.log()
                    continue
            except (EOFError, ConnectionResetError):
                pass
            process.join()
            raise WorkerFailed(f"the worker ended {words_of_exit_code(process.exitcode)}")

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _lead(self, jobs: Sequence[Job], act: Callable[[], None]) -> None:
        """Do something for jobs; no error ends this thread, though they may then wait for the node's next start."""
        try:
            self._act_or_put_back(jobs, act)
        except Exception as error:  # noqa: BLE001  # even the journal could not record the failure
            self._drop(jobs, error)

    def _act_or_put_back(self, jobs: Sequence[Job], act: Callable[[], None]) -> None:
        """Run jobs again after a failure in the node itself (no descriptors, SQLite)."""
        try:
            act()
        except (OSError, sqlite3.Error) as error:  # earlier commits stay
            log.exception("series %s: %s cannot continue now", _digests(jobs), self.name)
            why = Why("node-failed", f"the node could not run it ({type(error).__name__}: the log says more)")
            self._put_back(jobs, why)
        except Exception as error:  # noqa: BLE001  # else they would run until the node's next start
            fault = self._drop(jobs, error)
            self._put_back(jobs, Why("unexpected", fault))

    def _drop(self, jobs: Sequence[Job], error: Exception) -> str:
        fault = self._met(error, f"series {_digests(jobs)}")
        self.is_open = False  # a late answer would be mistaken for the next series'
        for job in jobs:
            self._running.pop(job.key, None)
        return fault

    def _put_back(self, jobs: Sequence[Job], why: Why) -> None:
        for job in jobs:
            self._running.pop(job.key, None)
            self._tell(partial(self._settle, job, TaskOutcome("again", why)))
        self._pool.ending.wait(_RESTART_S)

    def _give(self, job: Job) -> None:
        """Give a job to the worker."""
        pool, places = self._pool, self._pool.places
        series = pool.journal.find(job.key)
        task = Task(
            job,
            places.inbox,
            places.results,
            places.scratch / f"{job.key}-{job.run}",  # another worker may have another model's run of the same series
            series.calling_ae if series else "unknown",
        )
        if not self._running:
            self._heard_at = time.monotonic()
        self._running[job.key] = job
        if self._connection is None:
            self._died("the worker is not open")
            return
        try:
            self._connection.send(task)
        except ConnectionError as error:
            self._died(str(error))

    def _hear(self) -> None:
        """Handle the worker's next answer, if one comes before there may be a job beside those that run."""
        try:
            word = self._receive(MOST_CASE_S, _LOOK_BESIDE_S if self._has_space else None)
        except (WorkerFailed, ConnectionError) as error:
            self._died(str(error))
            return
        except OSError:
            self.is_open = False  # its late answers would be mistaken for the next series'
            raise
        if word is None:
            return
        if isinstance(word, HeldModels):
            self.held = word
            return
        if not isinstance(word, Answer) or word.key not in self._running:
            raise TypeError(f"a worker's answer is not {type(word).__name__}")
        job = self._running.pop(word.key)
        self.is_open = self.is_open and word.outcome.is_sound
        self._lead([job], lambda: self._settle_or_give_up(job, word.outcome))

    def _died(self, how: str) -> None:
        """Tell the journal of the jobs of a worker that has ended."""
        self.is_open = False
        jobs = [*self._running.values()]
        self._running.clear()
        for job in jobs:
            if not self._killed:  # else the node ends, and the next start finds it running
                reason = how or "the worker ended"
                log.error("series %s: %s", job.digest, reason)
                self._tell(partial(self._pool.journal.worker_died, job, reason))

    def _settle_or_give_up(self, job: Job, outcome: TaskOutcome) -> None:
        try:
            self._tell(lambda: self._settle(job, outcome))
            self.fault = ""
        except (OSError, sqlite3.Error):
            raise
        except Exception as error:  # noqa: BLE001  # else every start of the node would hit the same fault again
            fault = self._met(error, f"series {job.digest}")
            self._tell(lambda: self._pool.journal.give_up(job, Why("unexpected", fault)))

    def _tell(self, tell: Callable[[], object]) -> None:
        """Update the journal, with retries while the disk is full: the work is done and must not be lost."""
        while True:
            try:
                tell()
            except OutputError as error:
                log.error("%s", error.described)  # noqa: TRY400  # named: no traceback needed
                if self._pool.ending.wait(_RESTART_S):
                    return
            else:
                return

    def _settle(self, job: Job, outcome: TaskOutcome) -> None:
        journal = self._pool.journal
        if outcome.result is not None:
            if journal.commit(job, outcome.result, self._pool.deliveries(outcome.result)):
                self._measure(job, outcome)
            elif not journal.needs_result(job, outcome.result.folder):
                shutil.rmtree(self._pool.places.results / outcome.result.folder, ignore_errors=True)
        elif outcome.kind == "decided":
            journal.decide(job, outcome.decided)
        elif outcome.kind == "aside":
            journal.put_aside(job, outcome.why)
        elif job.attempts >= MOST_ATTEMPTS:
            journal.give_up(job, Why(outcome.why.reason, f"{outcome.why.message} ({counted(job.attempts, 'attempt')})"))
        else:
            journal.try_again(job, outcome.why, FIRST_WAIT_S * 4 ** (job.attempts - 1))

    def _measure(self, job: Job, outcome: TaskOutcome) -> None:
        metrics, series = self._pool.metrics, self._pool.journal.find(job.key)
        if series is None or outcome.result is None:
            return
        for stage, seconds in outcome.stage_seconds.items():
            metrics.stage(stage, seconds, job.model)
        turnaround_s = max(time.time() - series.last_at, 0.0)
        metrics.stage("turnaround", turnaround_s, job.model)
        metrics.stage("queue", max(turnaround_s - outcome.result.elapsed_s, 0.0), job.model)
