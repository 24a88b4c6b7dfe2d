"""The durable queue's workers: one process per GPU (or one for the CPU), each with a supervisor thread in the node."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Job, WorkerResult
from ctflow.node.journal.runs import QueueRules
from ctflow.node.metrics import Metrics
from ctflow.node.work.messages import NotReady, Ready, Setup
from ctflow.node.work.supervisor import Supervisor

_LOOK_AGAIN_S = 30.0  # for changes without an event: a clock that was set

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


class WorkerPool:
    """All workers.

    Args:
        journal: Gives jobs and records their outcomes.
        places: Where files are.
        setup: Setup of each worker; its device is replaced.
        devices: One worker on each; empty means every GPU, or the CPU where there is none.
        deliveries: Maps an answer to files and their destinations.
        metrics: Records the duration of stages.
        queue: How runs are ordered.
    """

    def __init__(
        self,
        journal: Journal,
        places: Places,
        setup: Setup,
        devices: Sequence[str],
        deliveries: Callable[[WorkerResult], Sequence[tuple[str, str]]],
        metrics: Metrics,
        queue: QueueRules = QueueRules(),  # noqa: B008  # a value
    ) -> None:
        self.journal, self.places, self.metrics = journal, places, metrics
        self.deliveries = deliveries
        self._setup = setup
        journal.order_by(replace(queue, decides=setup.decides))
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
            supervisor = Supervisor(self, self._setup.on(device), f"worker {len(self._supervisors)}")
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
        for supervisor in self._supervisors:
            faults += [f"{supervisor.name}: model {name}: {why}" for name, why in supervisor.held.failed.items()]
        return faults + ([f"{name} is not open" for name in closed] if len(closed) < len(self._supervisors) else [])

    def _wake(self) -> None:
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def next_job(self, is_ready: Callable[[], bool], held: Callable[[], Collection[str]] = tuple) -> Job | None:
        """Wait for a job; None at the end, or if the caller is no longer ready."""
        while not self.ending.is_set() and is_ready():
            with self._changed:
                seen = self._wakes
            due = self.journal.next_run_at()
            if due is not None and due <= time.time():
                job = self.journal.claim((), held())
                if job is not None:
                    return job
            left_s = _LOOK_AGAIN_S if due is None else min(max(due - time.time(), 0.01), _LOOK_AGAIN_S)
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._wakes != seen or self.ending.is_set(), left_s)  # type: ignore[misc]
        return None

    def job_beside(self, running: Collection[str], held: Collection[str] = ()) -> Job | None:
        """A job that may run beside those with these keys, if there is one now."""
        due = None if self.ending.is_set() else self.journal.next_run_at()
        return self.journal.claim(running, held) if due is not None and due <= time.time() else None

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
