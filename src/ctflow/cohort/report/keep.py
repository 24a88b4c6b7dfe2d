"""A run's page, made anew while rows are committed, and its tables at the end."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.manifest.rows import Manifest, ManifestPart
from ctflow.cohort.outcome import MarkName, RowOutcome
from ctflow.cohort.report.make import PAGE, make_report, marks_of_rows, outcomes_of, page_of
from ctflow.cohort.report.summary import CohortSummary
from ctflow.cohort.watch import Unwatched
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import CtflowError

_EVERY_S = 60.0
_LEAST_IDLE = 30  # times as long as the last page took: at most a thirtieth of one CPU, and of a store's requests

log = logging.getLogger(__name__)


class PageKeeper(Unwatched):
    """Makes the page at intervals, in a thread, as long as rows are committed; a context manager.

    Args:
        destination: Has the markers, also those of other shares; gets the page.
        every_s: Between two pages, at least.

    Attributes:
        files: What `kept_report` made at the end.
    """

    def __init__(self, destination: RowDestination, every_s: float = _EVERY_S) -> None:
        self._destination, self._every_s = destination, every_s
        self._changed, self._ending = threading.Event(), threading.Event()
        self._seen: set[MarkName] = set()
        self._summary = CohortSummary()
        self.files: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._keep, name="page", daemon=True)

    def __enter__(self) -> PageKeeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        if kind is not None:
            self._destination.hurry()
        self._thread.join()

    def committed(self, outcome: RowOutcome) -> None:
        """As `CohortWatcher.committed`."""
        self._changed.set()

    def _keep(self) -> None:
        wait_s = self._every_s
        while not self._ending.wait(wait_s):
            if not self._changed.is_set():
                continue
            self._changed.clear()
            began = time.monotonic()
            try:
                self.make_page()
            except CtflowError as error:  # the run itself tells what ends it
                log.warning("%s is not made: %s", PAGE, error.described)
            except Exception as error:  # noqa: BLE001  # nor does a fault of the page end the rows
                log.warning("%s is not made: %s", PAGE, unexpected(error, PAGE).described)
            wait_s = max(self._every_s, _LEAST_IDLE * (time.monotonic() - began))

    def make_page(self) -> None:
        """Read the markers that are new, and make the page of all.

        Raises:
            OutputError: The destination cannot be read or written.
        """
        names = set(marks_of_rows(self._destination.marks()))
        if self._seen - names:  # rows are computed again
            self._seen, self._summary = set(), CohortSummary()
        for name, outcome in outcomes_of(self._destination, sorted(names - self._seen)):
            if self._ending.is_set():
                return
            self._seen.add(name)
            if outcome is None:
                self._summary.add_damaged(name)
            else:
                self._summary.add(outcome)
        with tempfile.TemporaryDirectory(prefix="ctflow-") as place:
            file = Path(place) / PAGE
            file.write_text(page_of(self._destination, self._summary, ()), encoding="utf-8")
            self._destination.keep(file, PAGE)


@contextmanager
def kept_report(destination: RowDestination, manifest: Manifest, part: ManifestPart) -> Iterator[PageKeeper]:
    """Keep the page during a run, and make it and the tables at the end, unless the run is interrupted.

    Of several shares the first one does, and whichever finds all rows committed: not each of a thousand.

    Args:
        destination: The run's, entered.
        manifest: Says how many rows there are.
        part: The share.

    Yields:
        A watcher of the run.
    """
    keeper, is_first = PageKeeper(destination), part.number == 1
    try:
        with keeper if is_first else nullcontext():
            yield keeper
    except CtflowError:
        _make(destination, manifest, is_first=is_first)
        raise
    keeper.files = _make(destination, manifest, is_first=is_first)


def _make(destination: RowDestination, manifest: Manifest, *, is_first: bool) -> tuple[str, ...]:
    """Make the report; that it cannot be made changes nothing about the rows."""
    try:
        rows = {name.id for name in destination.marks()}
        if rows and (is_first or len(rows) >= manifest.total):
            return make_report(destination)
    except CtflowError as error:
        log.warning("%s and the tables are not made: %s; `ctflow cohort report` makes them", PAGE, error.described)
    except Exception as error:  # noqa: BLE001  # all rows are committed
        log.warning("%s and the tables are not made: %s", PAGE, unexpected(error, PAGE).described)
    return ()
