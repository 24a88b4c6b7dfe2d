"""Queries of the journal. Reading never waits for a writer (SQLite in WAL mode)."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctflow.node.journal.records import (
    STATES,
    DeliveryRecord,
    EventRecord,
    InstanceRecord,
    ObjectRecord,
    Patient,
    ResultRecord,
    SeriesDetail,
    SeriesRecord,
    SeriesState,
)

_MOST_READERS = 8  # at once; a query takes a tenth of a millisecond, a connection two descriptors
_SERIES = """SELECT s.*, (SELECT count(*) FROM refusals r WHERE r.series_key = s.key) AS refused FROM series s"""
_DELIVERY = """SELECT d.*, r.series_key FROM deliveries d JOIN results r ON r.id = d.result_id"""


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
        self, *, states: Collection[SeriesState] = (), limit: int = 100, before: tuple[float, str] | None = None
    ) -> tuple[SeriesRecord, ...]:
        """Series, sorted by their latest instance, newest first.

        Args:
            states: Only these; empty means all.
            limit: Most to return.
            before: Only those after this `last_at` and key in that order, for the next page: several may have received
                their last instance at the same moment.
        """
        wanted = tuple(states) or STATES
        marks = ",".join("?" * len(wanted))
        rows = self._all(
            f"{_SERIES} WHERE s.state IN ({marks}) AND (s.last_at, s.key) < (?, ?) "
            "ORDER BY s.last_at DESC, s.key DESC LIMIT ?",
            *wanted,
            *(before or (1e18, "")),
            limit,
        )
        return tuple(series_record(row) for row in rows)

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
        deliveries = self._all(f"{_DELIVERY} WHERE r.series_key = ? ORDER BY d.id", key)
        return SeriesDetail(
            found,
            self.instances(key),
            self.results(key),
            tuple(DeliveryRecord(**_named(row, DeliveryRecord)) for row in deliveries),
            self.events(key=key, limit=events),
        )

    def instances(self, key: str) -> tuple[InstanceRecord, ...]:
        """The instances of a series, in order of arrival."""
        rows = self._all("SELECT * FROM instances WHERE series_key = ? ORDER BY received_at, sop_instance_uid", key)
        return tuple(InstanceRecord(**_named(row, InstanceRecord)) for row in rows)

    def results(self, key: str) -> tuple[ResultRecord, ...]:
        """The results of a series, the oldest first."""
        rows = self._all("SELECT * FROM results WHERE series_key = ? ORDER BY id", key)
        return tuple(self._result(row) for row in rows)

    def result(self, number: int) -> ResultRecord | None:
        """One result by its number."""
        rows = self._all("SELECT * FROM results WHERE id = ?", number)
        return self._result(rows[0]) if rows else None

    def _result(self, row: sqlite3.Row) -> ResultRecord:
        objects = self._all("SELECT * FROM objects WHERE result_id = ? ORDER BY file DESC", row["id"])
        named = {**dict(row), "demonstration": bool(row["demonstration"])}
        return ResultRecord(**named, objects=tuple(ObjectRecord(**_named(each, ObjectRecord)) for each in objects))

    def events(self, *, key: str | None = None, limit: int = 200, before: int | None = None) -> tuple[EventRecord, ...]:
        """The audit trail, the newest first.

        Args:
            key: Only of this series.
            limit: Most to return.
            before: Only those with a smaller number, for the next page.
        """
        rows = self._all(
            "SELECT * FROM events WHERE id < ? AND (? IS NULL OR series_key = ?) ORDER BY id DESC LIMIT ?",
            2**62 if before is None else before,
            key,
            key,
            limit,
        )
        return tuple(EventRecord(**dict(row)) for row in rows)

    def events_after(self, number: int, *, limit: int) -> tuple[EventRecord, ...]:
        """The next events of the audit trail after a number, in order; at most `limit`."""
        rows = self._all("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", number, limit)
        return tuple(EventRecord(**dict(row)) for row in rows)

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
        rows = self._all(
            f"{_DELIVERY} WHERE d.destination = ? AND d.state = 'waiting' AND d.next_at <= ? ORDER BY d.id LIMIT ?",
            destination,
            now,
            limit,
        )
        return tuple(DeliveryRecord(**_named(row, DeliveryRecord)) for row in rows)

    def next_delivery_at(self, destination: str) -> float | None:
        """When the next object may be sent to a destination; None where none waits."""
        (row,) = self._all(
            "SELECT min(next_at) AS at FROM deliveries WHERE destination = ? AND state = 'waiting'", destination
        )
        return None if row["at"] is None else float(row["at"])

    def next_run_at(self) -> float | None:
        """When the next complete series may run; None where none waits."""
        (row,) = self._all("SELECT min(next_at) AS at FROM series WHERE state = 'complete'")
        return None if row["at"] is None else float(row["at"])

    def files(self) -> set[str]:
        """Every file below the inbox that the journal knows."""
        return {row["file"] for row in self._all("SELECT DISTINCT file FROM instances")}


def series_record(row: sqlite3.Row) -> SeriesRecord:
    """The record of a row of `series` with its count of refusals."""
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118  # a Row is not a mapping
    patient = None
    if values["patient_name"] is not None:
        patient = Patient(
            values["patient_name"], values["patient_id"], values["patient_birth_date"], values["accession_number"]
        )
    named: dict[str, Any] = {name: values[name] for name in SeriesRecord.__dataclass_fields__ if name != "patient"}
    return SeriesRecord(**named, patient=patient)


def _named(row: sqlite3.Row, record: type[Any]) -> dict[str, Any]:
    return {name: row[name] for name in record.__dataclass_fields__}
