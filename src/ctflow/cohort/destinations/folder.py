"""A folder as a destination: results are renamed into place, markers are small files of a folder of their own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ctflow.cohort.destinations.work import WorkFolder
from ctflow.cohort.outcome import MarkName, RowName, RowOutcome, is_kept
from ctflow.core.atomic import (
    make_output_folder,
    output_error_from_oserror,
    publish_folder,
    sync_folder,
    write_atomically,
)
from ctflow.core.errors import NotWritten
from ctflow.report.result import write_result

_RESULTS, _MARKS, _BEGUN, _WORK, _COHORT = "results", "rows", "begun", ".work", "cohort.json"


class FolderDestination:
    """A folder: `results/<id>/`, `rows/` for the markers, `cohort.json` for what all have in common.

    `begun/` holds a file for each row under way, with a byte for each attempt that has not ended.

    Results are built in `.work/<share>/`, on the same file system.

    Args:
        folder: Made if absent.
        share: Name of what this process computes; plain, as it names a folder. No other process has the same.
    """

    def __init__(self, folder: Path, share: str) -> None:
        self._folder = folder.absolute()
        self._results, self._marks, self._begun, self._work = (
            self._folder / name for name in (_RESULTS, _MARKS, _BEGUN, _WORK)
        )
        self._own = WorkFolder(self._work, share)

    def __enter__(self) -> FolderDestination:
        for each in (self._folder, self._results, self._marks, self._begun, self._work):
            make_output_folder(each)
        self._own.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._own.__exit__()

    def hurry(self) -> None:
        """As `RowDestination.hurry`; a file system repeats nothing."""

    def agree(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `RowDestination.agree`."""
        path = self._folder / _COHORT
        if not path.exists():
            own = self._own.path / _COHORT
            write_result(document, own)
            try:
                with suppress(FileExistsError):  # another process was first
                    os.link(own, path)
                sync_folder(self._folder)
            except OSError as error:
                raise output_error_from_oserror(error, _COHORT) from error
            finally:
                own.unlink(missing_ok=True)
        return self._read(path)

    def marks(self) -> Iterator[MarkName]:
        """As `RowDestination.marks`."""
        try:
            with os.scandir(self._marks) as entries:
                for entry in entries:
                    name = MarkName.from_text(entry.name)
                    if name is not None and not entry.name.startswith("."):
                        yield name
        except FileNotFoundError:  # nothing was ever written here
            return
        except OSError as error:
            raise output_error_from_oserror(error, "the folder of the rows' markers") from error

    def begin(self, name: RowName) -> None:
        """As `RowDestination.begin`; not synced: a power cut is no fault of a row."""
        try:
            with self._note(name).open("ab") as stream:
                stream.write(b".")
        except OSError as error:
            raise output_error_from_oserror(error, f"the note that row {name[0]} is begun") from error

    def end(self, name: RowName) -> None:
        """As `RowDestination.end`."""
        with suppress(OSError):  # the row is then computed alone at the next start, if it is open
            self._note(name).unlink(missing_ok=True)

    def begun(self) -> Mapping[RowName, int]:
        """As `RowDestination.begun`."""
        found: dict[RowName, int] = {}
        try:
            for path in self._begun.iterdir():
                row_id, _, fingerprint = path.name.rpartition(".")
                with suppress(FileNotFoundError):  # another share's row has just ended
                    found[row_id, fingerprint] = path.stat().st_size
        except OSError as error:
            raise output_error_from_oserror(error, "the folder of the rows that are begun") from error
        return found

    def _note(self, name: RowName) -> Path:
        return self._begun / ".".join(name)

    def workspace(self, row_id: str) -> Path:
        """As `RowDestination.workspace`."""
        return self._own.workspace(row_id)

    def discard(self, folder: Path) -> None:
        """As `RowDestination.discard`."""
        self._own.discard(folder)

    def commit(self, folder: Path, outcome: RowOutcome, earlier: Iterable[MarkName] = ()) -> None:
        """As `RowDestination.commit`."""
        earlier = tuple(earlier)
        try:
            if is_kept(outcome.name, earlier, lambda name: (self._marks / str(name)).exists()):
                self.discard(folder)
                return
            for name in earlier:
                (self._marks / str(name)).unlink(missing_ok=True)
        except OSError as error:
            raise output_error_from_oserror(error, f"the marker of row {outcome.id}") from error
        self._publish(folder, self._results / outcome.id)
        write_result(outcome.document, self._marks / str(outcome.name))

    def _publish(self, folder: Path, final: Path) -> None:
        for last in (False, False, True):
            try:
                publish_folder(folder, final)
                break
            except NotWritten:  # another process that computes the row, too, may have renamed its result meanwhile
                if last:
                    raise

    def read(self, name: str) -> bytes | None:
        """As `RowDestination.read`."""
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise output_error_from_oserror(error, name.rpartition("/")[2]) from error

    def keep(self, file: Path, name: str) -> None:
        """As `RowDestination.keep`."""
        with file.open("rb") as source:
            write_atomically(self._folder / name, lambda stream: shutil.copyfileobj(source, stream))

    def _read(self, path: Path) -> Mapping[str, Any]:
        try:
            document = json.loads(path.read_bytes())
        except OSError as error:
            raise output_error_from_oserror(error, path.name) from error
        except ValueError as error:
            raise NotWritten(f"{path.name} in the destination is damaged: remove it", reason="unwritable") from error
        return dict(document)
