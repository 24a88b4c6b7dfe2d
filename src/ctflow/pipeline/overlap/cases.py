"""The cases of a run, loaded and written by processes while this one segments; or one after another, in this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from ctflow.core.model import Model
from ctflow.core.processes import available_memory, usable_cpus
from ctflow.core.progress import Progress
from ctflow.dicom.attributes import integer
from ctflow.pipeline.case import Case
from ctflow.pipeline.overlap.processes import CasesInProcesses
from ctflow.pipeline.stages import load_case, prepare_result
from ctflow.settings.run import Settings

_MOST = 12  # reading and writing take a second of a CPU for a CT of 300 slices; a GPU segments four in that time
_PROCESS_BYTES = 250_000_000
_VOXEL_BYTES = 8  # the volume, its labels, and a copy of each while it is decoded or written


class CasesOfRun:
    """The cases of a run, in their order; a context manager whose end ends all processes.

    Args:
        settings: `cases_in_flight`: 1 keeps all in this process; None takes what CPUs and memory allow.
        output: Gets the results' folders.
        progress: Receives slices and files.
    """

    def __init__(self, settings: Settings, output: Path, progress: Progress) -> None:
        self._settings, self._output, self._progress = settings, output, progress
        self._cases: CasesInTurn | CasesInProcesses = CasesInTurn((), settings, output, progress)
        self._stack = ExitStack()

    def __enter__(self) -> CasesOfRun:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def begin(self, cases: Sequence[Case], *, early: bool = False) -> None:
        """Begin to read the cases.

        Args:
            cases: All of them.
            early: Whether this process has other work before the first one, such as importing torch.
        """
        largest = max((_voxels(case) for case in cases), default=0)
        count = self._settings.cases_in_flight or min(max(len(cases), 1), most_cases(largest))
        # A daemonic process may not have children.
        alone = (len(cases) == 1 and not early) or multiprocessing.current_process().daemon
        if (count == 1 and self._settings.cases_in_flight) or alone or not cases:
            self._cases = CasesInTurn(cases, self._settings, self._output, self._progress)
        else:
            found = CasesInProcesses(cases, self._settings, self._output, self._progress, count=count)
            self._cases = self._stack.enter_context(found)

    @property
    def done(self) -> tuple[Case, ...]:
        """The cases that are written or failed, without arrays."""
        return self._cases.done

    @property
    def times_s(self) -> tuple[dict[str, float], ...]:
        """As `CasesInProcesses.times_s`; none for cases in this process."""
        return self._cases.times_s if isinstance(self._cases, CasesInProcesses) else ()

    def loaded(self) -> Iterator[Case]:
        """Each case with its volume, or its error; its arrays are valid until it is written."""
        return self._cases.loaded()

    def prepare(self, case: Case) -> Case:
        """What `segment_case` does while a device computes."""
        return self._cases.prepare(case)

    def write(self, case: Case, model: Model) -> None:
        """Write a segmented case's result, or move an earlier one aside if it failed; may return before it is done."""
        self._cases.write(case, model)

    def finished(self) -> tuple[Case, ...]:
        """Wait until all are written."""
        return self._cases.finished()


class CasesInTurn:
    """Cases one after another, in this process.

    Args:
        cases: The cases.
        settings: The run's.
        output: Gets the results' folders.
        progress: Receives slices and files.
    """

    def __init__(self, cases: Sequence[Case], settings: Settings, output: Path, progress: Progress) -> None:
        self._cases, self._settings, self._output, self._progress = tuple(cases), settings, output, progress
        self._done: list[Case] = []

    @property
    def done(self) -> tuple[Case, ...]:
        """As `CasesOfRun.done`."""
        return tuple(self._done)

    def loaded(self) -> Iterator[Case]:
        """As `CasesOfRun.loaded`."""
        for case in self._cases:
            yield load_case(case, self._progress)

    def prepare(self, case: Case) -> Case:
        """As `CasesOfRun.prepare`."""
        return prepare_result(case)

    def write(self, case: Case, model: Model) -> None:
        """As `CasesOfRun.write`."""
        from ctflow.pipeline.write import write_case  # noqa: PLC0415  # half a second that no window need wait for

        self._done.append(write_case(case, model, self._settings, self._output, self._progress))

    def finished(self) -> tuple[Case, ...]:
        """As `CasesOfRun.finished`."""
        return self.done


def most_cases(voxels: int, runs: int = 1) -> int:
    """As many cases of so many voxels as CPUs and half of the free memory allow one of several runs at once."""
    by_memory = available_memory() // 2 // (_PROCESS_BYTES + _VOXEL_BYTES * voxels)
    return int(max(1, min(_MOST, max(2, 3 * usable_cpus() // 4 // max(runs, 1)), by_memory // max(runs, 1))))


def _voxels(case: Case) -> int:
    instances = case.candidate.series.instances
    header = instances[0].header if instances else Dataset()
    return len(instances) * (integer(header, "Rows") or 0) * (integer(header, "Columns") or 0)
