"""The workers of a run: where they are started, which rows they have, and how they end."""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ctflow import __version__
from ctflow.cohort.cluster.tasks import RowTask, WorkerAnswer, WorkerFault, WorkerPlan, WorkerReady
from ctflow.cohort.cluster.worker import CALLS, CohortWorker
from ctflow.core.errors import BackendUnavailable, CtflowError, SettingsInvalid

_LOOK_S = 2.0  # between looks at which machines there are
_LOSS_S = 30.0  # by then Ray has noticed that a machine is lost; calls of its workers fail seconds before
_DECIDE_S = 0.5  # between looks at whether it has
_MOST_FAULTS = 3  # of a machine, without a row committed there between them
_END_S = 15.0

log = logging.getLogger(__name__)


@dataclass(eq=False)
class StartedWorker:
    """A worker, as the driver sees it.

    Attributes:
        name: No other worker of the run has it.
        node: Its machine's id in Ray.
        host: Its machine's name.
        actor: Ray's handle.
        limit: How many rows it takes; 0 until it is ready.
        tasks: That it has.
        began_s: When it was started.
    """

    name: str
    node: str
    host: str
    actor: Any
    limit: int = 0
    tasks: set[RowTask] = field(default_factory=set)
    began_s: float = field(default_factory=time.monotonic)

    @property
    def has_place(self) -> bool:
        """Whether it may get a row beside those that it has."""
        return len(self.tasks) < self.limit and not any(task.is_alone for task in self.tasks)


@dataclass(frozen=True)
class RowAnswered:
    """A worker has answered for a row."""

    worker: StartedWorker
    task: RowTask
    answer: WorkerAnswer


@dataclass(frozen=True)
class WorkerEnded:
    """A worker is no more: it was killed, its machine was lost, or something there failed.

    Attributes:
        worker: The worker.
        tasks: That it had.
        is_lost: Whether its machine is, and none of the rows can be why.
        error: What failed; None if it was killed.
    """

    worker: StartedWorker
    tasks: frozenset[RowTask]
    is_lost: bool
    error: CtflowError | None


Event = RowAnswered | WorkerEnded


@dataclass(frozen=True, eq=False)
class _HeldWorker:
    """One that ended without a word: it was killed, or its machine was lost and Ray does not know yet."""

    worker: StartedWorker
    tasks: frozenset[RowTask]
    error: CtflowError | None
    since_s: float


class ClusterPool:
    """One worker a GPU, or one a machine if there is no GPU; a context manager whose end ends them.

    Args:
        ray: The package, connected.
        plan: The run's.
        gpus: Most GPUs to use; 0 for one worker a machine, on its CPUs; None for all GPUs, whatever machines come.
    """

    def __init__(self, ray: Any, plan: WorkerPlan, gpus: int | None) -> None:
        self._ray, self._plan, self._gpus = ray, plan, gpus
        self._class = ray.remote(CohortWorker)
        self._workers: dict[str, StartedWorker] = {}
        self._events: queue.Queue[Callable[[], Event | None]] = queue.Queue()
        self._held: list[_HeldWorker] = []
        self._number, self._decided_s = 0, 0.0
        self._looked_s = -_LOOK_S
        self._faults: Counter[str] = Counter()
        self._last_fault: CtflowError | None = None

    def __enter__(self) -> ClusterPool:
        return self

    def __exit__(self, *_: object) -> None:
        stopping = [each.actor.stop.remote() for each in self._workers.values()]
        if stopping:
            self._ray.wait(stopping, num_returns=len(stopping), timeout=_END_S)
        for each in self._workers.values():
            self._ray.kill(each.actor)

    @property
    def ready(self) -> tuple[StartedWorker, ...]:
        """The workers that take rows, those with the fewest first."""
        return tuple(sorted((each for each in self._workers.values() if each.limit), key=lambda each: len(each.tasks)))

    def give(self, worker: StartedWorker, task: RowTask) -> None:
        """Give a worker a row."""
        worker.tasks.add(task)
        reference = worker.actor.row.remote(task)
        reference.future().add_done_callback(
            lambda future: self._events.put(lambda: self._answered(worker, task, future))
        )

    def wait(self, timeout_s: float) -> Event | None:
        """The next event; None if there is none in that time, or only one that concerns the pool."""
        decided = self._decided()
        if decided is not None:
            return decided
        try:
            return self._events.get(timeout=timeout_s)()
        except queue.Empty:
            return None

    def keep_up(self) -> None:
        """Start the workers that are missing, from time to time.

        Raises:
            CtflowError: Every machine has failed: the last one's error.
        """
        if time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        wanted = self._wanted()
        usable = {node: count for node, count in wanted.items() if self._faults[node] < _MOST_FAULTS}
        if wanted and not usable and not self._workers and not self._held and self._last_fault is not None:
            raise self._last_fault
        have = Counter(each.node for each in self._workers.values())
        have.update(held.worker.node for held in self._held if held.error)  # it did not start: nor would the next one
        for node, count in usable.items():
            for _ in range(count - have[node]):
                self._start(node, count)

    def is_alive(self, node: str) -> bool:
        """Whether Ray still has a machine."""
        return any(each["NodeID"] == node and each["Alive"] for each in self._ray.nodes())

    def note_success(self, worker: StartedWorker) -> None:
        """A row was committed there."""
        self._faults.pop(worker.node, None)

    # ------------------------------------------------------------------------------------------------------- workers

    def _wanted(self) -> dict[str, int]:
        """How many workers each machine should have."""
        nodes = {each["NodeID"]: each["Resources"] for each in self._ray.nodes() if each["Alive"]}
        gpus = {node: int(resources.get("GPU", 0)) for node, resources in nodes.items()}
        if self._gpus == 0:
            return {node: 1 for node, resources in nodes.items() if resources.get("CPU", 0) >= 1}
        left, found = self._gpus if self._gpus is not None else sum(gpus.values()), dict[str, int]()
        for node, count in sorted(gpus.items(), key=lambda each: -each[1]):
            found[node] = min(count, left)
            left -= found[node]
        return {node: count for node, count in found.items() if count}

    def _start(self, node: str, beside: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        self._number += 1
        there: dict[str, Any] = next((each for each in self._ray.nodes() if each["NodeID"] == node), {})
        host, cpus = there.get("NodeManagerHostname", ""), there.get("Resources", {}).get("CPU", 1)
        name = f"worker-{self._number}"
        # Never restarted by Ray: then nobody would count which rows it had, and one that never starts would stay.
        actor = self._class.options(
            num_gpus=0 if self._gpus == 0 else 1,
            num_cpus=cpus if self._gpus == 0 else 0,  # as many threads as Ray lets PyTorch have
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(self._plan, name, beside)
        worker = self._workers[name] = StartedWorker(name, node, host, actor)
        actor.ready.remote().future().add_done_callback(
            lambda future: self._events.put(lambda: self._started(worker, future))
        )
        log.info("%s: starts on %s", name, host)

    # -------------------------------------------------------------------------------------------------------- events

    def _started(self, worker: StartedWorker, future: Any) -> Event | None:
        if worker.name not in self._workers:
            return None
        error = future.exception()
        found = None if error else future.result()
        if isinstance(found, WorkerReady) and found.version != __version__:
            what = f"{worker.host} has ctflow {found.version}, and this machine {__version__}: install the same"
            found = WorkerFault(SettingsInvalid(f"--address: {what}", reason="conflict"))
        if isinstance(found, WorkerReady):
            worker.limit = found.limit
            return None
        if isinstance(found, WorkerFault):
            return self._ended(worker, found.error)
        what = f"{worker.name} on {worker.host} did not start ({type(error).__name__}): Ray's log of it says why"
        self._hold(worker, BackendUnavailable(what, reason="worker-not-started"))
        return None

    def _answered(self, worker: StartedWorker, task: RowTask, future: Any) -> Event | None:
        if task not in worker.tasks:
            return None  # its worker has ended
        if future.exception() is not None:
            self._hold(worker, None)
            return None
        answer = future.result()
        if isinstance(answer, WorkerFault):
            return self._ended(worker, answer.error)
        worker.tasks.discard(task)
        return RowAnswered(worker, task, answer)

    def _hold(self, worker: StartedWorker, error: CtflowError | None) -> None:
        self._held.append(_HeldWorker(worker, self._forget(worker), error, time.monotonic()))

    def _decided(self) -> WorkerEnded | None:
        """A worker that ended without a word, once it is known whether its machine was lost."""
        now = time.monotonic()
        if not self._held or now - self._decided_s < _DECIDE_S:
            return None
        for held in self._held:
            is_lost = not self.is_alive(held.worker.node)
            if is_lost or self._has_successor(held) or now - held.since_s >= _LOSS_S:
                self._held.remove(held)
                return self._judged(held.worker, held.tasks, held.error, is_lost=is_lost)
        self._decided_s = now
        return None

    def _has_successor(self, held: _HeldWorker) -> bool:
        """Whether its machine is there: a worker that was started later is ready."""
        return any(
            each.limit and each.node == held.worker.node and each.began_s > held.since_s
            for each in self._workers.values()
        )

    def _ended(self, worker: StartedWorker, error: CtflowError) -> WorkerEnded:
        tasks = self._forget(worker)
        return self._judged(worker, tasks, error, is_lost=not self.is_alive(worker.node))

    def _forget(self, worker: StartedWorker) -> frozenset[RowTask]:
        """Take a worker out of the pool; returns the rows that it had."""
        del self._workers[worker.name]
        self._ray.kill(worker.actor)  # if it is only out of reach, it must not go on
        self._looked_s = -_LOOK_S  # another one is started at once
        tasks, worker.tasks = frozenset(worker.tasks), set()
        return tasks

    def _judged(
        self, worker: StartedWorker, tasks: frozenset[RowTask], error: CtflowError | None, *, is_lost: bool
    ) -> WorkerEnded:
        self._looked_s = -_LOOK_S
        if error is not None and not is_lost:
            self._faults[worker.node] += 1
            self._last_fault = error
        return WorkerEnded(worker, tasks, is_lost, error)
