"""A process that looks for cases: thousands of series would keep the interpreter that segments busy with headers."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from pydicom.dataset import Dataset

from ctflow.compat.python import bare_start
from ctflow.core.entry_point import log as entry_log
from ctflow.core.entry_point import show_tracebacks
from ctflow.core.errors import BackendUnavailable, CtflowError
from ctflow.core.processes import Line, begin_child, log_to_parent, words_of_exit_code
from ctflow.dicom.read.select.series import Candidate
from ctflow.pipeline.case import Case, Found

LookResult = tuple[Found | None, CtflowError | None]
Look = Callable[[], LookResult]

log = logging.getLogger(__name__)


class CaseFinder:
    """Looks for cases in a process of its own, for one thread; a context manager whose end ends the process."""

    def __init__(self) -> None:
        self._started: tuple[SpawnProcess, Connection] | None = None

    def __enter__(self) -> CaseFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def find(self, look: Look) -> LookResult:
        """What `look` finds, called in the process. Headers stay there: the cases are `Case.packed`.

        Args:
            look: Can be pickled; raises nothing.

        Raises:
            BackendUnavailable: The process ended meanwhile; the next call starts another one.
        """
        try:
            _, connection = self._started = self._started or _started_finder()
        except OSError as error:
            log.warning("no process starts for headers (%s): this one reads them", type(error).__name__)
            return look()
        try:
            connection.send(look)
            while isinstance(word := connection.recv(), Line):
                word.log()
        except (EOFError, OSError) as error:
            how = words_of_exit_code(self._end())
            raise BackendUnavailable(
                f"the process that reads the headers ended {how}: run it again", reason="worker-ended"
            ) from error
        found: LookResult = look() if word is None else word
        return found

    def _end(self) -> int | None:
        """End the process; its exit code if it has ended by itself."""
        if self._started is None:
            return None
        process, connection = self._started
        self._started = None
        connection.close()
        process.join(1.0)
        process.kill()
        process.join()
        code = process.exitcode
        process.close()
        return code


def _started_finder() -> tuple[SpawnProcess, Connection]:
    # Not forked: this process has threads and a GPU, which a fork does not survive.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with closing(theirs):
        process = context.Process(
            target=_run_finder,
            args=(theirs, logging.getLogger().getEffectiveLevel()),
            kwargs={"debug": entry_log.level == logging.DEBUG},
            name="finder",
            daemon=True,  # the end of this process does not wait for headers
        )
        try:
            with bare_start():
                process.start()
        except BaseException:
            ours.close()
            raise
    return process, ours


def _run_finder(connection: Connection, level: int, *, debug: bool) -> None:
    begin_child()
    with contextlib.suppress(EOFError, OSError):
        warnings.simplefilter("ignore")  # libraries quote values of data sets
        log_to_parent(connection, level)
        if debug:
            show_tracebacks()
        while True:
            finding = connection.recv()()
            try:
                answer = _packed(*finding)
            except Exception as error:  # noqa: BLE001  # headers may be nested too deeply for pickle
                log.warning("a case's headers do not leave their process: %s", type(error).__name__)
                answer = None
            connection.send(answer)


def _packed(found: Found | None, error: CtflowError | None) -> LookResult:
    if found is None:
        return None, error
    cases = tuple(_packed_case(case) for case in found.cases)
    candidates = tuple(_bare(candidate) for candidate in found.selection.candidates)
    scan = replace(found.scan, instances=())
    return Found(cases, scan, replace(found.selection, candidates=candidates)), error


def _packed_case(case: Case) -> Case:
    return replace(case, candidate=_bare(case.candidate), packed=pickle.dumps(case, protocol=pickle.HIGHEST_PROTOCOL))


def _bare(candidate: Candidate) -> Candidate:
    """A verdict without the headers."""
    nothing = Dataset()
    instances = tuple(replace(instance, header=nothing) for instance in candidate.series.instances)
    return replace(candidate, series=replace(candidate.series, instances=instances))
