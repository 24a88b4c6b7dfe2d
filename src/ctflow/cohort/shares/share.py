"""A share of a cohort on this machine, from the manifest to the last commit."""

from __future__ import annotations

import gc
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctflow import __version__
from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.manifest.rows import WHOLE, CohortRow, Manifest, ManifestPart
from ctflow.cohort.outcome import SCHEMA_VERSION, MarkName, RowName, RowOutcome, RowStatus, best_mark
from ctflow.cohort.shares.attempt import RowAttempt
from ctflow.cohort.shares.in_flight import RowsInFlight, RunSetup
from ctflow.cohort.watch import UNWATCHED, CohortWatcher
from ctflow.core.errors import EXIT_DONE, EXIT_PARTLY, SettingsInvalid
from ctflow.core.model import RESEARCH_ONLY, Model
from ctflow.core.progress import Progress, silent
from ctflow.engines.registry import devices_from_setting
from ctflow.engines.utilization import GpuMeter, gpu_uuids
from ctflow.pipeline.overlap.cases import most_cases
from ctflow.pipeline.overlap.processes import CasesInProcesses
from ctflow.pipeline.run import announce
from ctflow.pipeline.stages import segment_case
from ctflow.settings.run import Settings

USUAL_VOXELS = 600 * 512 * 512  # of the CTs that are to come
# Settings that describe the machine or the input, not the result: machines of one cohort may differ in them.
_NOT_SHARED = frozenset({"cache", "cases_in_flight", "device", "engine", "series", "volume"})
_OPEN = frozenset({"partly", "failed"})  # what `retry_failed` computes again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CohortReport:
    """What became of a share's rows.

    Attributes:
        rows: How many the share has.
        skipped: How many of them were committed before.
        counts: Rows by status, whenever they were committed.
        exit_code: 0 if all are done, else 6.
    """

    rows: int
    skipped: int
    counts: Mapping[RowStatus, int]
    exit_code: int


@dataclass(frozen=True, eq=False)
class RowsToDo:
    """What is left of a share, and all that is needed to do it.

    Attributes:
        attempts: At the rows, in their order.
        count: How many there are.
        destination: Entered.
        model: The model.
        setup: What the rows have in common.
        progress: Receives rows.
    """

    attempts: Iterator[RowAttempt]
    count: int
    destination: RowDestination
    model: Model
    setup: RunSetup
    progress: Progress


def run_cohort(
    manifest: Manifest,
    destination: RowDestination,
    model: Model,
    settings: Settings,
    part: ManifestPart = WHOLE,
    progress: Progress = silent,
    *,
    retry_failed: bool = False,
    watcher: CohortWatcher = UNWATCHED,
    compute: Callable[[RowsToDo], Sequence[MarkName]] | None = None,
) -> CohortReport:
    """Segment every row of a share that is not committed yet.

    Args:
        manifest: With the share's rows.
        destination: Entered.
        model: The model.
        settings: The run's.
        part: The share.
        progress: Receives rows, as stage "rows".
        retry_failed: Whether rows that failed, or are done only partly, are computed again.
        watcher: Is told what becomes of the rows.
        compute: Commits rows, and returns the markers' names; None computes them in this process.

    Returns:
        What became of the share.

    Raises:
        SettingsInvalid: The destination holds results of another model or other settings.
        OutputError: It cannot be written; rows that are not committed stay open.
        CtflowError: The engine cannot be opened, or too many rows in succession failed.
    """
    announce(model)
    _check_agreement(destination.agree(_common(model, settings)), model, settings)
    marks = _marks_by_row(destination.marks(), manifest.rows)
    waiting = [row for row in manifest.rows if _is_open(row, marks.get(row.id, ()), retry_failed=retry_failed)]
    _forget_committed(manifest.rows, waiting, destination)
    is_waiting = {row.id for row in waiting}
    watcher.began(len(manifest.rows), _counts([row for row in manifest.rows if row.id not in is_waiting], marks))
    log.info("part %s: %d rows of %d, %d to do", part, len(manifest.rows), manifest.total, len(waiting))
    if waiting:
        setup = RunSetup(manifest.base, model.spec, settings, _stamp(model, part), watcher)
        attempts = _in_order(waiting, destination.begun(), marks)
        for name in (compute or _compute_here)(RowsToDo(attempts, len(waiting), destination, model, setup, progress)):
            marks[name.id].append(name)  # the best counts: a worse one has not replaced it
    return _report(manifest.rows, marks, len(manifest.rows) - len(waiting))


def _compute_here(todo: RowsToDo) -> Sequence[MarkName]:
    from ctflow.pipeline.segmenter import Segmenter  # noqa: PLC0415  # torch takes seconds

    model, settings, progress, rows = todo.model, todo.setup.settings, todo.progress, todo.count
    committed = list[MarkName]()
    count = settings.cases_in_flight or min(rows, most_cases(USUAL_VOXELS))
    gc.freeze()  # what is there by now stays
    with (
        CasesInProcesses((), settings, Path(), count=count, more=True) as cases,
        GpuMeter(gpu_uuids(devices_from_setting(settings.device))) as gpus,
        RowsInFlight(
            cases,
            todo.destination,
            replace(todo.setup, gpus=gpus),
            count,
            rows=todo.attempts,
            on_committed=lambda outcome: committed.append(outcome.name),
        ) as flight,
    ):
        flight.end()  # no rows but these
        segmenter = Segmenter(model, settings)
        segmenter.open(progress)
        progress("rows", 0, rows)
        with segmenter:
            for case in cases.loaded():
                cases.write(segment_case(case, segmenter, prepare=cases.prepare), model)
                progress("rows", len(committed), rows)
        flight.check()
        progress("rows", rows, rows)
        return committed


def _in_order(
    rows: Sequence[CohortRow], begun: Mapping[RowName, int], marks: Mapping[str, Sequence[MarkName]]
) -> Iterator[RowAttempt]:
    """The rows, last of all those at which a process was killed: alone, as one of them may be why."""
    for is_alone in (False, True):
        for row in rows:
            count = begun.get((row.id, row.fingerprint), 0)
            if (count > 0) == is_alone:
                yield RowAttempt(row, count + 1, is_alone, tuple(marks.get(row.id, ())))


def _common(model: Model, settings: Settings) -> dict[str, Any]:
    spec = model.spec
    return {
        "schema_version": SCHEMA_VERSION,
        "research_only": RESEARCH_ONLY if spec.demonstration else None,
        "model": {"name": spec.name, "version": spec.version, "weights_digest": model.weights_digest},
        "settings": {name: value for name, value in asdict(settings).items() if name not in _NOT_SHARED},
    }


def _check_agreement(kept: Mapping[str, Any], model: Model, settings: Settings) -> None:
    ours = _common(model, settings)
    if kept.get("model") != ours["model"]:
        raise SettingsInvalid(
            "-o: the folder holds results of another model: give its model, or another folder", reason="other-model"
        )
    theirs = kept.get("settings") or {}
    names = sorted(name for name in ours["settings"] if theirs.get(name) != ours["settings"][name])
    if names:
        raise SettingsInvalid(
            f"-o: the folder holds results of other settings ({', '.join(names)}): give the same, or another folder",
            reason="conflict",
        )


def _stamp(model: Model, part: ManifestPart) -> RowOutcome:
    common = {"name": model.spec.name, "version": model.spec.version, "weights_digest": model.weights_digest}
    return RowOutcome(
        "", "", "failed", "", "", 0, 0, 0.0, model=common, version=__version__, node=platform.node(), part=str(part)
    )


def _marks_by_row(names: Iterable[MarkName], rows: Sequence[CohortRow]) -> dict[str, list[MarkName]]:
    marks: dict[str, list[MarkName]] = {row.id: [] for row in rows}
    for name in names:
        if name.id in marks:
            marks[name.id].append(name)
    return marks


def _current(row: CohortRow, marks: Iterable[MarkName]) -> MarkName | None:
    """The marker of what the row asks for."""
    return best_mark(name for name in marks if name.fingerprint == row.fingerprint)


def _is_open(row: CohortRow, marks: Iterable[MarkName], *, retry_failed: bool) -> bool:
    name = _current(row, marks)
    return name is None or (retry_failed and name.status in _OPEN)


def _forget_committed(rows: Sequence[CohortRow], waiting: Sequence[CohortRow], destination: RowDestination) -> None:
    """Remove the notes of rows that were committed just before their process was killed."""
    begun = destination.begun()
    if begun:
        is_open = {row.id for row in waiting}
        for name in [(row.id, row.fingerprint) for row in rows if row.id not in is_open]:
            if name in begun:
                destination.end(name)


def _counts(rows: Sequence[CohortRow], marks: Mapping[str, Sequence[MarkName]]) -> Counter[RowStatus]:
    return Counter(name.status for row in rows if (name := _current(row, marks[row.id])) is not None)


def _report(rows: Sequence[CohortRow], marks: Mapping[str, Sequence[MarkName]], skipped: int) -> CohortReport:
    counts = _counts(rows, marks)
    # Whatever became of them, all are accounted for: what starts this share need not start it again.
    return CohortReport(len(rows), skipped, counts, EXIT_DONE if counts["done"] == len(rows) else EXIT_PARTLY)
