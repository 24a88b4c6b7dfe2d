"""The durable queue's workers: one process per GPU (or one for the CPU), each with a supervisor thread in the node."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ctflow.compat.python import bare_start
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import BackendUnavailable, OutputError
from ctflow.core.processes import Line, words_of_exit_code
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Job, Why, WorkerResult
from ctflow.node.metrics import Metrics
from ctflow.node.work.worker import NotReady, Ready, Setup, Task, TaskOutcome, run_worker

MOST_ATTEMPTS = 5
FIRST_WAIT_S = 10.0  # then four times as long after each attempt: 10 s, 40 s, 3 min, 11 min
MOST_CASE_S = 4 * 3600.0  # a case of 1000 slices takes minutes on two cores; a longer one hangs
_LOOK_AGAIN_S = 30.0  # for changes without an event: a clock that was set
_RESTART_S = 5.0  # a worker that cannot open must not be started in a tight loop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Folders of the node: `inbox` has the instances, `results` gets results, `scratch` is for running jobs."""

    inbox: Path
    results: Path
    scratch: Path

    @classmethod
    def below(cls, data: Path) -> Places:
        """The folders of a data folder."""
        return cls(data / "inbox", data / "results", data / "running")


class WorkerFailed(Exception):
    """The worker's process ended, or had to be ended, before it answered."""


class WorkerPool:
    """All workers.

    Args:
        journal: Gives jobs and records their outcomes.
        places: Where files are.
        setup: Setup of each worker; its device is replaced.
        devices: One worker on each; empty means every GPU, or the CPU where there is none.
        deliveries: Maps an answer to files and their destinations.
        metrics: Records the duration of stages.
    """

    def __init__(
        self,
        journal: Journal,
        places: Places,
        setup: Setup,
        devices: Sequence[str],
        deliveries: Callable[[WorkerResult], Sequence[tuple[str, str]]],
        metrics: Metrics,
    ) -> None:
        self.journal, self.places, self.metrics = journal, places, metrics
        self.deliveries = deliveries
        self._setup = setup
        self._devices = tuple(devices)
        self._changed = threading.Condition()
        self._wakes = 0
        self.ending = threading.Event()
        self._supervisors: list[Supervisor] = []
        self.first_word: Ready | NotReady | None = None
        self.opened = threading.Event()
        journal.on_change(self._wake)

    def start(self) -> None:
        """Start the workers, each in a thread and a process; they open their engines meanwhile."""
        shutil.rmtree(self.places.scratch, ignore_errors=True)
        self._add(self._devices or (None,))

    def _add(self, devices: Sequence[str | None]) -> None:
        for device in devices:
            setup = replace(self._setup, settings=replace(self._setup.settings, device=device))
            supervisor = Supervisor(self, setup, f"worker {len(self._supervisors)}")
            self._supervisors.append(supervisor)
            supervisor.start()

    def told(self, word: Ready | NotReady) -> None:
        """Handle a worker's first message; the very first one says how many GPUs there are."""
        if self.first_word is None and isinstance(word, Ready) and not self._devices and word.gpus > 1:
            self._add([f"cuda:{number}" for number in range(1, word.gpus)])
        if self.first_word is None or isinstance(word, Ready):
            self.first_word = word
        self.opened.set()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads that must live while jobs run."""
        return tuple(self._supervisors)

    def problems(self) -> list[str]:
        """Why nothing can run now; empty while one worker is open."""
        if any(supervisor.is_ready for supervisor in self._supervisors):
            return []
        if isinstance(self.first_word, NotReady):
            return [f"no worker is open: {self.first_word.error}"]
        return ["no worker is open yet" if self.first_word is None else "no worker is open: the log says why"]

    def remarks(self) -> list[str]:
        """Workers that are not open while others are, and unexpected faults."""
        closed = [supervisor.name for supervisor in self._supervisors if not supervisor.is_ready]
        faults = [supervisor.fault for supervisor in self._supervisors if supervisor.fault]
        return faults + ([f"{name} is not open" for name in closed] if len(closed) < len(self._supervisors) else [])

    def _wake(self) -> None:
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def next_job(self, is_ready: Callable[[], bool]) -> Job | None:
        """Wait for a job; None at the end, or if the caller is no longer ready."""
        while not self.ending.is_set() and is_ready():
            with self._changed:
                seen = self._wakes
            due = self.journal.next_run_at()
            if due is not None and due <= time.time():
                job = self.journal.claim()
                if job is not None:
                    return job
            left_s = _LOOK_AGAIN_S if due is None else min(max(due - time.time(), 0.01), _LOOK_AGAIN_S)
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._wakes != seen or self.ending.is_set(), left_s)  # type: ignore[misc]
        return None

    def stop(self, grace_s: float) -> None:
        """Take no more jobs; running ones may finish for a while, then wait in the journal for the next start."""
        self.ending.set()
        self._wake()
        deadline = time.monotonic() + grace_s
        for supervisor in self._supervisors:
            supervisor.join(max(deadline - time.monotonic(), 0))
        for supervisor in self._supervisors:
            supervisor.kill()
            supervisor.join()


class Supervisor(threading.Thread):
    """Supervises one worker: starts its process, gives it jobs, updates the journal, restarts it if it died."""

    def __init__(self, pool: WorkerPool, setup: Setup, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._pool = pool
        self._setup = setup
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._killed = False
        self.is_open = False
        self.fault = ""  # the last unexpected one, until a series succeeds again

    def run(self) -> None:
        """Run until the pool ends."""
        try:
            while not self._pool.ending.is_set():
                try:
                    is_ready = self.is_ready or self._start_process()
                    job = self._pool.next_job(lambda: self.is_ready) if is_ready else None
                except OutputError as error:  # the disk is full: work can wait
                    log.error("%s", error)  # noqa: TRY400  # named: no traceback needed
                    is_ready, job = False, None
                except (OSError, sqlite3.Error):  # no memory for a process, no descriptors: both may become free
                    log.exception("%s cannot continue now", self.name)
                    is_ready, job = False, None
                except Exception as error:  # noqa: BLE001  # without its thread the device would stay unused
                    self._met(error, self.name)
                    self.is_open = is_ready = False
                    job = None
                if job is not None:
                    self._lead(job)
                elif not is_ready:
                    self._pool.ending.wait(_RESTART_S)
        finally:
            self._end_process()

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

    def _receive(self, limit_s: float | None) -> object:
        """The worker's next message; lines of its log go to the node's.

        Raises:
            WorkerFailed: It ended, or was silent for too long and was ended.
        """
        connection, process = self._connection, self._process
        if connection is None or process is None:
            raise ValueError("start the process first")
        while True:
            if not wait([connection, process.sentinel], limit_s):
                process.kill()
                process.join()
                raise WorkerFailed(f"the worker did not answer for {limit_s or 0:g} s")
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

    def _ask(self, task: Task) -> object:
        if self._connection is None:
            raise WorkerFailed("the worker is not open")
        self._connection.send(task)
        return self._receive(MOST_CASE_S)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _lead(self, job: Job) -> None:
        """Run one series; no error ends this thread, though the series may then wait for the node's next start."""
        try:
            self._run_or_put_back(job)
        except Exception as error:  # noqa: BLE001  # even the journal could not record the failure
            self._met(error, f"series {job.digest}")
            self.is_open = False  # a late answer would be mistaken for the next series'
            self._pool.ending.wait(_RESTART_S)

    def _run_or_put_back(self, job: Job) -> None:
        """Run a series again after a failure in the node itself (no descriptors, SQLite)."""
        try:
            self._run_job(job)
        except (OSError, sqlite3.Error) as error:  # earlier commits stay
            log.exception("series %s: %s cannot continue now", job.digest, self.name)
            why = Why("node-failed", f"the node could not run it ({type(error).__name__}: the log says more)")
            self._tell(lambda: self._settle(job, TaskOutcome("again", why)))
            self._pool.ending.wait(_RESTART_S)
        except Exception as error:  # noqa: BLE001  # else the series would run until the node's next start
            fault = self._met(error, f"series {job.digest}")
            self.is_open = False  # a late answer would be mistaken for the next series'
            self._tell(lambda: self._settle(job, TaskOutcome("again", Why("unexpected", fault))))
            self._pool.ending.wait(_RESTART_S)

    def _run_job(self, job: Job) -> None:
        pool = self._pool
        series = pool.journal.find(job.key)
        places = pool.places
        task = Task(
            job, places.inbox, places.results, places.scratch / job.key, series.calling_ae if series else "unknown"
        )
        try:
            outcome = self._ask(task)
        except (WorkerFailed, ConnectionError) as error:
            self.is_open = False
            if not self._killed:  # else the node ends, and the next start finds it running
                reason = str(error) or "the worker ended"
                log.error("series %s: %s", job.digest, reason)  # noqa: TRY400  # named: no traceback needed
                self._tell(lambda: pool.journal.worker_died(job, reason))
            return
        except OSError:
            self.is_open = False  # its late answer would be mistaken for the next series'
            raise
        if not isinstance(outcome, TaskOutcome):
            raise TypeError(f"a worker's answer is not {type(outcome).__name__}")
        self.is_open = self.is_open and outcome.is_sound
        try:
            self._tell(lambda: self._settle(job, outcome))
            self.fault = ""
        except (OSError, sqlite3.Error):
            raise
        except Exception as error:  # noqa: BLE001  # else every start of the node would hit the same fault again
            fault = self._met(error, f"series {job.digest}")
            self._tell(lambda: pool.journal.give_up(job, Why("unexpected", fault)))

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
            else:
                shutil.rmtree(self._pool.places.results / outcome.result.folder, ignore_errors=True)
        elif outcome.kind == "aside":
            journal.set_aside(job.key, outcome.why, set_digest=job.set_digest)
        elif job.attempts >= MOST_ATTEMPTS:
            journal.give_up(job, Why(outcome.why.reason, f"{outcome.why.message} ({job.attempts} attempts)"))
        else:
            journal.try_again(job, outcome.why, FIRST_WAIT_S * 4 ** (job.attempts - 1))

    def _measure(self, job: Job, outcome: TaskOutcome) -> None:
        metrics, series = self._pool.metrics, self._pool.journal.find(job.key)
        if series is None or outcome.result is None:
            return
        for stage, seconds in outcome.stage_seconds.items():
            metrics.stage(stage, seconds)
        turnaround_s = max(time.time() - series.last_at, 0.0)
        metrics.stage("turnaround", turnaround_s)
        metrics.stage("queue", max(turnaround_s - outcome.result.elapsed_s, 0.0))
