"""Where a cohort's results go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ctflow.cohort.outcome import MarkName, RowName, RowOutcome


class RowDestination(Protocol):
    """Gets each row's result whole, or not at all.

    A result is what `ctflow run` writes to its output folder. It counts once its commit marker is there, which is
    written last. Names follow from rows alone: a row that is computed twice replaces its own result, with an equal one.
    Several processes write to one destination, each with its own rows; methods are called from several threads.
    """

    def __enter__(self) -> RowDestination:
        """Make sure that it can be written, and remove what killed processes have left."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove what is not committed."""

    def hurry(self) -> None:
        """The run ends: wait for nothing any longer, and raise instead."""

    def agree(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keep what all its results have in common, unless another process was first; return what is kept."""

    def marks(self) -> Iterator[MarkName]:
        """The commit markers that are there, by listing names only."""

    def begin(self, name: RowName) -> None:
        """Note that an attempt at a row begins; a killed process leaves the note."""

    def end(self, name: RowName) -> None:
        """Remove the note."""

    def begun(self) -> Mapping[RowName, int]:
        """How often an attempt at a row began and did not end: none is under way in another process of this share."""

    def workspace(self, row_id: str) -> Path:
        """A new, empty folder of this machine, for the row's result."""

    def discard(self, folder: Path) -> None:
        """Remove a workspace."""

    def commit(self, folder: Path, outcome: RowOutcome, earlier: Iterable[MarkName] = ()) -> None:
        """Put a workspace's content in the place of the row's result, and then its marker.

        A better result of the same row stays, and so does an equal one of another process (`outcome.is_kept`).

        Args:
            folder: The workspace; it is gone afterwards.
            outcome: The marker's content.
            earlier: Markers of the row's earlier result. They go first, so that none speaks of a result that has gone.

        Raises:
            StoreFailed: Reason "store-refused" says that it does not take this result, but may take others.
            OutputError: It cannot be written.
        """

    def read(self, name: str) -> bytes | None:
        """A file's content; works without entering the destination.

        Args:
            name: "rows/<marker>", "results/<id>/<a file of the result>", or "cohort.json" for what all have in common.

        Returns:
            None if there is none, or the destination does not give it back.
        """

    def keep(self, file: Path, name: str) -> None:
        """Put a file beside the results, such as "cohort.html", whole or not at all; works without entering."""
