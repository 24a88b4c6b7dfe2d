"""A case's stages before its result: load its volume, segment it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ctflow.core.errors import BrokenSeries
from ctflow.core.progress import Progress, silent
from ctflow.dicom.read.assemble import Assembled, Empty, assemble_series
from ctflow.dicom.write.measures import measures_from_headers
from ctflow.pipeline.case import Case, attempt
from ctflow.pipeline.segmentation import Segmentation, memory_of, timed

if TYPE_CHECKING:
    from ctflow.pipeline.segmenter import Segmenter

log = logging.getLogger(__name__)


def load_case(case: Case, progress: Progress = silent, empty: Empty = np.empty) -> Case:
    """Read the pixels of a case's series into a volume; an `InputError` becomes part of the case.

    Args:
        case: As it was found.
        progress: Receives every slice.
        empty: As of `assemble_series`.

    Returns:
        The case with its volume, or with its error.
    """

    def stage() -> Case:
        seconds: dict[str, float] = {}
        with timed(seconds, "read"):
            assembled = assemble_series(case.candidate.series, progress, allow_gaps=case.allow_gaps, empty=empty)
            with memory_of("this computer"):
                if assembled.volume.geometry.is_tilted and case.seg_grid == "resampled":
                    assembled = _without_tilt(assembled)
            _check_grid(case, assembled)
            assembled = _warned_of_readers(case, assembled)
        geometry, warnings = assembled.volume.geometry, case.warnings + assembled.warnings
        loaded = replace(case, assembled=assembled, shape=geometry.shape, spacing_mm=geometry.spacing_mm)
        return replace(loaded, warnings=warnings, stage_seconds=seconds)

    return attempt(case, stage)


def _check_grid(case: Case, assembled: Assembled) -> None:
    """Check the grid that a resampled SEG needs, now rather than after minutes of work."""
    if case.seg_grid == "resampled" and assembled.is_resampled and not assembled.volume.geometry.is_orthogonal:
        what = "its axes are not at right angles, so it fits no right-angled grid: omit --seg-grid resampled"
        raise BrokenSeries(f"series {case.candidate.series.digest}: {what}", reason="tilted")


def _without_tilt(assembled: Assembled) -> Assembled:
    """A tilted series with its tilt removed, as an orthogonal SEG needs it from here on."""
    from ctflow.transforms.tilt import untilted_volume  # noqa: PLC0415  # needs torch, which reading does not

    untilted = untilted_volume(assembled.volume)
    if untilted is None:
        return assembled
    volume, outside = untilted
    return replace(assembled, volume=volume, outside=outside)


def _warned_of_readers(case: Case, assembled: Assembled) -> Assembled:
    """Warn of readers that will misplace a SEG on these slices: nothing in the SEG would stop them."""
    if case.seg_grid == "resampled" and assembled.is_resampled:
        return assembled
    measures = measures_from_headers([instance.header for instance in assembled.instances])
    if measures is None or measures.misread is None:
        return assembled
    log.warning("series %s: %s", case.candidate.series.digest, measures.misread)
    return replace(assembled, warnings=(*assembled.warnings, measures.misread))


def segment_case(
    case: Case,
    segmenter: Segmenter,
    progress: Progress = silent,
    prepare: Callable[[Case], Case] | None = None,
) -> Case:
    """Segment a loaded case, and prepare its result meanwhile; a named error becomes part of the case.

    Args:
        case: With its volume, or with the error that ended it.
        segmenter: Open.
        progress: Receives every window.
        prepare: Instead of `prepare_result`, if another process does that.

    Returns:
        The case with its segmentation, or with its error.
    """

    def stage() -> Case:
        ready: list[Case] = []
        segmentation, seconds = segmenter.segment(
            case.loaded.volume, progress, meanwhile=lambda: ready.append((prepare or prepare_result)(case))
        )
        return with_segmentation(ready[0], segmentation, seconds, segmenter.warnings + segmentation.warnings)

    return attempt(case, stage)


def prepare_result(case: Case) -> Case:
    """Prepare the parts of a loaded case's result that do not depend on the mask, while a GPU computes it."""
    # Late: highdicom, which no window need wait for.
    from ctflow.dicom.write.source import sources_from_headers  # noqa: PLC0415

    part = case.candidate.series.part
    headers = [instance.header for instance in case.loaded.instances]
    sources = sources_from_headers(headers, part=part.label if part else "")
    if not (case.seg_grid == "resampled" and case.loaded.is_resampled):
        _ = sources.planes  # kept there; longer than what remains of a binary SEG, and others need the same tables
    return replace(case, sources=sources, warnings=case.warnings + sources.warnings)


def with_segmentation(
    case: Case, segmentation: Segmentation, seconds: Mapping[str, float], warnings: tuple[str, ...]
) -> Case:
    """A case with its segmentation, whose marks are cleared where there is no image: they are not findings."""
    outside = case.loaded.outside
    if outside is not None:
        segmentation.labels[outside] = 0
        if segmentation.fractions is not None:
            segmentation.fractions[:, outside] = 0
    return replace(
        case,
        segmentation=segmentation,
        body=segmentation.body,
        stage_seconds={**case.stage_seconds, **seconds},
        warnings=case.warnings + warnings,
    )
