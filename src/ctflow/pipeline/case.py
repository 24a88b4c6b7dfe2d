"""A case: one series on its way, and the cases of a folder; an error ends its own case only."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydicom.dataset import Dataset

from ctflow.core.entry_point import unexpected
from ctflow.core.errors import CtflowError, DeviceOutOfMemory
from ctflow.core.model import ModelSpec
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.read.assemble import Assembled
from ctflow.dicom.read.scan import Scan, scan_folder
from ctflow.dicom.read.select.selection import require_selected, select_series
from ctflow.dicom.read.select.series import Candidate, Selection, Series
from ctflow.dicom.write.source import Sources
from ctflow.pipeline.segmenter import Segmentation
from ctflow.settings.run import SegGrid, Settings
from ctflow.window.body import Body

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Case:
    """One series on its way; each stage returns a copy that knows more.

    Attributes:
        candidate: The series, as it was selected.
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


def find_cases(folder: Path, spec: ModelSpec, settings: Settings, progress: Progress = silent) -> Found:
    """Find the series that are to be run.

    Args:
        folder: Input folder, searched with all its subfolders.
        spec: Its body parts take part in the choice.
        settings: Series, pick and force.
        progress: Told of every file.

    Returns:
        A case for each selected series, and everything else that was found.

    Raises:
        NoUsableSeries: No series may be run.
    """
    found = look_for_cases(folder, spec, settings, progress)
    require_selected(found.selection, found.scan)
    return found


def look_for_cases(folder: Path, spec: ModelSpec, settings: Settings, progress: Progress = silent) -> Found:
    """As `find_cases`, also where no series may be run: a run that ends there says why of each."""
    scan = scan_folder(folder, progress)
    selection = select_series(
        scan, series_uid=settings.series, pick=settings.pick, force=settings.force, body_parts=spec.body_parts
    )
    for candidate in selection.candidates:
        log.info("series %s: %s (%s)", candidate.series.digest, candidate.message, candidate.reason)
    cases = [case_from_candidate(each, key_of_series(each.series), settings) for each in selection.selected]
    return Found(tuple(cases), scan, selection)


def case_from_candidate(candidate: Candidate, key: str, settings: Settings) -> Case:
    """A case to run, with what its choice gives a person to know; `key` names its result folder."""
    warnings = (*candidate.series.dropped, *((candidate.message,) if candidate.forced else ()))
    return Case(candidate, key, settings.allow_gaps, settings.seg_grid, warnings=warnings)


def key_of_series(series: Series) -> str:
    """Name of a series' result folder: its UID, or that one's digest where it is no safe name, and its study's digest.

    It says nothing of what else is in the input: there may be series of the same UID in two studies, today or tomorrow.
    """
    uid = series.uid
    safe = 1 <= len(uid) <= 64 and set(uid) <= set("0123456789.")
    return f"{uid if safe else digest_of_uid(uid)}-{digest_of_uid(series.study_uid)}"


def attempt(case: Case, stage: Callable[[], Case]) -> Case:
    """Run a stage unless an earlier one failed; whatever it raises becomes, with a name, part of the case."""
    if case.error is not None:
        return case
    try:
        return stage()
    except CtflowError as error:
        log.error("%s", error.described)  # noqa: TRY400  # named: no traceback needed
        return _failed(case, error)
    except MemoryError as error:
        # Rows, Columns or spacing may be absurd, or the machine small; other series may still fit.
        digest = case.candidate.series.digest
        too_large = DeviceOutOfMemory(f"series {digest}: this computer has too little memory for it")
        log.error("%s", too_large.described)  # noqa: TRY400
        too_large.__cause__ = error
        return _failed(case, too_large)
    except Exception as error:  # noqa: BLE001  # no fault that one series meets may take the others with it
        failure = unexpected(error, f"series {case.candidate.series.digest}")
        log.error("%s", failure.described)  # noqa: TRY400  # `unexpected` logs the traceback
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
    return without_arrays(replace(case, error=error))


def without_arrays(case: Case) -> Case:
    """What a folder of many series may pile up."""
    return replace(case, assembled=None, sources=None, segmentation=None, body=None)
