"""The journal: what was received, its outcome, what is still to be sent. One SQLite file, one writer.

States of a series: received -> complete -> running -> done -> delivered, or aside (with a reason that a retry does
not change), dead (tried too often), discarded (by a person). From "complete" on they are those of its runs, one of each
model (`runs`).
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from ctflow.core.errors import NotWritten, OutputError, StorageFull
from ctflow.node.journal import writes
from ctflow.node.journal.arrivals import (
    STUDY_AT,
    complete_quiet_series,
    complete_quiet_studies,
    give_up_refused_series,
    note_refused,
    receive_instance,
)
from ctflow.node.journal.reading import JournalReader
from ctflow.node.journal.records import Arrival, DecidedRun, InstanceRecord, Job, Receipt, Why, WorkerResult
from ctflow.node.journal.runs import QueueRules, RunQueue
from ctflow.node.journal.same_uid import keep_left_out
from ctflow.node.journal.schema import bring_up_to_date, unopened

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
JOURNAL_FILE = "journal.sqlite3"  # in the data folder
LOCK_FILE = "lock"  # next to the journal: its only writer is one node
# How many writes share one sync of the disk: 25 associations wait for it together instead of one after another.
_MOST_AT_ONCE = 256
_LOOK_AGAIN_S = 1.0  # between checks whether another connection still writes
log = logging.getLogger(__name__)


class Journal(JournalReader):
    """The journal of one data folder; every method may be called from any thread.

    When a writing method returns, its change is on the disk (synchronous=FULL), even if the power fails right after.

    Args:
        path: The SQLite file; created if it does not exist.
        clock: Gives the Unix time.

    Raises:
        SettingsInvalid: The file is not a journal, or has a newer version.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path)
        self._clock = clock
        self._queue = RunQueue(QueueRules())
        self._wanted: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._listeners: list[Callable[[], None]] = []
        opened: Future[None] = Future()
        self._writer = threading.Thread(target=self._write_forever, args=(opened,), name="journal", daemon=True)
        self._writer.start()
        opened.result()

    def close(self) -> None:
        """Finish pending writes and close; may be called twice."""
        self._wanted.put(None)
        self._writer.join()
        super().close()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads that must live while the journal records."""
        return (self._writer,)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call a function after every change, in the journal's thread: it must be quick (an event's `set`)."""
        self._listeners.append(listener)

    # -- the writer ---------------------------------------------------------------------------------------------------

    def _write_forever(self, opened: Future[None]) -> None:
        try:
            connection = _opened(self.path)
        except BaseException as error:  # noqa: BLE001  # passed to the caller that opens the journal
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            self._serve(connection)
        except Exception:
            log.exception("the journal's thread has ended: start the node again")  # `/readyz` also says so

    def _serve(self, connection: sqlite3.Connection) -> None:
        while (batch := self._next_batch()) is not None:
            before = connection.total_changes
            try:
                self._write_batch(connection, batch)
                if connection.total_changes != before:
                    for listener in tuple(self._listeners):
                        listener()
            except Exception as error:
                log.exception("the journal's thread met an error and reopens the journal")
                _fail(batch, error)
                connection.close()  # rolls back uncommitted writes
                connection = _opened(self.path)
        connection.close()

    def _next_batch(self) -> list[tuple[Work[Any], Future[Any]]] | None:
        """All waiting writes, at least one; None at the end."""
        first = self._wanted.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < _MOST_AT_ONCE:
            try:
                following = self._wanted.get_nowait()
            except queue.Empty:
                break
            if following is None:
                self._wanted.put(None)
                break
            batch.append(following)
        return batch

    def _write_batch(self, connection: sqlite3.Connection, batch: list[tuple[Work[Any], Future[Any]]]) -> None:
        """Write all in one transaction, each in its own savepoint; no caller gets a result before the disk has it."""
        told: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for work, future in batch:
                connection.execute("SAVEPOINT one")
                try:
                    told.append((future, work(connection), None))
                except Exception as error:  # noqa: BLE001  # it belongs to the caller, not to the others of the batch
                    connection.execute("ROLLBACK TO one")
                    told.append((future, None, error))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")  # if that also fails, the connection is closed
            told = [(future, None, error) for _, future in batch]
        for future, value, failure in told:
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)

    def _write(self, work: Work[T]) -> T:
        future: Future[T] = Future()
        if not self._writer.is_alive():
            raise NotWritten("the journal is closed", reason="journal-closed")
        self._wanted.put((work, future))
        try:
            while not future.done() and self._writer.is_alive():
                wait((future,), _LOOK_AGAIN_S)
            if not future.done():
                raise NotWritten("the journal's thread has ended: start the node again", reason="journal-closed")
            return future.result()
        except sqlite3.Error as error:
            raise _output_error(error) from error

    # -- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, arrival: Arrival, *, most_instances: int, most_bytes: int) -> Receipt:
        """Record an instance whose file is fsynced.

        Args:
            arrival: The instance.
            most_instances: A series with more is set aside.
            most_bytes: The same for its total bytes.

        Returns:
            The receipt; the journal owns the file only after "new".

        Raises:
            OutputError: The journal cannot be written.
        """
        return self._write(lambda db: receive_instance(db, arrival, self._clock(), most_instances, most_bytes))

    def leave_out(self, arrival: Arrival, *, most_instances: int, most_bytes: int) -> Receipt:
        """Record an object whose file is fsynced and which is kept, but not run; arguments as of `receive`."""
        return self._write(lambda db: keep_left_out(db, arrival, self._clock(), most_instances, most_bytes))

    def refused(self, arrival: Arrival, why: str) -> None:
        """Record that an instance was refused for lack of space, so that its series does not run without it."""
        self._write(lambda db: note_refused(db, arrival, self._clock(), why))

    def holds(self, study_uid: str, series_uid: str, sop_instance_uid: str) -> InstanceRecord | None:
        """The instance in the newest revision of its series, or None."""
        found = self._records(
            InstanceRecord,
            "SELECT i.* FROM series s JOIN instances i ON i.series_key = s.key AND i.sop_instance_uid = ? "
            "WHERE s.study_uid = ? AND s.series_uid = ? AND s.revision = (SELECT max(n.revision) FROM series n "
            "WHERE n.study_uid = s.study_uid AND n.series_uid = s.series_uid)",  # as `receive` asks: see retention
            sop_instance_uid,
            study_uid,
            series_uid,
        )
        return found[0] if found else None

    def complete_quiet(self, quiet_s: float) -> tuple[str, ...]:
        """Complete the series that got nothing for this long and await no refused instance; return their keys."""
        return self._write(lambda db: complete_quiet_series(db, self._clock(), quiet_s))

    def complete_quiet_studies(self, quiet_s: float) -> tuple[str, ...]:
        """As `complete_quiet`, of the series whose whole study got nothing for this long."""
        return self._write(lambda db: complete_quiet_studies(db, self._clock(), quiet_s))

    def give_up_refused(self, quiet_s: float) -> tuple[str, ...]:
        """Set aside the series whose refused instances did not come again for this long; return their keys."""
        return self._write(lambda db: give_up_refused_series(db, self._clock(), quiet_s))

    def next_quiet_at(self, quiet_s: float) -> float | None:
        """When `complete_quiet` may find the next series; None if none is being received."""
        earliest = self._earliest(
            "SELECT min(last_at) FROM series s WHERE state = 'received' AND instances > 0 "
            "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key)"
        )
        return None if earliest is None else earliest + quiet_s

    def next_quiet_study_at(self, quiet_s: float) -> float | None:
        """When `complete_quiet_studies` may find the next series; None if none is being received."""
        earliest = self._earliest(
            f"SELECT min({STUDY_AT}) FROM series s WHERE state = 'received' AND instances > 0 "  # noqa: S608
            "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key)",
            self._clock(),
            self._clock(),
        )
        return None if earliest is None else earliest + quiet_s

    # -- working ------------------------------------------------------------------------------------------------------

    def recover(self) -> tuple[str, ...]:
        """After a start, queue again what ran when the node ended; return the keys of its series."""
        return self._write(writes.recover_jobs)

    def claim(self, beside: Collection[str] = (), held: Collection[str] = ()) -> Job | None:
        """Take the next run of a complete series and mark it as running; None if none may run now.

        The oldest series comes first, but those during which the node itself ended come after the others, and routine
        ones after urgent ones (`order_by`).

        Args:
            beside: Keys of the series that run in the same worker. None runs beside them that was tried before, so that
                a series that ends a worker twice has no other to blame, nor one of them again.
            held: Models that are open in the worker: their runs are preferred, for a while.
        """

        def take(db: sqlite3.Connection) -> Job | None:
            now = self._clock()
            run = self._queue.next(db, now, beside, held)
            return None if run is None else writes.claim_job(db, run, now)

        return self._write(take)

    def order_by(self, rules: QueueRules) -> None:
        """Order runs by these rules from now on."""
        self._queue = RunQueue(rules)

    def decide(self, job: Job, decided: Sequence[DecidedRun]) -> bool:
        """Put a run of each of these models in a job's place, all at once; False if its set has changed."""
        return self._write(lambda db: writes.decide_job(db, job, decided, self._clock()))

    def commit(self, job: Job, answer: WorkerResult, deliveries: Sequence[tuple[str, str]]) -> bool:
        """Record a result and its deliveries before anything is sent.

        Args:
            job: As claimed.
            answer: The result that the worker wrote.
            deliveries: Names of a destination and of a file, in sending order; without any the series
                stays "done".

        Returns:
            False if instances came meanwhile: the result's set is outdated and it is not kept.
        """
        return self._write(lambda db: writes.commit_job(db, job, answer, tuple(deliveries), self._clock()))

    def set_aside(self, key: str, why: Why) -> bool:
        """Set a series aside with all its runs that have no result; return whether there is such a series."""
        return self._write(lambda db: writes.set_series_aside(db, key, why, self._clock()))

    def put_aside(self, job: Job, why: Why) -> bool:
        """Set a run aside; False if its set has changed."""
        return self._write(lambda db: writes.leave_job(db, job, "aside", why, 0.0, self._clock()))

    def try_again(self, job: Job, why: Why, wait_s: float) -> bool:
        """Put a run back, to run later; False if its set has changed."""
        when = self._clock() + wait_s
        return self._write(lambda db: writes.leave_job(db, job, "complete", why, when, self._clock()))

    def give_up(self, job: Job, why: Why) -> bool:
        """Move a run to the dead letters; False if its set has changed."""
        return self._write(lambda db: writes.leave_job(db, job, "dead", why, 0.0, self._clock()))

    def worker_died(self, job: Job, how: str) -> bool:
        """Record that a worker died on the series: retried once, then set aside. Return whether it is retried."""
        return self._write(lambda db: writes.note_worker_died(db, job, how, self._clock()))

    # -- sending ------------------------------------------------------------------------------------------------------

    def sent(self, delivery: int, text: str) -> None:
        """Record that an object arrived at its destination; a series whose objects all arrived is delivered."""
        self._write(lambda db: writes.note_sent(db, delivery, text, self._clock()))

    def not_sent(self, delivery: int, why: Why, wait_s: float | None) -> None:
        """Record that an object did not arrive; it is retried after `wait_s`, or is a dead letter if that is None."""
        self._write(lambda db: writes.note_not_sent(db, delivery, why, wait_s, self._clock()))

    # -- a person -----------------------------------------------------------------------------------------------------

    def retry(self, key: str, *, by: str = "operator", model: str | None = None) -> bool:
        """Retry a series that is set aside, dead or discarded, or only one model's run of it.

        A run without a result is computed, and of one with a result is sent what was not delivered.

        Returns:
            False if there is nothing to retry (no such series, or it is being processed).
        """
        return self._write(lambda db: writes.retry_series(db, key, by, self._clock(), model))

    def discard(self, key: str, *, by: str = "operator", model: str | None = None) -> bool:
        """Stop all work on a series, or one model's, and withdraw undelivered objects; its files stay.

        Returns:
            False if there is no such series, or it is discarded or delivered.
        """
        return self._write(lambda db: writes.discard_series(db, key, by, self._clock(), model))

    def change(self, work: Callable[[sqlite3.Connection, float], T]) -> T:
        """Make a change that a module of its own describes (`retention`), given the time; as durable as the others."""
        return self._write(lambda db: work(db, self._clock()))

    def shrink(self) -> None:
        """Give pages that hold nothing any more back to the disk, some at a time; older journals only reuse them."""
        self._write(lambda db: db.execute("PRAGMA incremental_vacuum(2000)").fetchall())

    def event(self, kind: str, text: str, *, key: str | None = None, peer: str | None = None) -> None:
        """Add a line to the audit trail; the text holds no patient data."""
        self._write(lambda db: writes.note_event(db, self._clock(), kind, text, key, peer))


def _opened(path: Path) -> sqlite3.Connection:
    """The writer's connection, with the tables created."""
    try:
        connection = sqlite3.connect(path, timeout=30, isolation_level=None)
    except sqlite3.Error as error:
        raise unopened(error) from error
    try:
        connection.row_factory = sqlite3.Row
        bring_up_to_date(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _fail(batch: Sequence[tuple[Work[Any], Future[Any]]], error: Exception) -> None:
    """Fail all writes without a result yet; the others are already on the disk."""
    for _, future in batch:
        if not future.done():
            future.set_exception(error)


def _output_error(error: sqlite3.Error) -> OutputError:
    if "full" in str(error):
        return StorageFull("no space left for the journal: free some space")
    return NotWritten(f"the journal cannot be written ({error})", reason="unwritable")
