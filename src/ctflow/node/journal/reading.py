"""Queries of the journal. Reading never waits for a writer (SQLite in WAL mode)."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ctflow.node.journal.records import (
    STATES,
    DeliveryRecord,
    EventRecord,
    InstanceRecord,
    Job,
    ModelRun,
    ObjectRecord,
    Patient,
    ResultRecord,
    SeriesDetail,
    SeriesRecord,
    SeriesState,
)
from ctflow.node.journal.search import EVENTS_BY_HOUR, SeriesSearch, add_functions, hours_before

R = TypeVar("R")
T = TypeVar("T")
_MOST_READERS = 8  # at once; a query takes a tenth of a millisecond, a connection two descriptors
_SERIES = """SELECT s.*, (SELECT count(*) FROM refusals r WHERE r.series_key = s.key) AS refused FROM series s"""
_RESULT = """SELECT r.*, runs.model AS run_model FROM results r JOIN runs ON runs.id = r.run_id"""
_DELIVERY = """SELECT d.*, r.series_key, runs.model AS run_model FROM deliveries d JOIN results r ON r.id = d.result_id
JOIN runs ON runs.id = r.run_id"""
_ALL = SeriesSearch()


class JournalReader:
    """The journal's queries; safe to call from any thread.

    Args:
        path: The SQLite file; it exists and is of this version (`Journal` makes it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._is_closed = False
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(_MOST_READERS)

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for one query. Threads come and go, and one connection each would use up the descriptors."""
        with self._free:
            with self._lock:
                found = self._idle.pop() if self._idle else None
            if found is None:
                found = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
                found.row_factory = sqlite3.Row
                found.execute("PRAGMA query_only = ON")
                add_functions(found)
            try:
                yield found
            finally:
                with self._lock:
                    is_kept = not self._is_closed
                    if is_kept:
                        self._idle.append(found)
                if not is_kept:
                    found.close()

    def _all(self, question: str, *values: object) -> list[sqlite3.Row]:
        with self._reader() as reader:
            return reader.execute(question, values).fetchall()

    def _records(self, kind: type[R], question: str, *values: object) -> tuple[R, ...]:
        return tuple(record_of_row(kind, row) for row in self._all(question, *values))

    def _earliest(self, question: str, *values: object) -> float | None:
        """The one number of a question that asks for a time; None where there is none."""
        ((found,),) = self._all(question, *values)
        return None if found is None else float(found)

    def look(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Ask what a module of its own describes (`retention`)."""
        with self._reader() as reader:
            return question(reader)

    def close(self) -> None:
        """Close the reading connections; a running query finishes first and closes its own."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()

    def counts(self) -> dict[SeriesState, int]:
        """How many series are in each state; every state has a number."""
        found = {row["state"]: row["n"] for row in self._all("SELECT state, count(*) AS n FROM series GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    def series(
        self, search: SeriesSearch = _ALL, *, limit: int = 100, before: tuple[float, str] | None = None
    ) -> tuple[SeriesRecord, ...]:
        """Series, sorted by their latest instance, newest first.

        Args:
            search: Only these.
            limit: Most to return.
            before: Only those after this `last_at` and key in that order, for the next page: several may have received
                their last instance at the same moment.
        """
        condition, values = search.condition()
        question = f"{_SERIES} WHERE {condition} AND (s.last_at, s.key) < (?, ?)"
        rows = self._all(
            f"{question} ORDER BY s.last_at DESC, s.key DESC LIMIT ?", *values, *(before or (1e18, "")), limit
        )
        return tuple(series_record(row) for row in rows)

    def last_day(self, now: float) -> list[dict[str, Any]]:
        """Results, and series without one, in each hour of the day before a Unix time (`search.hours_before`)."""
        return hours_before(self._all(EVENTS_BY_HOUR, now), now)

    def find(self, key: str) -> SeriesRecord | None:
        """One series, or None where no series has this key."""
        rows = self._all(f"{_SERIES} WHERE s.key = ?", key)
        return series_record(rows[0]) if rows else None

    def detail(self, key: str, *, events: int = 200) -> SeriesDetail | None:
        """One series with all its records, or None where no series has this key.

        Args:
            key: The series.
            events: Most of its newest events to return.
        """
        found = self.find(key)
        if found is None:
            return None
        return SeriesDetail(
            found,
            self.instances(key),
            self.results(key),
            self._records(DeliveryRecord, f"{_DELIVERY} WHERE r.series_key = ? ORDER BY d.id", key),
            self.events(key=key, limit=events),
            self.runs(key),
        )

    def runs(self, key: str) -> tuple[ModelRun, ...]:
        """The runs of a series, in the order of its rule; none while it is received."""
        return self._records(ModelRun, "SELECT * FROM runs WHERE series_key = ? ORDER BY id", key)

    def run_counts(self) -> dict[tuple[str, SeriesState], int]:
        """How many runs of each model are in each state; the model is "" where the node has only one."""
        rows = self._all("SELECT model, state, count(*) AS n FROM runs GROUP BY model, state")
        return {(row["model"], row["state"]): row["n"] for row in rows}

    def instances(self, key: str) -> tuple[InstanceRecord, ...]:
        """The instances of a series, in order of arrival."""
        question = "SELECT * FROM instances WHERE series_key = ? ORDER BY received_at, sop_instance_uid"
        return self._records(InstanceRecord, question, key)

    def results(self, key: str) -> tuple[ResultRecord, ...]:
        """The results of a series, the oldest first."""
        rows = self._all(f"{_RESULT} WHERE r.series_key = ? ORDER BY r.id", key)
        return tuple(self._result(row) for row in rows)

    def result(self, number: int) -> ResultRecord | None:
        """One result by its number."""
        rows = self._all(f"{_RESULT} WHERE r.id = ?", number)
        return self._result(rows[0]) if rows else None

    def needs_result(self, job: Job, folder: str) -> bool:
        """Whether the folder that a job has written has a result, or may have: two jobs of one set write the same one.

        So do a run that was discarded and retried while it ran, and its second attempt in another worker.
        """
        question = """SELECT 1 FROM results WHERE folder = ? UNION ALL
            SELECT 1 FROM runs WHERE series_key = ? AND model = ? AND state = 'running' LIMIT 1"""
        return bool(self._all(question, folder, job.key, job.model))

    def _result(self, row: sqlite3.Row) -> ResultRecord:
        question = "SELECT * FROM objects WHERE result_id = ? ORDER BY file DESC"
        objects = self._records(ObjectRecord, question, row["id"])
        return record_of_row(ResultRecord, row, demonstration=bool(row["demonstration"]), objects=objects)

    def events(self, *, key: str | None = None, limit: int = 200, before: int | None = None) -> tuple[EventRecord, ...]:
        """The audit trail, the newest first.

        Args:
            key: Only of this series.
            limit: Most to return.
            before: Only those with a smaller number, for the next page.
        """
        question = "SELECT * FROM events WHERE id < ? AND (? IS NULL OR series_key = ?) ORDER BY id DESC LIMIT ?"
        return self._records(EventRecord, question, 2**62 if before is None else before, key, key, limit)

    def events_after(self, number: int, *, limit: int) -> tuple[EventRecord, ...]:
        """The next events of the audit trail after a number, in order; at most `limit`."""
        return self._records(EventRecord, "SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", number, limit)

    def backlog(self) -> dict[str, dict[str, int]]:
        """For each destination that the journal knows, how many objects are in each state of delivery."""
        found: dict[str, dict[str, int]] = {}
        for row in self._all("SELECT destination, state, count(*) AS n FROM deliveries GROUP BY destination, state"):
            found.setdefault(row["destination"], {})[row["state"]] = row["n"]
        return found

    def totals(self) -> dict[str, int]:
        """Totals since the journal began: instances, their bytes, duplicates, series, results."""
        (row,) = self._all(
            "SELECT count(*) AS series, total(instances) AS instances, total(bytes) AS bytes, "
            "total(duplicates) AS duplicates, (SELECT count(*) FROM results) AS results FROM series"
        )
        return {name: int(row[name]) for name in row.keys()}  # noqa: SIM118  # a Row is not a mapping

    def due(self, destination: str, now: float, *, limit: int) -> tuple[DeliveryRecord, ...]:
        """Deliveries that may be sent to a destination now, the oldest result first."""
        due = "d.destination = ? AND d.state = 'waiting' AND d.next_at <= ? ORDER BY d.id LIMIT ?"
        return self._records(DeliveryRecord, f"{_DELIVERY} WHERE {due}", destination, now, limit)

    def uncommitted(self, destination: str, now: float, *, limit: int) -> tuple[DeliveryRecord, ...]:
        """Deliveries that a destination took and did not commit to in time, or refused to."""
        due = "d.destination = ? AND d.state = 'stored' AND d.next_at <= ? ORDER BY d.id LIMIT ?"
        return self._records(DeliveryRecord, f"{_DELIVERY} WHERE {due}", destination, now, limit)

    def stored_as(self, sop_instance_uid: str) -> tuple[tuple[str, str], ...]:
        """SOP class and file of every instance with a UID."""
        question = "SELECT sop_class_uid, file FROM {} WHERE sop_instance_uid = ?"
        both = " UNION ".join(question.format(table) for table in ("instances", "left_out"))
        return tuple((row["sop_class_uid"], row["file"]) for row in self._all(both, *[sop_instance_uid] * 2))

    def waiting_reports(self, calling_ae: str | None = None) -> int:
        """How many reports of storage commitment wait, of one peer or of all."""
        question = "SELECT count(*) FROM commitments WHERE state = 'waiting' AND calling_ae = coalesce(?, calling_ae)"
        ((count,),) = self._all(question, calling_ae)
        return int(count)

    def due_reports(self, limit: int) -> list[sqlite3.Row]:
        """Reports of storage commitment that wait, the one that is due first before the others."""
        return self._all("SELECT * FROM commitments WHERE state = 'waiting' ORDER BY next_at LIMIT ?", limit)

    def report(self, number: int) -> sqlite3.Row | None:
        """A report of storage commitment that waits."""
        return next(iter(self._all("SELECT * FROM commitments WHERE id = ? AND state = 'waiting'", number)), None)

    def next_delivery_at(self, destination: str) -> float | None:
        """When the next object may be sent to a destination, or its commitment is over; None where none waits."""
        question = "SELECT min(next_at) FROM deliveries WHERE destination = ? AND state IN ('waiting', 'stored')"
        return self._earliest(question, destination)

    def next_run_at(self) -> float | None:
        """When the next run of a complete series may begin; None where none waits."""
        return self._earliest("SELECT min(next_at) FROM runs WHERE state = 'complete'")

    def files(self) -> set[str]:
        """Every file below the inbox that the journal knows."""
        return {row["file"] for row in self._all("SELECT file FROM instances UNION SELECT file FROM left_out")}


def record_of_row(kind: type[R], row: sqlite3.Row, **others: object) -> R:
    """The record whose fields are columns of a row, but for the others."""
    fields: dict[str, Any] = vars(kind)["__dataclass_fields__"]
    return kind(**{name: row[name] for name in fields if name not in others}, **others)


def series_record(row: sqlite3.Row) -> SeriesRecord:
    """The record of a row of `series` with its count of refusals."""
    patient = tuple(row[name] for name in ("patient_name", "patient_id", "patient_birth_date", "accession_number"))
    return record_of_row(SeriesRecord, row, patient=None if patient[0] is None else Patient(*patient))
