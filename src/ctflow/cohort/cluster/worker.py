"""A worker: a process that Ray starts, with a model, the overlapping pipeline, and its own way to the destination."""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from ctflow import __version__
from ctflow.cohort.cluster.tasks import (
    RowCommitted,
    RowFailed,
    RowTask,
    WorkerAnswer,
    WorkerFault,
    WorkerPlan,
    WorkerReady,
)
from ctflow.cohort.destinations.from_text import destination_from_text
from ctflow.cohort.outcome import RowOutcome, RowStatus
from ctflow.cohort.shares.attempt import RowAttempt
from ctflow.cohort.shares.in_flight import AHEAD, RowsInFlight, RunSetup
from ctflow.cohort.shares.share import USUAL_VOXELS
from ctflow.cohort.watch import NodeState
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import BackendUnavailable, CtflowError, SettingsInvalid
from ctflow.core.processes import usable_cpus, use_cpus
from ctflow.engines.registry import devices_from_setting
from ctflow.engines.utilization import GpuMeter, gpu_uuids
from ctflow.pipeline.overlap.cases import most_cases
from ctflow.pipeline.overlap.processes import CasesInProcesses
from ctflow.pipeline.stages import segment_case

CALLS = 64  # at a time: a thread for each row, of which `most_cases` allows fewer, and some to spare
_END_S = 20.0

log = logging.getLogger(__name__)


class CohortWorker:
    """Segments rows that it is given one at a time, and commits their results itself.

    All work is done in threads of its own; a call waits for what it asks.

    Args:
        plan: The run's.
        name: No other worker has the same.
        beside: How many workers its machine has, this one included.
    """

    def __init__(self, plan: WorkerPlan, name: str, beside: int) -> None:
        self._plan, self._name, self._beside = plan, name, beside
        self._ready: Future[WorkerReady | WorkerFault] = Future()
        self._answers: dict[str, Future[WorkerAnswer]] = {}
        self._lock = threading.Lock()
        self._fault: WorkerFault | None = None
        self._flight: RowsInFlight | None = None
        self._is_stopped = False
        self._state = NodeState(f"{platform.node()} {name}", 0, 0)
        self._thread = threading.Thread(target=self._work, name="segments", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------ called by Ray, in any thread

    def ready(self) -> WorkerReady | WorkerFault:
        """Wait until the model is loaded and the engine open."""
        return self._ready.result()

    def row(self, task: RowTask) -> WorkerAnswer:
        """Wait until a row is committed, or its attempt has failed."""
        answer: Future[WorkerAnswer] = Future()
        with self._lock:
            if self._fault is not None or self._flight is None:
                return self._fault or WorkerFault(BackendUnavailable("the worker has ended", reason="worker-ended"))
            self._answers[task.row.id] = answer
        self._flight.add(task.attempt)
        return answer.result()

    def stop(self) -> None:
        """End; rows under way stay open, and nothing half-written stays."""
        with self._lock:
            self._is_stopped, flight = True, self._flight
        if flight is not None:
            flight.stop()
        self._thread.join(_END_S)

    # --------------------------------------------------------------------- told by the rows in flight (CohortWatcher)

    def began(self, rows: int, before: Mapping[RowStatus, int]) -> None:
        """As `CohortWatcher.began`."""

    def committed(self, outcome: RowOutcome) -> None:
        """As `CohortWatcher.committed`."""
        self._answer(outcome.id, RowCommitted(outcome, self._state))

    def retried(self, row_id: str, reason: str, attempt: int) -> None:
        """As `CohortWatcher.retried`: the driver is told once the attempt has ended (`_again`)."""

    def node(self, state: NodeState) -> None:
        """As `CohortWatcher.node`."""
        self._state = replace(state, name=f"{state.name} {self._name}")

    def _again(self, attempt: RowAttempt) -> None:
        self._answer(attempt.row.id, RowFailed(attempt.errors[0].reason, self._state))

    def _answer(self, row_id: str, answer: WorkerAnswer) -> None:
        with self._lock:
            waiting = self._answers.pop(row_id)
        waiting.set_result(answer)

    # ------------------------------------------------------------------------------------- in the thread that segments

    def _work(self) -> None:
        try:
            self._segment_all()
            fault = WorkerFault(BackendUnavailable("the worker was told to end", reason="worker-ended"))
        except CtflowError as error:
            fault = WorkerFault(error)
        except Exception as error:  # noqa: BLE001  # the driver must hear of whatever ends this worker
            fault = WorkerFault(unexpected(error, f"worker {self._name}"))
        with self._lock:
            self._fault, left = fault, list(self._answers.values())
            self._answers.clear()
        if not self._ready.done():
            self._ready.set_result(fault)
        for each in left:
            each.set_result(fault)

    def _segment_all(self) -> None:
        plan, settings = self._plan, self._plan.settings
        count = settings.cases_in_flight or most_cases(USUAL_VOXELS, self._beside)
        count = min(count, CALLS // 2)
        use_cpus(max(1, usable_cpus() // self._beside))
        model, segmenter = plan.opened(settings)
        if model.weights_digest != plan.digest:
            raise SettingsInvalid("-m: this machine's copy of the model has other weights", reason="other-model")
        stamp = replace(plan.stamp, node=platform.node())
        with (
            destination_from_text(plan.destination, self._name) as destination,
            CasesInProcesses((), settings, Path(), count=count, more=True) as cases,
            GpuMeter(gpu_uuids(devices_from_setting(settings.device))) as gpus,
            RowsInFlight(
                cases,
                destination,
                RunSetup(plan.base, model.spec, settings, stamp, self, gpus),
                count,
                on_again=self._again,
            ) as flight,
        ):
            segmenter.open()
            with segmenter:
                with self._lock:
                    self._flight = flight
                    if self._is_stopped:
                        return
                self._ready.set_result(WorkerReady(count + AHEAD, __version__))
                for case in cases.loaded():
                    cases.write(segment_case(case, segmenter, prepare=cases.prepare), model)
            flight.check()
