"""One attempt at a row: find its series, check it, and say what became of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ctflow.cohort.locations.fetch import discard_fetched, fetch_series
from ctflow.cohort.locations.folders import INDEXES
from ctflow.cohort.locations.location import folder_of_location
from ctflow.cohort.manifest.digest import digest_of_objects, digest_of_series
from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.outcome import MarkName, RowName, RowOutcome, RowStatus
from ctflow.cohort.shares.found import row_findings_from_documents, row_segments_from_documents, stage_seconds_of
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import BackendUnavailable, BrokenSeries, CtflowError, InputError, NoUsableSeries
from ctflow.core.model import ModelSpec
from ctflow.core.progress import silent
from ctflow.dicom.attributes import text
from ctflow.dicom.read.select.selection import require_selected
from ctflow.pipeline.case import Case, Found, look_for_cases
from ctflow.pipeline.documents import document_of_run
from ctflow.pipeline.overlap.finding import CaseFinder, LookResult
from ctflow.pipeline.run import finish_run
from ctflow.report.result import write_result
from ctflow.report.run_record import document_of_error, error_facts
from ctflow.settings.run import Settings

MOST_ATTEMPTS = 3
# Of the input, but a file server that is slow to answer may be the cause: such a row is tried again.
_MAY_PASS = frozenset(
    {
        "folder-unreadable",
        "location-absent",
        "location-denied",
        "location-down",
        "no-dicom",
        "not-a-folder",
        "other-content",
        "unreadable",
    }
)
_LOST = "files could not be read or continue the series elsewhere: result.json lists them"

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RowAttempt:
    """An attempt; its cases end in any order, in two threads.

    Attributes:
        row: The row.
        number: From 1.
        is_alone: Whether no other row may be under way: an earlier attempt ended with its process.
        earlier: Markers of the row's earlier result.
        folder: The workspace, once begun.
        found: The series, once found.
        error: Why none may be segmented.
    """

    row: CohortRow
    number: int = 1
    is_alone: bool = False
    earlier: tuple[MarkName, ...] = ()
    folder: Path = Path()
    found: Found | None = None
    error: CtflowError | None = None
    _started: float = 0.0
    _fetched: Path | None = None
    _done: dict[int, Case] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(
        self, folder: Path, base: Path, spec: ModelSpec, settings: Settings, finder: CaseFinder | None = None
    ) -> Sequence[Case]:
        """Find the row's series; none, with `error` set, if it cannot be segmented.

        Args:
            folder: The workspace.
            base: The manifest's folder.
            spec: The model's.
            settings: The run's.
            finder: Reads the headers; None reads them in this process.
        """
        self.folder, self._started = folder, time.monotonic()
        row = self.row
        if self.number > MOST_ATTEMPTS:
            self.error = BackendUnavailable(
                f"row {row.id}: the process that computes was killed at every attempt: free memory, and retry it",
                reason="worker-ended",
            )
            return ()
        asked = replace(settings, series=row.series or None, volume=row.volume or settings.volume)
        try:
            source, paths = self._files_of_series(base)
            look = partial(_find_row, row, source, paths, spec.body_parts, asked)
            self.found, self.error = look() if finder is None else finder.find(look)
        except CtflowError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001  # a fault in one row must not end the others
            self.error = unexpected(error, f"row {row.id}")
        return () if self.error is not None or self.found is None else self.found.cases

    def _files_of_series(self, base: Path) -> tuple[Path, Sequence[Path] | None]:
        """The folder, and its files to read if these are not all."""
        folder = folder_of_location(self.row.location, base)
        if folder is None:
            self._fetched = fetch_series(self.row.location, f"row {self.row.id}")
            return self._fetched, None
        if not self.row.series:
            return folder, None
        return folder, INDEXES.files(folder, self.row.series, is_fresh=self.number > 1)

    def release(self) -> None:
        """Remove what was fetched: the attempt has ended."""
        if self._fetched is not None:
            discard_fetched(self._fetched)

    def take(self, place: int, case: Case) -> bool:
        """Take a finished case; whether it was the last one."""
        with self._lock:
            self._done[place] = case
            return self.found is not None and len(self._done) == len(self.found.cases)

    def refuse(self, folder: Path, error: CtflowError) -> None:
        """The destination does not take the result: the row has failed, with an empty workspace."""
        self.folder, self.error = folder, error
        self._done.clear()

    @property
    def name(self) -> RowName:
        """The row's."""
        return self.row.id, self.row.fingerprint

    @property
    def cases(self) -> tuple[Case, ...]:
        """The finished cases, in their order."""
        return tuple(self._done[place] for place in sorted(self._done))

    @property
    def errors(self) -> tuple[CtflowError, ...]:
        """Why the row, or volumes of it, are not done."""
        return (self.error,) if self.error else tuple(case.error for case in self.cases if case.error)

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may have another outcome."""
        return any(not isinstance(error, InputError) or error.reason in _MAY_PASS for error in self.errors)

    def next(self) -> RowAttempt:
        """The next attempt at the row."""
        return RowAttempt(self.row, self.number + 1, self.is_alone, self.earlier)

    def concluded(self, spec: ModelSpec, stamp: RowOutcome) -> RowOutcome:
        """Complete the workspace with the run's result.json, and say what became of the row.

        Args:
            spec: The model's.
            stamp: What the outcomes of all rows have in common.

        Raises:
            OutputError: The workspace cannot be written.
        """
        code = self._write_document(spec)
        documents = [case.document for case in self.cases if case.error is None and case.document is not None]
        status, reason, message = self._verdict(code)
        return replace(
            stamp,
            id=self.row.id,
            fingerprint=self.row.fingerprint,
            status=status,
            reason=reason,
            message=message,
            exit_code=code,
            attempt=min(self.number, MOST_ATTEMPTS),
            seconds=round(time.monotonic() - self._started, 3),
            digest=digest_of_objects(self.folder),
            input_digest=self.row.digest,
            folders=tuple(case.key for case in self.cases if case.error is None),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            segments=row_segments_from_documents(documents),
            findings=row_findings_from_documents(documents),
            stage_seconds=stage_seconds_of(documents),
        )

    def _write_document(self, spec: ModelSpec) -> int:
        if self.error is None and self.found is not None:
            return finish_run(self.cases, self.found, spec, self.folder).exit_code
        facts = error_facts(self.error or NoUsableSeries("nothing was found", reason="no-dicom"))
        found = self.found
        document = document_of_run((), found, spec, self.folder, facts) if found else document_of_error(facts)
        write_result(document, self.folder / "result.json")
        return int(facts["exit_code"])

    def _verdict(self, code: int) -> tuple[RowStatus, str, str]:
        errors = self.errors
        if not errors:
            return ("done", "done", "") if code == 0 else ("partly", "unreadable-files", _LOST)
        if len(errors) < len(self.cases):
            status: RowStatus = "partly"
        else:
            status = "failed" if self.may_pass else "rejected"
        return status, errors[0].reason, str(errors[0])


def _find_row(
    row: CohortRow, source: Path, paths: Sequence[Path] | None, body_parts: tuple[str, ...], settings: Settings
) -> LookResult:
    """The row's series, and why it cannot be segmented."""
    found: Found | None = None
    try:
        found = look_for_cases(source, body_parts, settings, silent, paths)
        require_selected(found.selection, found.scan)
        _check_one_series(row, found)
        _check_digest(row, found)
    except CtflowError as error:
        return found, error
    except Exception as error:  # noqa: BLE001  # a fault in one row must not end the others
        return found, unexpected(error, f"row {row.id}")
    return found, None


def _check_one_series(row: CohortRow, found: Found) -> None:
    if len({(case.candidate.series.study_uid, case.candidate.series.uid) for case in found.cases}) > 1:
        raise NoUsableSeries(
            f"row {row.id}: its location contains several eligible series: name one in the column series",
            reason="several-series",
        )


def _check_digest(row: CohortRow, found: Found) -> None:
    if not row.digest:
        return
    series = found.cases[0].candidate.series
    own = [
        each
        for each in found.scan.instances
        if text(each.header, "SeriesInstanceUID") == series.uid
        and text(each.header, "StudyInstanceUID") == series.study_uid
    ]
    try:
        digest = digest_of_series(own)
    except OSError as error:
        what = f"row {row.id}: a file cannot be read for its digest ({error.strerror})"
        raise BrokenSeries(what, reason="unreadable") from error
    if digest != row.digest:
        raise BrokenSeries(
            f"row {row.id}: its files are others than the manifest's digest was made of: have the series sent again, or"
            " make the manifest anew",
            reason="other-content",
        )
