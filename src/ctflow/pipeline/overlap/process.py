"""A process for one case at a time: it reads the series, waits for the labels, and writes the result.

It needs no torch. The volume and the labels are in memory that it shares with the process that segments; headers, and
what is made of them, never leave it.
"""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctflow.core.entry_point import show_tracebacks
from ctflow.core.errors import CtflowError
from ctflow.core.model import Model
from ctflow.core.processes import begin_child, log_to_parent, use_cpus
from ctflow.core.shared_memory import SharedMemory
from ctflow.core.volume import Geometry
from ctflow.pipeline.case import Case, attempt, without_arrays
from ctflow.pipeline.segmentation import Segmentation
from ctflow.pipeline.stages import load_case, prepare_result, with_segmentation
from ctflow.settings.run import Settings

_STEPS = 20  # of the reading are told


class CaseMemory:
    """The memory that one process shares: `volume`, `padding` and `outside` of a case, its `labels` and `fractions`."""

    def __init__(self) -> None:
        self._of: dict[str, SharedMemory] = {}
        with ExitStack() as stack:
            for name in ("volume", "padding", "outside", "labels", "fractions"):
                self._of[name] = SharedMemory()
                stack.callback(self._of[name].close)
            stack.pop_all()

    def __getitem__(self, name: str) -> SharedMemory:
        """The memory of that array."""
        return self._of[name]

    def share(self, name: str, array: npt.NDArray[Any] | None) -> SharedArray:
        """Copy an array there, unless it is there."""
        if array is None:
            return None
        place = self._of[name].allocate(array.shape, array.dtype)
        if not np.may_share_memory(place, array):
            place[:] = array
        return array.shape, array.dtype.str

    def find(self, name: str, shared: SharedArray) -> npt.NDArray[Any] | None:
        """The array that the other process shared."""
        return None if shared is None else self._of[name].array(*shared)

    def close(self) -> None:
        """Detach from all of it."""
        for memory in self._of.values():
            memory.close()


SharedArray = tuple[tuple[int, ...], str] | None  # shape and type of an array in shared memory


@dataclass(frozen=True)
class Idle:
    """From the process: it waits for a case, and nothing more will come of the one before."""


@dataclass(frozen=True)
class Load:
    """To the process: load this case, with so many CPUs."""

    case: Case
    cpus: int


@dataclass(frozen=True)
class SlicesRead:
    """From the process: slices read."""

    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Loaded:
    """From the process: a case is loaded, or failed. Its arrays are in shared memory, its headers stay there.

    Attributes:
        outcome: What became of the case.
        order: Index of each slice of the volume among the series' instances.
        slices: As `Assembled.slices`.
        warnings: As `Assembled.warnings`.
        geometry: The volume's.
        arrays: The volume's arrays in shared memory.
    """

    outcome: Outcome
    order: tuple[int, ...] = ()
    slices: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    geometry: Geometry | None = None
    arrays: Mapping[str, SharedArray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Write:
    """To the process: the case is segmented, write its result.

    Attributes:
        segmentation: The result, its arrays empty.
        arrays: `labels` and `fractions` in shared memory.
        seconds: Of the stages since the case was loaded.
        warnings: Of those stages.
        model: Without weights.
        settings: The run's.
        output: Gets the result's folder.
    """

    segmentation: Segmentation
    arrays: Mapping[str, SharedArray]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    model: Model
    settings: Settings
    output: Path


@dataclass(frozen=True)
class Forget:
    """To the process: the case ends here."""


@dataclass(frozen=True)
class Outcome:
    """From the process: what became of a case; all but its arrays and headers."""

    shape: tuple[int, int, int] | None
    spacing_mm: tuple[float, float, float] | None
    error: CtflowError | None
    folder: Path | None
    document: Mapping[str, object] | None
    warnings: tuple[str, ...]
    stage_seconds: Mapping[str, float]

    @classmethod
    def of(cls, case: Case) -> Outcome:
        """The outcome of a case."""
        return cls(**{name: getattr(case, name) for name in cls.__annotations__})

    def applied_to(self, case: Case) -> Case:
        """The case with this outcome."""
        return replace(without_arrays(case), **{name: getattr(self, name) for name in self.__annotations__})


def run_case_process(connection: Connection, memory: CaseMemory, level: int, *, debug: bool) -> None:
    """Run cases, one after another, until the pipe is closed or SIGTERM comes; nothing half-written stays then."""
    begin_child()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        # Holoscan's application blocks it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        warnings.simplefilter("ignore")  # libraries quote values of data sets
        log_to_parent(connection, level)
        if debug:
            show_tracebacks()
        while True:
            connection.send(Idle())
            _run(connection.recv(), connection, memory)


def _run(word: Load, connection: Connection, memory: CaseMemory) -> None:
    use_cpus(word.cpus)
    told = -1

    def progress(stage: str, done: int, total: int) -> None:  # reading has one stage
        nonlocal told
        step = _STEPS * done // max(total, 1)
        if step > told:
            told = step
            connection.send(SlicesRead(done, total))

    found = word.case.whole
    case = load_case(found, progress, memory["volume"].allocate)
    arrays: dict[str, SharedArray] = {}
    case = attempt(case, lambda: _with_shared(case, memory, arrays))
    connection.send(_told(case, found, arrays))
    # While the other process segments it: half a second of imports, for which reading does not wait.
    from ctflow.pipeline.write import write_case  # noqa: PLC0415

    case = attempt(case, lambda: prepare_result(case))
    answer = connection.recv()
    if isinstance(answer, Write):
        done = write_case(_segmented(case, answer, memory), answer.model, answer.settings, answer.output)
        connection.send(Outcome.of(done))


def _with_shared(case: Case, memory: CaseMemory, arrays: dict[str, SharedArray]) -> Case:
    """The case, its arrays in shared memory and noted in `arrays`."""
    volume = case.loaded.volume
    arrays["volume"] = memory.share("volume", volume.array)
    arrays["padding"] = memory.share("padding", volume.padding)
    arrays["outside"] = memory.share("outside", case.loaded.outside)
    return case


def _told(case: Case, before: Case, arrays: Mapping[str, SharedArray]) -> Loaded:
    if case.assembled is None:
        return Loaded(Outcome.of(case))
    assembled = case.assembled
    number = {id(instance): index for index, instance in enumerate(before.candidate.series.instances)}
    return Loaded(
        Outcome.of(case),
        tuple(number[id(instance)] for instance in assembled.instances),
        assembled.slices,
        assembled.warnings,
        assembled.volume.geometry,
        arrays,
    )


def _segmented(case: Case, word: Write, memory: CaseMemory) -> Case:
    def stage() -> Case:
        labels = memory.find("labels", word.arrays["labels"])
        if labels is None:
            raise ValueError("a segmentation has labels")
        fractions = memory.find("fractions", word.arrays["fractions"])
        segmentation = replace(word.segmentation, labels=labels, fractions=fractions)
        return with_segmentation(case, segmentation, word.seconds, word.warnings)

    return attempt(case, stage)
