"""A case's stages before its result: load its volume, segment it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ctflow.core.errors import BrokenSeries
from ctflow.core.progress import Progress, silent
from ctflow.dicom.read.assemble import Assembled, assemble_series
from ctflow.dicom.write.measures import measures_from_headers
from ctflow.dicom.write.segmentation import read_standard
from ctflow.dicom.write.source import sources_from_headers
from ctflow.pipeline.case import Case, attempt
from ctflow.pipeline.segmentation import Segmentation, memory_of, timed

if TYPE_CHECKING:
    from ctflow.pipeline.segmenter import Segmenter

log = logging.getLogger(__name__)


def load_case(case: Case, progress: Progress = silent) -> Case:
    """Read the pixels of a case's series into a volume; an `InputError` becomes part of the case."""

    def stage() -> Case:
        seconds: dict[str, float] = {}
        with timed(seconds, "read"):
            assembled = assemble_series(case.candidate.series, progress, allow_gaps=case.allow_gaps)
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

    return attempt(case, stage)


def prepare_result(case: Case) -> Case:
    """Prepare the parts of a loaded case's result that do not depend on the mask, while a GPU computes it."""
    from ctflow.window.find_body import body_of_volume  # noqa: PLC0415  # needs torch, which reading does not

    sources = sources_from_headers([instance.header for instance in case.loaded.instances])
    read_standard(sources)
    body = body_of_volume(case.loaded.volume)
    return replace(case, sources=sources, body=body, warnings=case.warnings + sources.warnings)


def _clear(segmentation: Segmentation, outside: npt.NDArray[np.bool_] | None) -> None:
    """Clear the marks where there is no image: they are not findings."""
    if outside is None:
        return
    segmentation.labels[outside] = 0
    if segmentation.fractions is not None:
        segmentation.fractions[:, outside] = 0
