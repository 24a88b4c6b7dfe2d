"""A DICOMweb server as a destination: it gets the DICOM objects, and a journal beside it everything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.destinations.objects import PATIENCE_S, output_error_from_fault
from ctflow.cohort.outcome import MarkName, RowName, RowOutcome
from ctflow.cohort.stores.dicomweb import DicomWeb
from ctflow.cohort.stores.patience import Patience, StoreFault


class StowDestination:
    """A DICOMweb server (STOW-RS) and a journal: a server keeps objects, but has no place for markers.

    A row's objects are stored first; once the server has confirmed each of them, the journal gets the rest of the
    result and the marker. UIDs follow from the content: objects of a row that is computed twice are the same objects.
    The server keeps what an earlier result of a changed row had, under its own UIDs.

    Args:
        url: As of `DicomWeb`.
        journal: Gets markers, notes, and the files that are not DICOM; not entered.
        patience_s: How long a request is repeated while the server fails.
    """

    def __init__(self, url: str, journal: RowDestination, patience_s: float = PATIENCE_S) -> None:
        self._patience = Patience(patience_s)
        self._server = DicomWeb(url, self._patience)
        self._journal = journal

    def __enter__(self) -> StowDestination:
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, traceback)
        self._journal.__exit__(kind, error, traceback)

    def hurry(self) -> None:
        """As `RowDestination.hurry`."""
        self._patience.hurry()
        self._journal.hurry()

    def agree(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `RowDestination.agree`."""
        return self._journal.agree(document)

    def marks(self) -> Iterator[MarkName]:
        """As `RowDestination.marks`."""
        return self._journal.marks()

    def begin(self, name: RowName) -> None:
        """As `RowDestination.begin`."""
        self._journal.begin(name)

    def end(self, name: RowName) -> None:
        """As `RowDestination.end`."""
        self._journal.end(name)

    def begun(self) -> Mapping[RowName, int]:
        """As `RowDestination.begun`."""
        return self._journal.begun()

    def workspace(self, row_id: str) -> Path:
        """As `RowDestination.workspace`."""
        return self._journal.workspace(row_id)

    def discard(self, folder: Path) -> None:
        """As `RowDestination.discard`."""
        self._journal.discard(folder)

    def commit(self, folder: Path, outcome: RowOutcome, earlier: Iterable[MarkName] = ()) -> None:
        """As `RowDestination.commit`."""
        objects = sorted(folder.rglob("*.dcm"))
        try:
            self._server.store(objects)
        except StoreFault as fault:
            raise output_error_from_fault(fault, f"the result of row {outcome.id}") from fault
        for path in objects:
            path.unlink()
        self._journal.commit(folder, outcome, earlier)

    def read(self, name: str) -> bytes | None:
        """As `RowDestination.read`."""
        return self._journal.read(name)

    def keep(self, file: Path, name: str) -> None:
        """As `RowDestination.keep`."""
        self._journal.keep(file, name)
