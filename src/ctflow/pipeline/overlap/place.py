"""A case in its place in the order of a run, and the process that has it, started here."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ctflow.compat.python import bare_start
from ctflow.core.atomic import remove_temporary_folder
from ctflow.core.entry_point import log as entry_log
from ctflow.core.model import Model
from ctflow.core.volume import Volume
from ctflow.dicom.read.assemble import Assembled
from ctflow.pipeline.case import Case
from ctflow.pipeline.overlap.process import CaseMemory, Loaded, SlicesRead, Write, run_case_process
from ctflow.settings.run import Settings


@dataclass(eq=False)
class CaseProcess:
    """A process, our end of its pipe, and the case that it has.

    Attributes:
        process: The process.
        connection: Two threads send, this one and that which leads the processes: under the lock `sending`.
        memory: That it shares.
        place: Of its case.
        is_ready: Whether it waits for a case.
        has_begun: Whether it ever was.
    """

    process: SpawnProcess
    connection: Connection
    memory: CaseMemory
    place: Place | None = None
    is_ready: bool = False
    has_begun: bool = False
    sending: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """End the process and remove what it has left."""
        with self.sending:
            self.connection.close()
        self.process.kill()
        self.process.join()
        if self.place is not None and self.process.pid is not None:
            remove_temporary_folder(self.place.output, self.place.case.key, self.process.pid)
        self.process.close()
        self.memory.close()


def started_process() -> CaseProcess:
    """A new process.

    Raises:
        OSError: None can be started.
    """
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
    return CaseProcess(process, ours, memory)


@dataclass(eq=False)
class Place:
    """A case in its place in the order.

    Attributes:
        number: Its place.
        case: As it was given; with its error once it has failed.
        output: Gets its folder.
        on_done: Is told once it is written or failed.
        settings: Its own, where they are not those of all cases.
        process: That has it.
        is_here: No process could be started: this one loads and writes it.
        steps: Slices read, not shown yet.
        told: Of its process, once it is loaded.
        loaded: With its volume, or its error; until its labels are shared.
        done: Written or failed.
        times_s: When it was given to a process, loaded, begun, handed over and done, by `time.perf_counter`.
    """

    number: int
    case: Case
    output: Path
    on_done: Callable[[Case], None] | None = None
    settings: Settings | None = None
    process: CaseProcess | None = None
    is_here: bool = False
    steps: deque[SlicesRead] = field(default_factory=deque)
    told: Loaded | None = None
    loaded: Case | None = None
    is_writing: bool = False
    done: Case | None = None
    times_s: dict[str, float] = field(default_factory=dict)

    def note(self, what: str) -> None:
        """Note the time of an event."""
        self.times_s[what] = time.perf_counter()


def loaded_case(case: Case, word: Loaded, memory: CaseMemory) -> Case:
    """A case as `load_case` returns it, with its arrays in shared memory."""
    loaded = word.outcome.applied_to(case)
    array = memory.find("volume", word.arrays.get("volume"))
    if array is None or word.geometry is None:
        return loaded
    instances = case.candidate.series.instances
    return replace(
        loaded,
        assembled=Assembled(
            Volume(array, word.geometry, memory.find("padding", word.arrays["padding"])),
            tuple(instances[index] for index in word.order),
            word.slices,
            word.warnings,
            memory.find("outside", word.arrays["outside"]),
        ),
    )


def shared_result(
    case: Case, before: Case, memory: CaseMemory, model: Model, settings: Settings, output: Path
) -> Write:
    """What a process needs to write a segmented case, whose labels are then in the memory that it shares.

    Args:
        case: Segmented.
        before: The same case as it was loaded, which the process has.
        memory: The process's.
        model: The model.
        settings: The run's.
        output: Gets the result's folder.
    """
    found = case.segmented
    arrays = {"labels": memory.share("labels", found.labels), "fractions": memory.share("fractions", found.fractions)}
    return Write(
        replace(found, labels=found.labels[:0], fractions=None),
        arrays,
        {name: value for name, value in case.stage_seconds.items() if name not in before.stage_seconds},
        case.warnings[len(before.warnings) :],
        replace(model, weights={}),
        settings,
        output,
    )
