"""A case in its place in the order of a run, and the process that has it."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from ctflow.core.volume import Volume
from ctflow.dicom.read.assemble import Assembled
from ctflow.pipeline.case import Case
from ctflow.pipeline.overlap.process import CaseMemory, Loaded, SlicesRead


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


@dataclass(eq=False)
class Place:
    """A case in its place in the order.

    Attributes:
        number: Its place.
        case: As it was given; with its error once it has failed.
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
