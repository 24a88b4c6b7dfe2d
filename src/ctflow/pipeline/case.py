"""A case: one series in the pipeline, and the cases of a folder; an error ends only its own case."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydicom.dataset import Dataset

from ctflow.core.entry_point import unexpected
from ctflow.core.errors import CtflowError, DeviceOutOfMemory
from ctflow.core.model import ModelSpec
from ctflow.core.progress import Progress, silent, startup
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.read.assemble import Assembled
from ctflow.dicom.read.scan import Scan, scan_folder
from ctflow.dicom.read.select.selection import require_selected, select_series
from ctflow.dicom.read.select.series import Candidate, Selection, Series
from ctflow.pipeline.segmentation import Segmentation
from ctflow.settings.run import SegGrid, Settings
from ctflow.window.body import Body

if TYPE_CHECKING:
    from ctflow.dicom.write.source import Sources

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Case:
    """One series in the pipeline; each stage returns a copy with more fields set.

    Attributes:
        candidate: The series, as it was selected.
        key: Name of its result folder.
        allow_gaps: Whether single missing slices are interpolated.
        seg_grid: Whether the SEG is on the slices, or on the grid to which a tilted or uneven series was resampled.
        assembled: Its volume, from `load_case` until the case is written or fails.
        shape: The volume's, once loaded.
        spacing_mm: The volume's, once loaded.
        sources: Header values for the result's objects, once prepared.
        segmentation: The model's result, once segmented.
        error: Why it stopped.
        folder: Folder of its result, once written.
        document: The content of its result.json.
        warnings: Warnings for the reader.
        stage_seconds: What the case waited for each stage.
        body: Position of the body, once prepared; None if none was found.
        previous: Measurement reports that this case's replaces, from before instances came late.
        replaced: Digest of its instances where some have another content than an earlier one of their UID; else "".
        packed: The same case as bytes, for the process that reads it, if the headers are not in this one.
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
    replaced: str = ""
    packed: bytes | None = None

    @property
    def whole(self) -> Case:
        """The case with its headers."""
        return self if self.packed is None else cast("Case", pickle.loads(self.packed))  # noqa: S301  # our own process's

    @property
    def loaded(self) -> Assembled:
        """The volume; a ValueError before `load_case`, and once written or failed."""
        if self.assembled is None:
            raise ValueError("the case holds no volume: load it first")
        return self.assembled

    @property
    def prepared(self) -> Sources:
        """Header values for objects; a ValueError before `prepare_result`, and once written or failed."""
        if self.sources is None:
            raise ValueError("the case's result is not prepared: segment it first")
        return self.sources

    @property
    def segmented(self) -> Segmentation:
        """The model's result; a ValueError before `segment_case`, and once written or failed."""
        if self.segmentation is None:
            raise ValueError("the case holds no segmentation: segment it first")
        return self.segmentation


@dataclass(frozen=True, eq=False)
class Found:
    """The contents of a folder: the cases to run, every file, and the verdict on every series."""

    cases: tuple[Case, ...]
    scan: Scan
    selection: Selection


def find_cases(folder: Path, spec: ModelSpec, settings: Settings, progress: Progress = silent) -> Found:
    """Find the series to run.

    Args:
        folder: Input folder, searched with all its subfolders.
        spec: Its body parts affect the choice.
        settings: Series, pick and force.
        progress: Receives every file.

    Returns:
        A case for each selected series, and everything else that was found.

    Raises:
        NoUsableSeries: No series may run.
    """
    found = look_for_cases(folder, spec.body_parts, settings, progress)
    require_selected(found.selection, found.scan)
    return found


def look_for_cases(
    folder: Path,
    body_parts: tuple[str, ...],
    settings: Settings,
    progress: Progress = silent,
    paths: Sequence[Path] | None = None,
) -> Found:
    """As `find_cases`, even if no series may run: a run that ends there gives the reason for each.

    `paths` are the files to read, if not all of the folder's.
    """
    startup.lap("imports")
    scan = scan_folder(folder, progress, paths=paths)
    selection = select_series(
        scan,
        series_uid=settings.series,
        pick=settings.pick,
        force=settings.force,
        body_parts=body_parts,
        volume=settings.volume,
    )
    for candidate in selection.candidates:
        log.info("series %s: %s (%s)", candidate.series.digest, candidate.message, candidate.reason)
    startup.lap("scan")
    cases = [case_from_candidate(each, key_of_series(each.series), settings) for each in selection.selected]
    return Found(tuple(cases), scan, selection)


def case_from_candidate(candidate: Candidate, key: str, settings: Settings) -> Case:
    """A case to run, with the warnings of its selection; `key` names its result folder."""
    warnings = (*candidate.series.dropped, *((candidate.message,) if candidate.forced else ()))
    return Case(candidate, key, settings.allow_gaps, settings.seg_grid, warnings=warnings)


def key_of_series(series: Series) -> str:
    """Name of a series' result folder: its UID, or the UID's digest if it is not a safe name, and its study's digest.

    The name of a volume follows, if the series holds several.

    It does not depend on the other input: two studies may hold series with the same UID, today or tomorrow.
    """
    uid = series.uid
    safe = 1 <= len(uid) <= 64 and set(uid) <= set("0123456789.")
    key = f"{uid if safe else digest_of_uid(uid)}-{digest_of_uid(series.study_uid)}"
    return f"{key}-{series.part.name}" if series.part else key


def attempt(case: Case, stage: Callable[[], Case]) -> Case:
    """Run a stage unless an earlier one failed; any exception becomes a named error of the case."""
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
    except Exception as error:  # noqa: BLE001  # a fault in one series must not end the others
        failure = unexpected(error, f"series {case.candidate.series.digest}")
        log.error("%s", failure.described)  # noqa: TRY400  # `unexpected` logs the traceback
        failure.__cause__ = error
        return _failed(case, failure)


def _failed(case: Case, error: CtflowError) -> Case:
    """The case with its error, both without arrays: a run keeps its cases, and the next one needs the memory."""
    waiting: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while waiting:
        link = waiting.pop()
        if link is not None and link not in seen:
            seen.append(link)
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None  # its frames hold their callers, with the case as it was
            waiting += [link.__cause__, link.__context__]
    return without_arrays(replace(case, error=error))


def without_arrays(case: Case) -> Case:
    """The case without arrays, so that many can be kept."""
    return replace(case, assembled=None, sources=None, segmentation=None, body=None, packed=None)
