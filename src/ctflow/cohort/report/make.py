"""A cohort's tables and page, from the markers of a destination."""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.marker import outcome_of_mark
from ctflow.cohort.outcome import MarkName, RowOutcome, best_mark
from ctflow.cohort.report.summary import CohortSummary
from ctflow.cohort.report.tables import table_names, tables_in, usual_form
from ctflow.core.errors import NotWritten, NoUsableSeries
from ctflow.report.cohort.page import cohort_page
from ctflow.report.preview import thumbnail_from_preview

PAGE = "cohort.html"
_READERS = 16  # object stores answer many requests at a time
_AT_ONCE = 32
_SLOW_S = 0.002  # from a disk a marker is read in a tenth of that, and threads would be in each other's way
_AHEAD = 3 * _READERS


def make_report(destination: RowDestination, form: str | None = None) -> tuple[str, ...]:
    """Write the tables and the page of all rows that are committed.

    Equal markers and previews give equal files.

    Args:
        destination: Gets them; need not be entered.
        form: Of the tables, "parquet" or "csv"; None takes Parquet if pyarrow is installed.

    Returns:
        Names of the files.

    Raises:
        NoUsableSeries: No row is committed.
        RequirementUnmet: Parquet is asked for, and pyarrow is not installed.
        OutputError: The destination cannot be read or written.
    """
    chosen, names = form or usual_form(), sorted(marks_of_rows(destination.marks()))
    if not names:
        raise NoUsableSeries("the destination has no committed row: check its name", reason="no-row")
    summary = CohortSummary()
    with tempfile.TemporaryDirectory(prefix="ctflow-") as place:
        with tables_in(Path(place), chosen) as tables:
            for name, outcome in outcomes_of(destination, names):
                if outcome is None:
                    summary.add_damaged(name)
                else:
                    summary.add(outcome)
                tables.add(outcome or _from_name(name))
        files = table_names(chosen)
        (Path(place) / PAGE).write_text(page_of(destination, summary, files), encoding="utf-8")
        for each in (*files, PAGE):  # the page, which links to the tables, last
            destination.keep(Path(place) / each, each)
    return (*files, PAGE)


def page_of(destination: RowDestination, summary: CohortSummary, files: Iterable[str]) -> str:
    """The page of a summary.

    Args:
        destination: Has the previews of results.
        summary: Its rows.
        files: Names of the tables beside the page.
    """
    document = summary.document
    pictured = [(each["id"], f"results/{each['id']}/{each['folder']}/preview.png") for each in document["pictured"]]
    read = dict(_in_order(pictured, lambda each: (each[0], _thumbnail(destination, each[1]))))
    pictures = {row_id: jpeg for row_id, jpeg in read.items() if jpeg is not None}
    common = _common(destination)
    shown = "report.html" if (common.get("settings") or {}).get("report") == "html" else "preview.png"
    return cohort_page(
        document,
        pictures,
        [*files, "cohort.json"],
        research_only=common.get("research_only"),
        result_file=shown if pictures or not pictured else None,
    )


def marks_of_rows(names: Iterable[MarkName]) -> list[MarkName]:
    """One marker a row, the best if several processes have written some."""
    found: dict[str, list[MarkName]] = {}
    for name in names:
        found.setdefault(name.id, []).append(name)
    return [best for each in found.values() if (best := best_mark(each)) is not None]


def outcomes_of(destination: RowDestination, names: Iterable[MarkName]) -> Iterator[tuple[MarkName, RowOutcome | None]]:
    """Read markers in the order of their names, several at a time.

    Args:
        destination: Has them.
        names: Of the markers.

    Yields:
        A name and its marker's content; None if that is damaged. One that has gone meanwhile is left out.
    """

    def read(name: MarkName) -> tuple[MarkName, RowOutcome | None, bool]:
        try:
            return name, outcome_of_mark(destination, name), True
        except NotWritten as error:
            if error.reason != "damaged-marker":
                raise
            return name, None, destination.read(f"rows/{name}") is not None

    for name, outcome, is_there in _in_order(names, read):
        if is_there:
            yield name, outcome


def _in_order(values: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """Results of a work, in the order of the values: in threads if each takes long, and a bounded number waits."""
    waiting: deque[Future[list[Any]]] = deque()
    rest = iter(values)
    while some := list(islice(rest, _AT_ONCE)):
        began = time.perf_counter()
        yield from [work(value) for value in some]
        if time.perf_counter() - began > _SLOW_S * len(some):
            break
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            while some := list(islice(rest, _AT_ONCE)):
                waiting.append(pool.submit(lambda each: [work(value) for value in each], some))
                if len(waiting) == _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _thumbnail(destination: RowDestination, name: str) -> bytes | None:
    content = destination.read(name)
    return None if content is None else thumbnail_from_preview(content)


def _common(destination: RowDestination) -> dict[str, Any]:
    try:
        document = json.loads(destination.read("cohort.json") or b"{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _from_name(name: MarkName) -> RowOutcome:
    return RowOutcome(name.id, name.fingerprint, name.status, "damaged-marker", "", 0, 0, 0.0)
