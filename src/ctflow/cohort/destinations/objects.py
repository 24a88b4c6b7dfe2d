"""An object store as a destination: the objects of a result first, then its marker, which is small and one request."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ctflow.cohort.destinations.work import WorkFolder, folder_of_machine
from ctflow.cohort.outcome import MarkName, RowName, RowOutcome, is_kept
from ctflow.cohort.stores.objects import ObjectStore
from ctflow.cohort.stores.patience import StoreFault
from ctflow.core.errors import NotWritten, OutputError, StoreFailed

PATIENCE_S = (
    900.0  # a store that is restarted or moved is back by then; rows wait for it, and none is computed meanwhile
)
_RESULTS, _MARKS, _BEGUN, _COHORT = "results", "rows", "begun", "cohort.json"


class ObjectDestination:
    """A prefix of an object store, with the names of `FolderDestination`; results are built on this machine's disk.

    `begun/` holds an object for each attempt that has not ended. There is no lock between machines: two processes that
    compute one share write equal results.

    Args:
        url: As of `ObjectStore`.
        share: Name of what this process computes.
        patience_s: How long a request is repeated while the store fails.
    """

    def __init__(self, url: str, share: str, patience_s: float = PATIENCE_S) -> None:
        self._store = ObjectStore(url, patience_s)
        self._own_name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{share}"
        self._own: WorkFolder | None = None

    def __enter__(self) -> ObjectDestination:
        self._own = WorkFolder(folder_of_machine("work"), self._own_name).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._work.__exit__()

    @property
    def _work(self) -> WorkFolder:
        if self._own is None:
            raise RuntimeError("the destination is not entered")
        return self._own

    def hurry(self) -> None:
        """As `RowDestination.hurry`."""
        self._store.hurry()

    def agree(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `RowDestination.agree`."""
        with _named(_COHORT):
            self._store.create(_COHORT, json_bytes(document))
            kept = self._store.read(_COHORT)
        try:
            return dict(json.loads(kept))
        except ValueError as error:
            raise NotWritten(f"{_COHORT} in the destination is damaged: remove it", reason="unwritable") from error

    def marks(self) -> Iterator[MarkName]:
        """As `RowDestination.marks`."""
        with _named("the list of the rows' markers"):
            names = self._store.sizes(_MARKS)
        for text in names:
            name = MarkName.from_text(text)
            if name is not None:
                yield name

    def begin(self, name: RowName) -> None:
        """As `RowDestination.begin`."""
        with _named(f"the note that row {name[0]} is begun"):
            self._store.write(f"{_BEGUN}/{'.'.join(name)}.{secrets.token_hex(4)}", b"")

    def end(self, name: RowName) -> None:
        """As `RowDestination.end`."""
        with suppress(StoreFault):  # the row is then computed alone at the next start, if it is open
            notes = self._store.sizes(_BEGUN, f"{'.'.join(name)}.")  # also those of processes that were killed
            self._store.remove(f"{_BEGUN}/{note}" for note in notes if _row_of(note) == name)

    def begun(self) -> Mapping[RowName, int]:
        """As `RowDestination.begun`."""
        with _named("the list of the rows that are begun"):
            names = self._store.sizes(_BEGUN)
        return Counter(map(_row_of, names))

    def workspace(self, row_id: str) -> Path:
        """As `RowDestination.workspace`."""
        return self._work.workspace(row_id)

    def discard(self, folder: Path) -> None:
        """As `RowDestination.discard`."""
        self._work.discard(folder)

    def commit(self, folder: Path, outcome: RowOutcome, earlier: Iterable[MarkName] = ()) -> None:
        """As `RowDestination.commit`."""
        earlier, place = tuple(earlier), f"{_RESULTS}/{outcome.id}"
        if is_kept(outcome.name, earlier, lambda name: self.read(f"{_MARKS}/{name}") is not None):
            self.discard(folder)
            return
        files = {f"{place}/{path.relative_to(folder).as_posix()}": path for path in _files(folder)}
        with _named(f"the result of row {outcome.id}"):
            self._store.remove(f"{_MARKS}/{name}" for name in earlier)
            outdated = {f"{place}/{name}" for name in self._store.sizes(place)} - files.keys()
            self._store.upload(files)
            self._store.remove(outdated)
            self._store.write(f"{_MARKS}/{outcome.name}", json_bytes(outcome.document))
        self.discard(folder)

    def read(self, name: str) -> bytes | None:
        """As `RowDestination.read`."""
        try:
            return self._store.read(name)
        except StoreFault as fault:
            if fault.kind == "absent":
                return None
            raise output_error_from_fault(fault, name.rpartition("/")[2]) from fault

    def keep(self, file: Path, name: str) -> None:
        """As `RowDestination.keep`."""
        with _named(name):
            self._store.upload({name: file})


def _row_of(note: str) -> RowName:
    row_id, fingerprint, _ = (*note.rsplit(".", 2), "", "")[:3]
    return row_id, fingerprint


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A document as an object."""
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def output_error_from_fault(fault: StoreFault, what: str) -> OutputError:
    """The named error for what a store did not take.

    Args:
        fault: What failed.
        what: What was to be written, without an address.
    """
    if fault.kind == "absent":
        return StoreFailed(f"{what}: the destination does not exist: make it, or correct -o", reason="store-absent")
    if fault.kind in ("denied", "no-credentials"):
        return StoreFailed(f"{what}: the destination denies access: check the credentials", reason="store-denied")
    if fault.kind == "refused":
        return StoreFailed(f"{what}: the destination refuses it ({fault})", reason="store-refused")
    return StoreFailed(
        f"{what}: the destination does not answer ({fault}): open rows are computed at the next start",
        reason="store-down",
    )


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except StoreFault as fault:
        raise output_error_from_fault(fault, what) from fault


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
