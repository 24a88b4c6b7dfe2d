"""The result.json of a case and of a run, and the resulting exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctflow.core.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PARTLY, CtflowError, InputError
from ctflow.core.model import RESEARCH_ONLY, Model, ModelSpec
from ctflow.dicom.read.select.series import Selection, Series
from ctflow.pipeline.case import Case, Found, key_of_series
from ctflow.report.result import run_result, series_result
from ctflow.report.run_record import error_facts, supersede_result
from ctflow.settings.run import Settings

if TYPE_CHECKING:
    from ctflow.measurements.measure import SegmentMeasurements

_OF_MACHINE = frozenset({"cache", "cases_in_flight"})  # settings that describe the machine and not the result


def exit_code_of_errors(errors: Sequence[CtflowError | None]) -> int:
    """0 when none of several cases has an error, 6 when some have, else the first failure's exit code."""
    failures = [error for error in errors if error is not None]
    if not failures:
        return EXIT_DONE
    return failures[0].exit_code if len(failures) == len(errors) else EXIT_PARTLY


def document_of_run(
    cases: Sequence[Case], found: Found, spec: ModelSpec, output: Path, error: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The document of a run; earlier results of series that this run has not done are moved aside.

    Args:
        cases: The cases that were run, done or not.
        found: Gives the series that were set aside, those not reached, and the unreadable files.
        spec: The model's.
        output: The output folder.
        error: The error that ended the whole run (`error_facts`), and with it every unfinished case.

    Returns:
        The document, by docs/result.schema.json.
    """
    code = exit_code_of_errors([case.error for case in cases]) if error is None else error["exit_code"]
    done = sum(case.error is None for case in cases)
    set_aside, are_moved = _set_aside(found.selection, output)
    are_moved = _supersede_other_volumes(found.selection, output) and are_moved
    selection = found.selection
    # Orphaned slices: a series' last slice, whose absence nothing else detects.
    lost = found.scan.unreadable or selection.orphaned or selection.failed or not are_moved
    if done and error is None and lost:
        code = EXIT_PARTLY
    documents = [
        _failed_document(case, spec, error_facts(case.error)) if case.error else dict(case.document or {})
        for case in cases
    ]
    if error is not None:
        reached = {case.key for case in cases}
        for case in found.cases:
            if case.key not in reached:
                remark, _ = supersede_result(output, case.key, case.candidate.series.digest)
                warned = replace(case, warnings=(*case.warnings, remark)) if remark else case
                documents.append(_failed_document(warned, spec, error))
    return run_result(
        status=_status(code, done, is_early=error is not None),
        exit_code=code,
        series=documents,
        set_aside=set_aside,
        unreadable=[file.facts for file in found.scan.unreadable],
        research_only=RESEARCH_ONLY if spec.demonstration else None,
        error=error,
    )


def _status(code: int, done: int, *, is_early: bool) -> str:
    if is_early:
        return "interrupted" if code == EXIT_INTERRUPTED else "failed"
    return "done" if code == EXIT_DONE else "partly" if done else "failed"


def _set_aside(selection: Selection, output: Path) -> tuple[list[dict[str, str]], bool]:
    """Every series that was not selected, and whether no earlier result is left in place of one."""
    entries, are_moved = [], True
    for candidate in selection.candidates:
        if candidate.selected:
            continue
        series, message = candidate.series, candidate.message
        if candidate.reason != "not-asked-for":  # this run does not report those
            remark, is_moved = supersede_result(output, key_of_series(series), series.digest)
            message = f"{message}; {remark}" if remark else message
            are_moved = are_moved and is_moved
        entries.append({"digest": series.digest, "reason": candidate.reason, "message": message})
    return entries, are_moved


def _supersede_other_volumes(selection: Selection, output: Path) -> bool:
    """Move aside results of volumes that a series no longer holds, and of the whole if it now holds several.

    Returns:
        Whether none is left.
    """
    keys: dict[tuple[str, str], set[str]] = {}
    for candidate in selection.candidates:
        if candidate.reason != "not-asked-for" or candidate.series.part:
            keys.setdefault((candidate.series.study_uid, candidate.series.uid), set()).add(
                key_of_series(candidate.series)
            )
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    are_moved = True
    for candidate in selection.candidates:
        series = candidate.series
        own, whole = keys.pop((series.study_uid, series.uid), set()), key_of_series(replace(series, part=None))
        for key in sorted(there - own if own else ()):
            if key == whole or key.startswith(f"{whole}-"):
                are_moved = supersede_result(output, key, series.digest)[1] and are_moved
    return are_moved


def document_of_case(
    case: Case, model: Model, settings: Settings, measured: tuple[SegmentMeasurements, ...]
) -> dict[str, Any]:
    """The document of a finished case."""
    spec, segmentation = model.spec, case.segmented
    return series_result(
        status="done",
        series=_series_facts(case),
        model={"name": spec.name, "version": spec.version, "weights_digest": model.weights_digest},
        engine=asdict(segmentation.engine),
        window=segmentation.window,
        settings={name: value for name, value in asdict(settings).items() if name not in _OF_MACHINE},
        stage_seconds={stage: round(seconds, 4) for stage, seconds in case.stage_seconds.items()},
        agreement=None if segmentation.agreement is None else asdict(segmentation.agreement),
        measured=[
            {name: value for name, value in asdict(entry).items() if name != "parity"}
            for entry in segmentation.measured
        ],
        segments=[asdict(segment) for segment in measured],
        warnings=[*case.warnings, *spec.notes],
        research_only=RESEARCH_ONLY if spec.demonstration else None,
        intended_use=spec.intended_use,
        folder=case.key,
    )


def _failed_document(case: Case, spec: ModelSpec, error: Mapping[str, Any]) -> dict[str, Any]:
    return series_result(
        status="refused" if isinstance(case.error, InputError) else "failed",
        series=_series_facts(case),
        stage_seconds=dict(case.stage_seconds),
        warnings=list(case.warnings),
        research_only=RESEARCH_ONLY if spec.demonstration else None,
        intended_use=spec.intended_use,
        error=error,
    )


def _volume_facts(series: Series) -> dict[str, Any]:
    """Which volume it is, of a series that holds several; nothing of others."""
    part = series.part
    return {"volume": {"name": part.name, "label": part.label, "number": part.number, "of": part.count}} if part else {}


def _series_facts(case: Case) -> dict[str, Any]:
    series = case.candidate.series
    return {
        "digest": series.digest,
        "series_instance_uid": series.uid,
        **_volume_facts(series),
        "slices": len(series.instances),
        "shape": list(case.shape) if case.shape else None,
        "spacing_mm": [round(mm, 6) for mm in case.spacing_mm] if case.spacing_mm else None,
    }
