"""A case's result folder: SEG, measurement report, preview, report.html and more; whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from ctflow import __version__
from ctflow.core.atomic import publish_folder, temporary_folder
from ctflow.core.errors import counted
from ctflow.core.model import Model, ModelSpec, Segment
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import LabelArray
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.measurement_report import report_from_measurements
from ctflow.dicom.write.rendered.encapsulated_pdf import encapsulated_pdf_from_bytes
from ctflow.dicom.write.rendered.secondary_capture import secondary_capture_from_picture
from ctflow.dicom.write.segmentation import SegForm, segmentation_from_labels
from ctflow.engines.contract import COSTS
from ctflow.measurements.measure import SegmentMeasurements, count_findings_between, measure_segments, split_findings
from ctflow.measurements.plausibility import Checks, note_of_findings, place_to_show, warnings_of_findings
from ctflow.pipeline.case import Case, attempt, without_arrays
from ctflow.pipeline.documents import document_of_case
from ctflow.pipeline.nifti import write_nifti
from ctflow.pipeline.segmentation import timed
from ctflow.report.html_report import write_html_report
from ctflow.report.preview import draw_preview, write_picture
from ctflow.report.result import write_result
from ctflow.report.run_record import supersede_result
from ctflow.report.views import Oriented, oriented_from_volume
from ctflow.settings.run import Settings

log = logging.getLogger(__name__)


_COLUMNS = "Orthanc serves no frames of a binary SEG whose Columns, here {}, are not a multiple of 8"
_PARTIAL_BYTES = ", and OHIF 3.13 shifts or rejects frames that do not fill whole bytes, as {} x {} pixels"
_INSTEAD = "; --seg labelmap writes one that both read right"
_OWN_GRID = (
    "the SEG lies on a grid of its own (--seg-grid resampled), for readers of regular stacks: 3D Slicer, dcmqi, ITK,"
    " highdicom; OHIF shows at most its frames in the images' planes, and 3.11 and 3.12 may never finish loading it:"
    " for OHIF use --seg-grid source"
)
_RESAMPLED = "The slices were resampled to {}; lengths, volumes and HU are of the resampled volume."


def write_case(case: Case, model: Model, settings: Settings, output: Path, progress: Progress = silent) -> Case:
    """Write a segmented case's folder: complete under its final name, or not at all.

    After an error, in this or an earlier stage, the folder of an earlier run is moved aside.
    """
    case = attempt(case, lambda: _write(case, model, settings, output, progress))
    return case if case.error is None else superseded(case, output)


def superseded(case: Case, output: Path) -> Case:
    """A failed case; the folder of an earlier run is moved aside."""
    remark, _ = supersede_result(output, case.key, case.candidate.series.digest)
    return replace(case, warnings=(*case.warnings, remark)) if remark else case


def _write(case: Case, model: Model, settings: Settings, output: Path, progress: Progress) -> Case:
    """Write the SEG and what refers to it, while a thread measures and draws; a stage's seconds are what this waits."""
    progress("write", 0, 1)
    seconds: dict[str, float] = {}
    digest = case.candidate.series.digest
    unsuited = _warnings_of_viewers(case, settings)
    for warning in unsuited:
        log.warning("series %s: %s", digest, warning)
    case = replace(case, warnings=(*case.warnings, *unsuited))
    checks = Checks(case.loaded.volume, case.body.count_in_runs if case.body else None)
    with temporary_folder(output, case.key) as folder, _beside() as thread:
        measuring = thread.submit(_measured, case, model.spec, checks)
        drawing = thread.submit(lambda: _drawn(case, model.spec, measuring.result(), folder))
        report = thread.submit(lambda: _report(measuring.result(), drawing.result(), model, settings, folder))
        with timed(seconds, "seg"):
            seg = _write_segmentation(case, model, settings, checks, folder)
        with timed(seconds, "measure"):
            measured = measuring.result()
        for doubt in measured.doubts:
            log.warning("series %s: %s", digest, doubt)
        with timed(seconds, "write"):
            measurements, notes = _write_objects(case, seg, model.spec, settings, measured, folder)
        for note in notes:
            log.warning("series %s: %s", digest, note)
        with timed(seconds, "preview"):
            drawn = drawing.result()
            if settings.secondary_capture:
                _write_capture(case, seg, model.spec, drawn.picture, folder)
        with timed(seconds, "report"):
            pdf = report.result()
            if pdf is not None:
                _write_pdf(case, seg, model.spec, measurements, pdf, folder)
        warnings = (*measured.case.warnings, *notes)
        case = replace(measured.case, warnings=warnings, stage_seconds={**case.stage_seconds, **seconds})
        document = document_of_case(case, model, settings, measured.segments)
        write_result(document, folder / "result.json")
        publish_folder(folder, output / case.key)
    progress("write", 1, 1)
    log.info("series %s: done in %.1f s", digest, sum(case.stage_seconds.values()))
    return without_arrays(replace(case, folder=output / case.key, document=document))


@contextmanager
def _beside() -> Iterator[ThreadPoolExecutor]:
    """A thread that works beside this one; what it has not begun when an error comes is not done."""
    thread = ThreadPoolExecutor(1, "beside the SEG")
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


@dataclass(frozen=True, eq=False)
class _Findings:
    """A case's measurements.

    Attributes:
        case: With the warnings of its measurements.
        segments: The measurements.
        doubts: Warnings about findings.
        remarks: These, and notes on the grid.
    """

    case: Case
    segments: tuple[SegmentMeasurements, ...]
    doubts: tuple[str, ...]
    remarks: tuple[str, ...]


def _measured(case: Case, spec: ModelSpec, checks: Checks) -> _Findings:
    measured = measure_segments(case.segmented.labels, checks.volume, spec.segments, checks.count_in_body)
    doubts = warnings_of_findings(measured, checks)
    remarks = (*doubts, *_remarks_on_grid(case, spec))
    return _Findings(replace(case, warnings=(*case.warnings, *remarks)), measured, doubts, remarks)


@dataclass(frozen=True, eq=False)
class _Preview:
    """A case's preview, and the views from which it was drawn."""

    oriented: Oriented
    picture: npt.NDArray[np.uint8]


def _drawn(case: Case, spec: ModelSpec, measured: _Findings, folder: Path) -> _Preview:
    """Draw and write the preview."""
    place = place_to_show(measured.segments)
    oriented = oriented_from_volume(case.loaded.volume, case.segmented.labels, place)
    picture = _picture(oriented, spec, note_of_findings(measured.segments))
    write_picture(picture, folder / "preview.png")
    return _Preview(oriented, picture)


def _report(measured: _Findings, drawn: _Preview, model: Model, settings: Settings, folder: Path) -> bytes | None:
    """Write the report and return it as a PDF, if either is wanted."""
    if settings.report != "html" and not settings.pdf:
        return None
    document = document_of_case(measured.case, model, settings, measured.segments)
    if settings.report == "html":
        write_html_report(drawn.oriented, document, folder / "report.html")
    if not settings.pdf:
        return None
    from ctflow.report.pdf.pages import pdf_from_document  # noqa: PLC0415  # few runs need it

    return pdf_from_document(document, drawn.picture)


def _remarks_on_grid(case: Case, spec: ModelSpec) -> tuple[str, ...]:
    """Notes on measurements on another grid than the slices' own, and on what the SEG lacks because of it."""
    if not case.loaded.is_resampled:
        return ()
    resampled = _RESAMPLED.format("equal distances" if case.loaded.outside is None else "right angles")
    if case.seg_grid == "resampled":
        return (resampled, "The SEG lies on that volume's grid and not on the slices.")
    lost = count_findings_between(case.segmented.labels, case.loaded.slices, spec.segments)
    lie = counted(lost, "finding lies", "findings lie")
    between = f"{lie} between the slices that there are: measured, but not in the SEG"
    return (resampled, f"{between} (--seg-grid resampled writes them)") if lost else (resampled,)


def _warnings_of_viewers(case: Case, settings: Settings) -> tuple[str, ...]:
    """A sentence for each form of a SEG that some viewer misreads (docs/viewers.md): nothing in it would stop them."""
    own_grid = case.loaded.is_resampled and case.seg_grid == "resampled"
    rows, columns = case.loaded.volume.array.shape[1:] if own_grid else _size_of_images(case)
    found = []
    if settings.seg == "binary" and columns % 8:
        found.append(
            _COLUMNS.format(columns) + _PARTIAL_BYTES.format(rows, columns) * bool(rows * columns % 8) + _INSTEAD
        )
    if own_grid:
        found.append(_OWN_GRID)
    return tuple(found)


def _size_of_images(case: Case) -> tuple[int, int]:
    header = case.loaded.instances[0].header
    return int(header.Rows), int(header.Columns)


@dataclass(frozen=True, eq=False)
class _Seg:
    """A case's SEG, its labels and their meaning, and the algorithm that made them."""

    dataset: Dataset
    marked: LabelArray
    segments: tuple[Segment, ...]
    provenance: Provenance


def _write_segmentation(case: Case, model: Model, settings: Settings, checks: Checks, folder: Path) -> _Seg:
    """Write the SEG, before everything that refers to it."""
    engine, spec = case.segmented.engine, model.spec
    provenance = Provenance(
        ctflow_version=__version__,
        weights_digest=model.weights_digest,
        settings={
            **({"instances": case.replaced} if case.replaced else {}),  # else UIDs would be those of the earlier result
            "backend": engine.backend,
            "precision": engine.precision,
            **({"precision_cost": COSTS[engine.precision]} if engine.precision in COSTS else {}),
            **_flat(case.segmented.window),
            **_code(spec),
        },
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


def _code(spec: ModelSpec) -> dict[str, str]:
    return {} if spec.own_code is None else {"own_code_sha256": spec.own_code.digest}


def _write_objects(
    case: Case, seg: _Seg, spec: ModelSpec, settings: Settings, measured: _Findings, folder: Path
) -> tuple[Dataset, tuple[str, ...]]:
    """Write the measurement report that refers to the SEG, and other forms of the mask if requested.

    Returns:
        The report, and what the other forms lack.
    """
    notes: tuple[str, ...] = ()
    report = report_from_measurements(
        measured.segments,
        seg.dataset,
        case.prepared,
        spec,
        seg.provenance,
        marked_as=seg.segments,
        remarks=measured.remarks,
        previous=case.previous,
    )
    write_dataset(report, folder / "measurements.dcm")
    if settings.rtstruct:
        from ctflow.pipeline.structures import structure_set_of_case  # noqa: PLC0415  # shapely is for contours alone

        structures, remark = structure_set_of_case(case, seg.marked, seg.segments, spec, seg.provenance, settings)
        write_dataset(structures, folder / "structures.dcm")
        notes = (f"structures.dcm: {remark[:-1]}",) if remark else ()
    if settings.nifti:
        write_nifti(seg.marked, case.loaded.volume.geometry, folder / "segmentation.nii.gz")
    return report, notes


def _write_capture(case: Case, seg: _Seg, spec: ModelSpec, picture: npt.NDArray[np.uint8], folder: Path) -> None:
    capture = secondary_capture_from_picture(picture, seg.dataset, case.prepared, spec, seg.provenance)
    write_dataset(capture, folder / "secondary_capture.dcm")


def _write_pdf(case: Case, seg: _Seg, spec: ModelSpec, measurements: Dataset, pdf: bytes, folder: Path) -> None:
    objects = (seg.dataset, measurements)
    report = encapsulated_pdf_from_bytes(pdf, objects, case.prepared, spec, seg.provenance)
    write_dataset(report, folder / "report.dcm")


def _flat(window: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The window settings that change a result; the batch size, which depends on the machine, and counts do not."""
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
