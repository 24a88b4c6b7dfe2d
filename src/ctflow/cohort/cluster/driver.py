"""A cohort's rows given to the workers of a cluster, until each is committed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ctflow.bundle import read_bundle
from ctflow.cohort.cluster.accounts import RowAccounts
from ctflow.cohort.cluster.connection import connected
from ctflow.cohort.cluster.pool import ClusterPool, Event, WorkerEnded
from ctflow.cohort.cluster.tasks import RowCommitted, RowFailed, RowTask, WorkerPlan
from ctflow.cohort.destinations.from_text import destination_from_text
from ctflow.cohort.marker import outcome_from_bytes
from ctflow.cohort.outcome import MarkName, RowOutcome, RowStatus
from ctflow.cohort.shares.share import RowsToDo
from ctflow.cohort.watch import NodeState
from ctflow.core.errors import BackendUnavailable, CtflowError, OutputError, SettingsInvalid, StoreFailed
from ctflow.core.model import Model
from ctflow.settings.run import Settings

_WAIT_S = 0.5  # between looks at machines that come and go
_SAY_S = 60.0  # between lines that say that there is no worker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedBundle:
    """Makes a model and its segmenter on the machine of a worker.

    Attributes:
        folder: Of the bundle: the same path on every machine.
    """

    folder: Path

    def __call__(self, settings: Settings) -> tuple[Model, Any]:
        """Read the model; its engine is not open yet."""
        from ctflow.pipeline.segmenter import Segmenter  # noqa: PLC0415  # torch takes seconds

        model = read_bundle(self.folder, settings.config, allow_code=settings.allow_code)
        return model, Segmenter(model, settings)


@dataclass(frozen=True)
class Cluster:
    """Where a cohort is computed; its value computes what is left of one (`run_cohort`).

    Attributes:
        destination: As a worker gets it: a folder's path is absolute.
        opened: Makes the model and its segmenter on the machine of a worker.
        address: Of a Ray cluster; None starts a Ray on this machine.
        gpus: Most GPUs to use; 0 for one worker a machine, on its CPUs; None for all, or for CPUs if there is none.
    """

    destination: str
    opened: Callable[[Settings], tuple[Model, Any]]
    address: str | None = None
    gpus: int | None = None

    def __call__(self, todo: RowsToDo) -> Sequence[MarkName]:
        """Commit all rows; return the markers' names.

        Raises:
            BackendUnavailable: No cluster is there, it has too few GPUs, or every machine of it has failed.
            SettingsInvalid: A device is chosen, which Ray does.
            OutputError: The destination cannot be written; rows that are not committed stay open.
        """
        settings = todo.setup.settings
        if settings.device not in {None, "cpu", "cuda"}:
            what = "each worker has the GPU that Ray gives it: leave it out, or give cpu"
            raise SettingsInvalid(f"--device: with --address or --gpus {what}", reason="conflict")
        with connected(self.address, self.gpus) as ray:
            gpus = self._gpus_of(ray, settings)
            settings = replace(settings, device="cpu" if gpus == 0 else settings.device)
            plan = WorkerPlan(
                self.destination,
                todo.setup.base.absolute(),
                settings,
                todo.setup.stamp,
                todo.model.weights_digest,
                self.opened,
            )
            with ClusterPool(ray, plan, gpus) as pool:
                committed = _Driver(pool, todo, is_work_local=_is_work_local(self.destination)).run()
        with destination_from_text(self.destination, "end"):  # its beginning removes what killed workers have left
            return committed

    def _gpus_of(self, ray: Any, settings: Settings) -> int | None:
        """How many GPUs to use: 0 if this is to be done on CPUs."""
        there = int(ray.cluster_resources().get("GPU", 0))
        if self.gpus == 0 or settings.device == "cpu":
            return 0
        if self.gpus is None:
            if not there:
                log.warning("the cluster has no GPU: one worker a machine computes on CPUs")
            return None if there else 0
        if there < self.gpus and self.address is None:
            raise BackendUnavailable(f"--gpus {self.gpus}: this machine has {there}", reason="no-such-device")
        if there < self.gpus:
            from ray.autoscaler.sdk import request_resources  # noqa: PLC0415  # an optional package

            log.warning("%d GPUs are asked for and %d are there: others are used as they come", self.gpus, there)
            request_resources(bundles=[{"GPU": 1}] * self.gpus)
        return self.gpus


def _is_work_local(destination: str) -> bool:
    """Whether each machine builds results on a disk of its own: where they, or the journal, go to an object store."""
    return "s3://" in destination or "gs://" in destination


class _Driver:
    """Gives rows to workers as they have place, and takes their answers."""

    def __init__(self, pool: ClusterPool, todo: RowsToDo, *, is_work_local: bool) -> None:
        self._pool, self._todo, self._is_work_local = pool, todo, is_work_local
        self._accounts = RowAccounts(RowTask.from_attempt(attempt) for attempt in todo.attempts)
        self._said_s = time.monotonic()
        self._states: dict[str, NodeState] = {}  # the last of each worker

    def run(self) -> Sequence[MarkName]:
        """Until every row is committed."""
        accounts, todo = self._accounts, self._todo
        todo.progress("rows", 0, todo.count)
        while not accounts.is_over:
            self._pool.keep_up()
            self._give()
            event = self._pool.wait(_WAIT_S)
            if event is not None:
                self._take(event)
            todo.progress("rows", len(accounts.committed), todo.count)
        todo.progress("rows", todo.count, todo.count)
        return accounts.committed

    def _give(self) -> None:
        """Fill the workers evenly: at the end each has as much left as the others."""
        workers = self._pool.ready
        if not workers and time.monotonic() - self._said_s > _SAY_S:
            self._said_s = time.monotonic()
            log.warning("no worker is ready: %d rows are committed, %d wait", len(self._accounts.committed), self._left)
        is_given = True
        while is_given:
            is_given = False
            for worker in workers:
                task = self._accounts.next(is_idle=not worker.tasks) if worker.has_place else None
                if task is not None:
                    self._pool.give(worker, task)
                    is_given = True

    @property
    def _left(self) -> int:
        return self._todo.count - len(self._accounts.committed)

    def _take(self, event: Event) -> None:
        if isinstance(event, WorkerEnded):
            self._ended(event)
            return
        watcher, task = self._todo.setup.watcher, event.task
        if isinstance(event.answer, RowCommitted):
            self._accounts.commit(task, event.answer.outcome)
            self._pool.note_success(event.worker)
            watcher.committed(event.answer.outcome)
        elif isinstance(event.answer, RowFailed):
            log.warning("row %s: attempt %d failed (%s)", task.row.id, task.number, event.answer.reason)
            self._accounts.fail(task)
            watcher.retried(task.row.id, event.answer.reason, task.number)
        if isinstance(event.answer, RowCommitted | RowFailed):
            self._states[event.worker.name] = event.answer.state
            watcher.node(event.answer.state)

    def _ended(self, event: WorkerEnded) -> None:
        state = self._states.pop(event.worker.name, None)
        if state is not None:
            self._todo.setup.watcher.node(replace(state, under_way=0, is_gone=True))
        how = "its machine was lost" if event.is_lost else event.error.described if event.error else "it was killed"
        log.warning("%s on %s ended with %d rows: %s", event.worker.name, event.worker.host, len(event.tasks), how)
        if event.error is not None and self._is_of_destination(event.error):
            raise event.error
        for task in event.tasks:
            outcome = self._committed_unheard(task)
            if outcome is not None:
                self._accounts.commit(task, outcome)
                self._todo.setup.watcher.committed(outcome)
                continue
            self._todo.setup.watcher.retried(task.row.id, "worker-ended", task.number)
            if event.is_lost or event.error is not None:
                self._accounts.lose(task)
                with suppress(OutputError):  # no note against the row
                    self._todo.destination.end(task.name)
            else:
                self._accounts.die(task)

    def _is_of_destination(self, error: CtflowError) -> bool:
        """Whether all machines would fail in the same way: not if the disk is one machine's own."""
        return isinstance(error, StoreFailed) or (isinstance(error, OutputError) and not self._is_work_local)

    def _committed_unheard(self, task: RowTask) -> RowOutcome | None:
        """What a worker committed just before it ended."""
        for status in get_args(RowStatus):
            name = MarkName(*task.name, status)
            content = None if name in task.earlier else self._todo.destination.read(f"rows/{name}")
            if content is not None:
                return outcome_from_bytes(content, name)
        return None
