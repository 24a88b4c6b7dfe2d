"""The whole trip of a case, without Holoscan: find, load, segment, write.

Every door (command line, operators, service) goes through these functions, so all of them give the same SEG.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from ctflow import __version__
from ctflow.core.atomic import publish_folder, temporary_folder
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PARTLY,
    BrokenSeries,
    CtflowError,
    DeviceOutOfMemory,
    InputError,
)
from ctflow.core.model import RESEARCH_ONLY, Model, ModelSpec, Segment
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import LabelArray, digest_of_uid
from ctflow.dicom.read.assemble import Assembled, assemble_series
from ctflow.dicom.read.scan import Scan, scan_folder
from ctflow.dicom.read.select.selection import require_chosen, select_series
from ctflow.dicom.read.select.series import Candidate, Selection, Series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.measurement_report import report_from_measurements
from ctflow.dicom.write.measures import measures_from_headers
from ctflow.dicom.write.secondary_capture import secondary_capture_from_picture
from ctflow.dicom.write.segmentation import SegForm, read_standard, segmentation_from_labels
from ctflow.dicom.write.source import Sources, sources_from_headers
from ctflow.measurements.measure import SegmentMeasurements, count_findings_between, measure_segments, split_findings
from ctflow.measurements.plausibility import Checks, note_of_findings, place_to_show, warnings_of_findings
from ctflow.nifti import write_nifti
from ctflow.report.html_report import write_html_report
from ctflow.report.preview import draw_preview, write_picture
from ctflow.report.result import run_result, series_result, write_result
from ctflow.report.run_record import RunRecord, error_facts, recorded_run, supersede_result
from ctflow.report.views import Oriented, oriented_from_volume
from ctflow.segmenter import Segmentation, Segmenter, memory_of, timed
from ctflow.settings.run import SegGrid, Settings
from ctflow.transforms.tilt import upright_volume
from ctflow.window.body import Body, body_of_volume

_RESAMPLED = "The slices were resampled to {}; lengths, volumes and HU are of the resampled volume."

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Case:
    """One series on its way; each stage returns a copy that knows more.

    Attributes:
        candidate: The series and the rule that chose it.
        key: Name of its result folder.
        allow_gaps: Whether single missing slices are interpolated.
        seg_grid: Whether the SEG lies on the slices, or on the grid that a tilted or uneven series was resampled to.
        assembled: Its volume, from `load_case` until the case is written or fails.
        shape: The volume's, once loaded.
        spacing_mm: The volume's, once loaded.
        sources: What the result's objects take over from its headers, once prepared.
        segmentation: What was marked, once segmented.
        error: Why it went no further.
        folder: Where its result lies, once written.
        document: The content of its result.json.
        warnings: What a person should know.
        stage_seconds: Wall time of each stage.
        body: Where the body is, once prepared; None where none was found.
        previous: Measurement reports whose place this case's takes, as they were before instances came late.
    """

    candidate: Candidate
    key: str
    allow_gaps: bool = False
    seg_grid: SegGrid = "source"
    assembled: Assembled | None = None
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    sources: Sources | None = None
    segmentation: Segmentation | None = None
    error: CtflowError | None = None
    folder: Path | None = None
    document: Mapping[str, object] | None = None
    warnings: tuple[str, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    body: Body | None = None
    previous: tuple[Dataset, ...] = ()

    @property
    def loaded(self) -> Assembled:
        """The volume; a ValueError before `load_case`, and once written or failed."""
        if self.assembled is None:
            raise ValueError("the case holds no volume: load it first")
        return self.assembled

    @property
    def prepared(self) -> Sources:
        """What objects take over from the headers; a ValueError before `prepare_result`, and once written or failed."""
        if self.sources is None:
            raise ValueError("the case's result is not prepared: segment it first")
        return self.sources

    @property
    def segmented(self) -> Segmentation:
        """What was marked; a ValueError before `segment_case`, and once written or failed."""
        if self.segmentation is None:
            raise ValueError("the case holds no segmentation: segment it first")
        return self.segmentation


@dataclass(frozen=True, eq=False)
class Found:
    """What a folder holds: the cases to be run, every file, and the verdict on every series."""

    cases: tuple[Case, ...]
    scan: Scan
    selection: Selection


@dataclass(frozen=True, eq=False)
class RunReport:
    """What became of every chosen series, and the exit code that says so.

    Attributes:
        cases: The cases, in the order they ran.
        exit_code: 0, 6, or the first failure's.
        document: The content of the run's result.json.
    """

    cases: tuple[Case, ...]
    exit_code: int
    document: Mapping[str, Any]


def find_cases(folder: Path, spec: ModelSpec, settings: Settings, progress: Progress = silent) -> Found:
    """Find the series that are to be run.

    Args:
        folder: Input folder, searched with all its subfolders.
        spec: Its body parts take part in the choice.
        settings: Series, pick and force.
        progress: Told of every file.

    Returns:
        A case for each chosen series, and everything else that was found.

    Raises:
        NoUsableSeries: No series may be run.
    """
    found = look_for_cases(folder, spec, settings, progress)
    require_chosen(found.selection, found.scan)
    return found


def look_for_cases(folder: Path, spec: ModelSpec, settings: Settings, progress: Progress = silent) -> Found:
    """As `find_cases`, also where no series may be run: a run that ends there says why of each."""
    scan = scan_folder(folder, progress)
    selection = select_series(
        scan, series_uid=settings.series, pick=settings.pick, force=settings.force, body_parts=spec.body_parts
    )
    for candidate in selection.candidates:
        log.info("series %s: %s (%s)", candidate.series.digest, candidate.reason, candidate.rule)
    cases = [case_from_candidate(each, key_of_series(each.series), settings) for each in selection.chosen]
    return Found(tuple(cases), scan, selection)


def case_from_candidate(candidate: Candidate, key: str, settings: Settings) -> Case:
    """A case to run, with what its choice gives a person to know; `key` names its result folder."""
    warnings = (*candidate.series.dropped, *((candidate.reason,) if candidate.forced else ()))
    return Case(candidate, key, settings.allow_gaps, settings.seg_grid, warnings=warnings)


def key_of_series(series: Series) -> str:
    """Name of a series' result folder: its UID, or that one's digest where it is no safe name, and its study's digest.

    It says nothing of what else is in the input: there may be series of the same UID in two studies, today or tomorrow.
    """
    uid = series.uid
    safe = 1 <= len(uid) <= 64 and set(uid) <= set("0123456789.")
    return f"{uid if safe else digest_of_uid(uid)}-{digest_of_uid(series.study_uid)}"


def _attempt(case: Case, stage: Callable[[], Case]) -> Case:
    """Run a stage unless an earlier one failed; whatever it raises becomes, with a name, part of the case."""
    if case.error is not None:
        return case
    try:
        return stage()
    except CtflowError as error:
        log.error("%s: %s", type(error).__name__, error)  # noqa: TRY400  # named: no traceback needed
        return _failed(case, error)
    except MemoryError as error:
        # Rows, Columns or spacing may be absurd, or the machine small; other series may still fit.
        digest = case.candidate.series.digest
        too_large = DeviceOutOfMemory(f"series {digest}: this computer has too little memory for it")
        log.error("%s: %s", type(too_large).__name__, too_large)  # noqa: TRY400
        too_large.__cause__ = error
        return _failed(case, too_large)
    except Exception as error:  # noqa: BLE001  # no fault that one series meets may take the others with it
        failure = unexpected(error, f"series {case.candidate.series.digest}")
        log.error("%s: %s", type(failure).__name__, failure)  # noqa: TRY400  # `unexpected` logs the traceback
        failure.__cause__ = error
        return _failed(case, failure)


def _failed(case: Case, error: CtflowError) -> Case:
    """The case with its error, neither with an array: a run keeps its cases, and the next one needs the memory."""
    waiting: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while waiting:
        link = waiting.pop()
        if link is not None and link not in seen:
            seen.append(link)
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None  # its frames hold those that called them, with the case as it was
            waiting += [link.__cause__, link.__context__]
    return _without_arrays(replace(case, error=error))


def _without_arrays(case: Case) -> Case:
    """What a folder of many series may pile up."""
    return replace(case, assembled=None, sources=None, segmentation=None, body=None)


def load_case(case: Case, progress: Progress = silent) -> Case:
    """Read the pixels of a case's series into a volume; an `InputError` becomes part of the case."""

    def stage() -> Case:
        seconds: dict[str, float] = {}
        with timed(seconds, "read"):
            assembled = assemble_series(case.candidate.series, progress, allow_gaps=case.allow_gaps)
            with memory_of("this computer"):
                if assembled.volume.geometry.is_tilted and case.seg_grid == "resampled":
                    assembled = _set_upright(assembled)
            _check_grid(case, assembled)
            assembled = _warned_of_readers(case, assembled)
        geometry, warnings = assembled.volume.geometry, case.warnings + assembled.warnings
        loaded = replace(case, assembled=assembled, shape=geometry.shape, spacing_mm=geometry.spacing_mm)
        return replace(loaded, warnings=warnings, stage_seconds=seconds)

    return _attempt(case, stage)


def _check_grid(case: Case, assembled: Assembled) -> None:
    """The grid that a SEG of its own needs; known now, not after minutes of work."""
    if case.seg_grid == "resampled" and assembled.is_resampled and not assembled.volume.geometry.is_orthogonal:
        what = "its axes are not at right angles, so that no right-angled grid holds it: leave --seg-grid resampled out"
        raise BrokenSeries(f"series {case.candidate.series.digest}: {what} [tilted]", reason="tilted")


def _set_upright(assembled: Assembled) -> Assembled:
    """A tilted series as a SEG at right angles will need it, from here on."""
    upright = upright_volume(assembled.volume)
    if upright is None:
        return assembled
    volume, outside = upright
    return replace(assembled, volume=volume, outside=outside)


def _warned_of_readers(case: Case, assembled: Assembled) -> Assembled:
    """Name the readers that will put a SEG on these slices elsewhere: nothing in the SEG would stop them."""
    if case.seg_grid == "resampled" and assembled.is_resampled:
        return assembled
    measures = measures_from_headers([instance.header for instance in assembled.instances])
    if measures is None or measures.misread is None:
        return assembled
    log.warning("series %s: %s", case.candidate.series.digest, measures.misread)
    return replace(assembled, warnings=(*assembled.warnings, measures.misread))


def segment_case(case: Case, segmenter: Segmenter, progress: Progress = silent) -> Case:
    """Segment a loaded case, and prepare its result meanwhile; a named error becomes part of the case."""

    def stage() -> Case:
        ready: list[Case] = []
        segmentation, seconds = segmenter.segment(
            case.loaded.volume, progress, meanwhile=lambda: ready.append(prepare_result(case))
        )
        _clear(segmentation, case.loaded.outside)
        return replace(
            ready[0],
            segmentation=segmentation,
            stage_seconds={**case.stage_seconds, **seconds},
            warnings=ready[0].warnings + segmenter.warnings + segmentation.warnings,
        )

    return _attempt(case, stage)


def prepare_result(case: Case) -> Case:
    """What the result of a loaded case needs and the mask does not change: done while a GPU computes the mask."""
    sources = sources_from_headers([instance.header for instance in case.loaded.instances])
    read_standard(sources)
    body = body_of_volume(case.loaded.volume)
    return replace(case, sources=sources, body=body, warnings=case.warnings + sources.warnings)


def _clear(segmentation: Segmentation, outside: npt.NDArray[np.bool_] | None) -> None:
    """What the model marks where there is no image is not a finding."""
    if outside is None:
        return
    segmentation.labels[outside] = 0
    if segmentation.fractions is not None:
        segmentation.fractions[:, outside] = 0


def write_case(case: Case, model: Model, settings: Settings, output: Path, progress: Progress = silent) -> Case:
    """Write a segmented case's folder: complete under its final name, or not at all.

    Where there is an error, this one's or an earlier stage's, the folder that an earlier run left is moved aside.
    """
    case = _attempt(case, lambda: _write(case, model, settings, output, progress))
    if case.error is None:
        return case
    remark, _ = supersede_result(output, case.key, case.candidate.series.digest)
    return replace(case, warnings=(*case.warnings, remark)) if remark else case


def _write(case: Case, model: Model, settings: Settings, output: Path, progress: Progress) -> Case:
    volume, labels = case.loaded.volume, case.segmented.labels
    progress("write", 0, 1)
    seconds: dict[str, float] = {}
    checks = Checks(volume, case.body.count_in_runs if case.body else None)
    with temporary_folder(output, case.key) as folder:
        with timed(seconds, "seg"):
            seg = _write_segmentation(case, model, settings, checks, folder)
        with timed(seconds, "measure"):
            measured = measure_segments(labels, volume, model.spec.segments, checks.count_in_body)
            doubts = warnings_of_findings(measured, checks)
            remarks = (*doubts, *_remarks_on_grid(case, model.spec))
            for doubt in doubts:
                log.warning("series %s: %s", case.candidate.series.digest, doubt)
            case = replace(case, warnings=(*case.warnings, *remarks))
        with timed(seconds, "preview"):
            oriented = oriented_from_volume(volume, labels, place_to_show(measured))
            picture = _picture(oriented, model.spec, note_of_findings(measured))
            write_picture(picture, folder / "preview.png")
        with timed(seconds, "write"):
            _write_objects(case, seg, model.spec, settings, measured, remarks, picture, folder)
        if settings.report == "html":
            with timed(seconds, "report"):
                write_html_report(oriented, _document(case, model, settings, measured), folder / "report.html")
        case = replace(case, stage_seconds={**case.stage_seconds, **seconds})
        document = _document(case, model, settings, measured)
        write_result(document, folder / "result.json")
        publish_folder(folder, output / case.key)
    progress("write", 1, 1)
    log.info("series %s: done in %.1f s", case.candidate.series.digest, sum(case.stage_seconds.values()))
    return _without_arrays(replace(case, folder=output / case.key, document=document))


def _remarks_on_grid(case: Case, spec: ModelSpec) -> tuple[str, ...]:
    """What measurements on a grid that is not the slices' own mean, and what it keeps from the SEG."""
    if not case.loaded.is_resampled:
        return ()
    resampled = _RESAMPLED.format("equal distances" if case.loaded.outside is None else "right angles")
    if case.seg_grid == "resampled":
        return (resampled, "The SEG lies on that volume's grid and not on the slices.")
    lost = count_findings_between(case.segmented.labels, case.loaded.slices, spec.segments)
    between = f"{lost} findings lie between the slices that there are: measured, but not in the SEG"
    return (resampled, f"{between} (--seg-grid resampled writes them)") if lost else (resampled,)


@dataclass(frozen=True, eq=False)
class _Seg:
    """A case's SEG, the labels in it and what they mean, and what made them."""

    dataset: Dataset
    marked: LabelArray
    segments: tuple[Segment, ...]
    provenance: Provenance


def _write_segmentation(case: Case, model: Model, settings: Settings, checks: Checks, folder: Path) -> _Seg:
    """The SEG, before everything that refers to it."""
    engine, spec = case.segmented.engine, model.spec
    provenance = Provenance(
        ctflow_version=__version__,
        weights_digest=model.weights_digest,
        settings={"backend": engine.backend, "precision": engine.precision, **_flat(case.segmented.window)},
    )
    labels, fractions = case.segmented.labels, case.segmented.fractions
    by_finding = settings.segments == "finding"
    marked, segments = split_findings(labels, spec.segments, checks) if by_finding else (labels, spec.segments)
    own_grid = case.loaded.is_resampled and case.seg_grid == "resampled"
    dataset = segmentation_from_labels(
        marked if own_grid else case.loaded.on_instances(marked),
        case.prepared,
        replace(spec, segments=segments),
        provenance,
        form=SegForm(settings.seg, omit_empty_frames=settings.omit_empty_frames),
        fractions=fractions if own_grid or fractions is None else case.loaded.on_instances(fractions),
        grid=case.loaded.volume.geometry if own_grid else None,
    )
    write_dataset(dataset, folder / "segmentation.dcm")
    return _Seg(dataset, marked, segments, provenance)


def _write_objects(
    case: Case,
    seg: _Seg,
    spec: ModelSpec,
    settings: Settings,
    measured: Sequence[SegmentMeasurements],
    remarks: Sequence[str],
    picture: npt.NDArray[np.uint8],
    folder: Path,
) -> None:
    """The measurement report that refers to the SEG, and mask and picture in other forms if asked for."""
    report = report_from_measurements(
        measured,
        seg.dataset,
        case.prepared,
        spec,
        seg.provenance,
        marked_as=seg.segments,
        remarks=remarks,
        previous=case.previous,
    )
    write_dataset(report, folder / "measurements.dcm")
    if settings.secondary_capture:
        capture = secondary_capture_from_picture(picture, seg.dataset, case.prepared, spec, seg.provenance)
        write_dataset(capture, folder / "secondary_capture.dcm")
    if settings.nifti:
        write_nifti(seg.marked, case.loaded.volume.geometry, folder / "segmentation.nii.gz")


def _flat(window: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The window settings that change a result; the batch size, which follows the machine, and counts do not."""
    return {
        key: "x".join(map(str, value)) if isinstance(value, list) else value
        for key, value in window.items()
        if key not in {"batch_size", "windows", "windows_of_all", "windows_constant"}
    }


def _picture(oriented: Oriented, spec: ModelSpec, note: str) -> npt.NDArray[np.uint8]:
    return draw_preview(
        oriented,
        title=f"{spec.name} {spec.version}",
        research_only=spec.demonstration,
        segment_labels={segment.number: segment.label for segment in spec.segments},
        note=note,
    )


def announce(model: Model) -> None:
    """Log what runs; for a demonstration model the first line says that it is not for clinical use."""
    if model.spec.demonstration:
        log.warning("%s: %s is a demonstration model", RESEARCH_ONLY, model.spec.name)
    log.info("model %s %s, weights %s", model.spec.name, model.spec.version, model.weights_digest[:12])
    for note in model.spec.notes:
        log.warning("bundle: %s", note)


def run_folder(
    folder: Path,
    output: Path,
    model: Model,
    settings: Settings,
    progress: Progress = silent,
    record: RunRecord | None = None,
) -> RunReport:
    """Segment every chosen series of a folder, one after another.

    Args:
        folder: Input folder.
        output: Gets one folder a series, and the run's result.json, also where the run ends early.
        model: The model.
        settings: The run's.
        progress: Told of files, slices and windows.
        record: The run's, where it has begun already.

    Returns:
        What became of every series.

    Raises:
        NoUsableSeries: No series may be run.
        ResourceError: The engine cannot be opened.
        OutputError: The output folder cannot be written.
    """
    with recorded_run(output, record) as recorded:
        announce(model)
        found = look_for_cases(folder, model.spec, settings, progress)
        done: list[Case] = []
        recorded.describe = lambda error: document_of_run(done, found, model.spec, output, error)
        require_chosen(found.selection, found.scan)
        segmenter = Segmenter(model, settings)
        segmenter.open(progress)
        with segmenter:
            for case in found.cases:
                done.append(run_case(case, segmenter, settings, output, progress))
        return finish_run(tuple(done), found, model.spec, output)


def run_case(case: Case, segmenter: Segmenter, settings: Settings, output: Path, progress: Progress = silent) -> Case:
    """Load, segment and write one case; a named error becomes part of it."""
    case = segment_case(load_case(case, progress), segmenter, progress)
    return write_case(case, segmenter.model, settings, output, progress)


def exit_code_of_cases(cases: Iterable[Case]) -> int:
    """0 when all are done, 6 when some are, else the first failure's exit code."""
    errors = [case.error for case in cases]
    failures = [error for error in errors if error is not None]
    if not failures:
        return EXIT_DONE
    return failures[0].exit_code if len(failures) == len(errors) else EXIT_PARTLY


def finish_run(cases: tuple[Case, ...], found: Found, spec: ModelSpec, output: Path) -> RunReport:
    """Write the run's result.json and decide the exit code.

    Args:
        cases: Every chosen case, done or not.
        found: For the series that were set aside and the unreadable files.
        spec: The model's.
        output: The output folder.

    Returns:
        What became of every series.

    Raises:
        OutputError: The result.json cannot be written.
    """
    document = document_of_run(cases, found, spec, output)
    for file in found.scan.unreadable:
        log.warning("file %s: %s", file.name, file.reason)
    write_result(document, output / "result.json")
    return RunReport(cases, document["exit_code"], document)


def document_of_run(
    cases: Sequence[Case], found: Found, spec: ModelSpec, output: Path, error: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The document of a run; what an earlier run left of series that this one has not done is moved aside.

    Args:
        cases: The cases that were run, done or not.
        found: For the series that were set aside, those not reached, and the unreadable files.
        spec: The model's.
        output: The output folder.
        error: What ended the whole run (`error_facts`): then it ended every case that it had not done yet, too.

    Returns:
        The document, by docs/result.schema.json.
    """
    code = exit_code_of_cases(cases) if error is None else error["exit_code"]
    done = sum(case.error is None for case in cases)
    set_aside, are_moved = _set_aside(found.selection, output)
    selection = found.selection
    # Strays: a series' last slice, which nothing else would miss.
    lost = found.scan.unreadable or selection.strays or selection.failed or not are_moved
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
        unreadable=[{"file": file.name, "reason": file.reason} for file in found.scan.unreadable],
        research_only=RESEARCH_ONLY if spec.demonstration else None,
        error=error,
    )


def _status(code: int, done: int, *, is_early: bool) -> str:
    if is_early:
        return "interrupted" if code == EXIT_INTERRUPTED else "failed"
    return "done" if code == EXIT_DONE else "partly" if done else "failed"


def _set_aside(selection: Selection, output: Path) -> tuple[list[dict[str, str]], bool]:
    """Every series that was not chosen, and whether none of an earlier run's results is left in the place of one."""
    entries, are_moved = [], True
    for candidate in selection.candidates:
        if candidate.chosen:
            continue
        series, reason = candidate.series, candidate.reason
        if candidate.rule != "not-asked-for":  # of those this run says nothing
            remark, is_moved = supersede_result(output, key_of_series(series), series.digest)
            reason = f"{reason}; {remark}" if remark else reason
            are_moved = are_moved and is_moved
        entries.append({"digest": series.digest, "rule": candidate.rule, "reason": reason})
    return entries, are_moved


def _document(
    case: Case, model: Model, settings: Settings, measured: tuple[SegmentMeasurements, ...]
) -> dict[str, Any]:
    spec, segmentation = model.spec, case.segmented
    return series_result(
        status="done",
        series=_series_facts(case),
        model={"name": spec.name, "version": spec.version, "weights_digest": model.weights_digest},
        engine=asdict(segmentation.engine),
        window=segmentation.window,
        settings=_settings_facts(settings),
        stage_seconds={stage: round(seconds, 4) for stage, seconds in case.stage_seconds.items()},
        agreement=None if segmentation.agreement is None else asdict(segmentation.agreement),
        segments=[asdict(segment) for segment in measured],
        warnings=[*case.warnings, *spec.notes],
        research_only=RESEARCH_ONLY if spec.demonstration else None,
        intended_use=spec.intended_use,
        folder=case.key,
        error=None,
    )


def _failed_document(case: Case, spec: ModelSpec, error: Mapping[str, Any]) -> dict[str, Any]:
    return series_result(
        status="refused" if isinstance(case.error, InputError) else "failed",
        series=_series_facts(case),
        model=None,
        engine=None,
        window=None,
        settings=None,
        stage_seconds=dict(case.stage_seconds),
        segments=[],
        warnings=list(case.warnings),
        research_only=RESEARCH_ONLY if spec.demonstration else None,
        intended_use=spec.intended_use,
        folder=None,
        error=error,
    )


def _settings_facts(settings: Settings) -> dict[str, Any]:
    """The settings without the cache's folder, which says something of the machine and nothing of the result."""
    return {name: value for name, value in asdict(settings).items() if name != "cache"}


def _series_facts(case: Case) -> dict[str, Any]:
    series = case.candidate.series
    return {
        "digest": series.digest,
        "series_instance_uid": series.uid,
        "slices": len(series.instances),
        "shape": list(case.shape) if case.shape else None,
        "spacing_mm": [round(mm, 6) for mm in case.spacing_mm] if case.spacing_mm else None,
    }
