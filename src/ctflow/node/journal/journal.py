"""The journal: what came in, what became of it, what is still to be sent. One SQLite file, one writer.

States of a series: received -> complete -> running -> done -> delivered, or aside (with a reason that trying again does
not change), dead (tried too often), discarded (by a person).
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from ctflow.core.errors import NotWritten, OutputError, StorageFull
from ctflow.core.volume import digest_of_uid
from ctflow.node.journal.reading import JournalReader
from ctflow.node.journal.records import Answer, Arrival, InstanceRecord, Job, Receipt
from ctflow.node.journal.schema import bring_up_to_date, unopened

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

JOURNAL_FILE = "journal.sqlite3"  # in the data folder
LOCK_FILE = "lock"  # beside it: its one writer is one node
# How many writes share one sync of the disk: 25 associations wait for it together instead of one after another.
_MOST_AT_ONCE = 256
_LOOK_AGAIN_S = 1.0  # at whether somebody still writes

log = logging.getLogger(__name__)


def key_of(study_uid: str, series_uid: str, revision: int) -> str:
    """Name of a revision of a series: 32 hexadecimal digits, whatever the peer's UIDs hold."""
    return hashlib.sha256(json.dumps([study_uid, series_uid, revision]).encode()).hexdigest()[:32]


def digest_of_set(sop_instance_uids: Sequence[str]) -> str:
    """Digest of a set of instances, in any order: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(sop_instance_uids)).encode()).hexdigest()[:32]


class Journal(JournalReader):
    """The journal of one data folder; every method may be called from any thread.

    What a method that writes has returned is on the disk (synchronous=FULL), also if the power fails the moment after.

    Args:
        path: The SQLite file; made where there is none.
        clock: Gives the Unix time.

    Raises:
        SettingsInvalid: The file is no journal, or one of a newer version.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path)
        self._clock = clock
        self._wanted: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._listeners: list[Callable[[], None]] = []
        opened: Future[None] = Future()
        self._writer = threading.Thread(target=self._write_forever, args=(opened,), name="journal", daemon=True)
        self._writer.start()
        opened.result()

    def close(self) -> None:
        """Finish what is being written and close; may be called twice."""
        self._wanted.put(None)
        self._writer.join()
        super().close()

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """What must live while something is to be remembered."""
        return (self._writer,)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have a function called after every change, in the journal's thread: it must be quick (an event's `set`)."""
        self._listeners.append(listener)

    # -- the writer ---------------------------------------------------------------------------------------------------

    def _write_forever(self, opened: Future[None]) -> None:
        try:
            connection = _opened(self.path)
        except BaseException as error:  # noqa: BLE001  # handed to whoever opens the journal
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            self._serve(connection)
        except Exception:
            log.exception("the journal's thread has ended: start the node again")  # `/readyz` says so, too

    def _serve(self, connection: sqlite3.Connection) -> None:
        while (batch := self._next_batch()) is not None:
            before = connection.total_changes
            try:
                self._write_batch(connection, batch)
                if connection.total_changes != before:
                    for listener in tuple(self._listeners):
                        listener()
            except Exception as error:
                log.exception("the journal's thread met a fault and opens the journal anew")
                _fail(batch, error)
                connection.close()  # undoes what was not committed
                connection = _opened(self.path)
        connection.close()

    def _next_batch(self) -> list[tuple[Work[Any], Future[Any]]] | None:
        """Everything that waits, at least one; None at the end."""
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
        """All in one transaction, each in its own savepoint; nobody is told before the disk has it."""
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
                connection.execute("ROLLBACK")  # where that fails, too, the connection is closed
            told = [(future, None, error) for _, future in batch]
        for future, value, failure in told:
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)

    def _write(self, work: Work[T]) -> T:
        future: Future[T] = Future()
        if not self._writer.is_alive():
            raise NotWritten("the journal is closed")
        self._wanted.put((work, future))
        try:
            while not future.done() and self._writer.is_alive():
                wait((future,), _LOOK_AGAIN_S)
            if not future.done():
                raise NotWritten("the journal's thread has ended: start the node again")
            return future.result()
        except sqlite3.Error as error:
            raise _output_error(error) from error

    # -- receiving ----------------------------------------------------------------------------------------------------

    def receive(self, arrival: Arrival, *, most_instances: int, most_bytes: int) -> Receipt:
        """Keep an instance that lies fsynced in its file.

        Args:
            arrival: The instance.
            most_instances: A series with more is set aside.
            most_bytes: The same for its bytes together.

        Returns:
            What became of it; only after "new" its file is the journal's.

        Raises:
            OutputError: The journal cannot be written.
        """
        return self._write(lambda db: _receive(db, arrival, self._clock(), most_instances, most_bytes))

    def refused(self, arrival: Arrival, why: str) -> None:
        """Remember that an instance was refused for want of room, so that its series is not run without it."""
        self._write(lambda db: _refused(db, arrival, self._clock(), why))

    def holds(self, study_uid: str, series_uid: str, sop_instance_uid: str) -> InstanceRecord | None:
        """The instance as the newest revision of its series has it, or None."""
        rows = self._all(
            "SELECT i.* FROM series s JOIN instances i ON i.series_key = s.key AND i.sop_instance_uid = ? "
            "WHERE s.study_uid = ? AND s.series_uid = ? ORDER BY s.revision DESC LIMIT 1",
            sop_instance_uid,
            study_uid,
            series_uid,
        )
        fields = InstanceRecord.__dataclass_fields__
        return InstanceRecord(**{name: rows[0][name] for name in fields}) if rows else None

    def complete_quiet(self, quiet_s: float) -> tuple[str, ...]:
        """Complete the series that got nothing for this long and wait for nothing that was refused; their keys."""
        return self._write(lambda db: _complete_quiet(db, self._clock(), quiet_s))

    def give_up_refused(self, quiet_s: float) -> tuple[str, ...]:
        """Set aside the series whose refused instances did not come again for this long; their keys."""
        return self._write(lambda db: _give_up_refused(db, self._clock(), quiet_s))

    def next_quiet_at(self, quiet_s: float) -> float | None:
        """When `complete_quiet` may find the next series; None where none is received."""
        (row,) = self._all(
            "SELECT min(last_at) AS at FROM series s WHERE state = 'received' AND instances > 0 "
            "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key)"
        )
        return None if row["at"] is None else float(row["at"]) + quiet_s

    # -- working ------------------------------------------------------------------------------------------------------

    def recover(self) -> tuple[str, ...]:
        """After a start: what was running when the node ended waits again; their keys."""
        return self._write(_recover)

    def claim(self) -> Job | None:
        """Take the next complete series and mark it as running; None where none may be run now.

        The oldest first, but those in which the node itself ended come after the others.
        """
        return self._write(lambda db: _claim(db, self._clock()))

    def commit(self, job: Job, answer: Answer, deliveries: Sequence[tuple[str, str]]) -> bool:
        """Keep a result, with what is to be delivered, before anything is sent.

        Args:
            job: As claimed.
            answer: What the worker wrote.
            deliveries: Names of a destination and of a file, in the order in which they are to be sent; none makes
                the series "done" and leaves it there.

        Returns:
            False where instances came meanwhile: the result is of a set that is no more and is not kept.
        """
        return self._write(lambda db: _commit(db, job, answer, tuple(deliveries), self._clock()))

    def set_aside(self, key: str, reason: str, *, set_digest: str | None = None) -> bool:
        """Set a series aside; with a set's digest only if the series still is that set. Whether it was."""
        return self._write(lambda db: _leave(db, key, set_digest, "aside", reason, 0.0, self._clock()))

    def try_again(self, job: Job, reason: str, wait_s: float) -> bool:
        """Put a running series back, to be run after a while; False where it is no longer that set."""
        when = self._clock() + wait_s
        return self._write(lambda db: _leave(db, job.key, job.set_digest, "complete", reason, when, self._clock()))

    def give_up(self, job: Job, reason: str) -> bool:
        """Put a running series with the dead letters; False where it is no longer that set."""
        return self._write(lambda db: _leave(db, job.key, job.set_digest, "dead", reason, 0.0, self._clock()))

    def worker_died(self, job: Job, reason: str) -> bool:
        """A worker did not survive the series: it is tried once more, then set aside. Whether it is tried again."""
        return self._write(lambda db: _worker_died(db, job, reason, self._clock()))

    # -- sending ------------------------------------------------------------------------------------------------------

    def sent(self, delivery: int, text: str) -> None:
        """An object arrived at its destination; a series whose objects all arrived is delivered."""
        self._write(lambda db: _sent(db, delivery, text, self._clock()))

    def not_sent(self, delivery: int, error: str, wait_s: float | None) -> None:
        """An object did not arrive; it is tried again after `wait_s`, or is a dead letter where that is None."""
        self._write(lambda db: _not_sent(db, delivery, error, wait_s, self._clock()))

    # -- a person -----------------------------------------------------------------------------------------------------

    def retry(self, key: str, *, by: str = "operator") -> bool:
        """Try again what is set aside, dead or discarded: compute it, or send what was not delivered.

        Returns:
            False where there is nothing to try again (no such series, or it is on its way).
        """
        return self._write(lambda db: _retry(db, key, by, self._clock()))

    def discard(self, key: str, *, by: str = "operator") -> bool:
        """Stop all work on a series and withdraw what was not delivered; its files stay.

        Returns:
            False where there is no such series, or it is discarded or delivered.
        """
        return self._write(lambda db: _discard(db, key, by, self._clock()))

    def event(self, kind: str, text: str, *, key: str | None = None, peer: str | None = None) -> None:
        """Add a line to the audit trail; the text holds no patient data."""
        self._write(lambda db: _note(db, self._clock(), kind, text, key, peer))


def _opened(path: Path) -> sqlite3.Connection:
    """The writer's connection; the tables are there."""
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
    """Tell all who have not been told; to the others the disk's word has been given."""
    for _, future in batch:
        if not future.done():
            future.set_exception(error)


def _output_error(error: sqlite3.Error) -> OutputError:
    if "full" in str(error):
        return StorageFull("no space left for the journal: free some")
    return NotWritten(f"the journal cannot be written ({error})")


def _note(
    db: sqlite3.Connection, now: float, kind: str, text: str, key: str | None = None, peer: str | None = None
) -> None:
    db.execute(
        "INSERT INTO events (at, kind, series_key, peer, text) VALUES (?, ?, ?, ?, ?)", (now, kind, key, peer, text)
    )


def _newest(db: sqlite3.Connection, study_uid: str, series_uid: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM series WHERE study_uid = ? AND series_uid = ? ORDER BY revision DESC LIMIT 1",
        (study_uid, series_uid),
    ).fetchone()
    return row


def _has_result(db: sqlite3.Connection, key: str) -> bool:
    return db.execute("SELECT 1 FROM results WHERE series_key = ?", (key,)).fetchone() is not None


def _by_key(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute("SELECT * FROM series WHERE key = ?", (key,)).fetchone()
    return row


def _receive(db: sqlite3.Connection, arrival: Arrival, now: float, most_instances: int, most_bytes: int) -> Receipt:
    series = _newest(db, arrival.study_uid, arrival.series_uid)
    if series is not None:
        known = db.execute(
            "SELECT * FROM instances WHERE series_key = ? AND sop_instance_uid = ?",
            (series["key"], arrival.sop_instance_uid),
        ).fetchone()
        if known is not None:
            return _came_again(db, series, known, arrival, now)
        if series["instances"] >= most_instances or series["bytes"] + arrival.bytes > most_bytes:
            return _too_much(db, series, arrival, now, most_instances, most_bytes)
    series = _open_series(db, series, arrival, now)
    key = str(series["key"])
    db.execute(
        "INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            key, arrival.sop_instance_uid, arrival.sop_class_uid, arrival.transfer_syntax, arrival.file, arrival.bytes,
            arrival.sha256, now,
        ),
    )  # fmt: skip
    if db.execute("SELECT 1 FROM refusals WHERE series_key = ?", (key,)).fetchone():
        db.execute(
            "DELETE FROM refusals WHERE series_key = ? AND sop_instance_uid = ?", (key, arrival.sop_instance_uid)
        )
    expected = max(filter(None, (series["expected_instances"], arrival.expected_instances)), default=None)
    db.execute(
        "UPDATE series SET instances = instances + 1, bytes = bytes + ?, last_at = ?, expected_instances = ?, "
        "modality = CASE modality WHEN '' THEN ? ELSE modality END WHERE key = ?",
        (arrival.bytes, now, expected, arrival.modality, key),
    )
    return Receipt("new", key, expected is not None and _complete_counted(db, key, now))


def _came_again(
    db: sqlite3.Connection, series: sqlite3.Row, known: sqlite3.Row, arrival: Arrival, now: float
) -> Receipt:
    key = str(series["key"])
    if known["sha256"] not in (arrival.sha256, arrival.same_as):
        what = "another content"
        if known["transfer_syntax"] != arrival.transfer_syntax:
            what += ", or one that cannot be compared, in another transfer syntax"
        text = f"instance {digest_of_uid(arrival.sop_instance_uid)} came again with {what}; the first stays"
        _note(db, now, "conflict", text, key, arrival.peer)
        return Receipt("conflict", key)
    db.execute("UPDATE series SET duplicates = duplicates + 1 WHERE key = ?", (key,))
    if series["state"] == "discarded":  # whoever sends it again wants it
        if _has_result(db, key):
            _retry(db, key, arrival.calling_ae, now)
        else:
            _reopen(db, series, now, arrival)
    if series["state"] in ("received", "discarded"):
        db.execute("UPDATE series SET last_at = ? WHERE key = ?", (now, key))
    return Receipt("duplicate", key)


def _too_much(
    db: sqlite3.Connection, series: sqlite3.Row, arrival: Arrival, now: float, most_instances: int, most_bytes: int
) -> Receipt:
    reason = f"more than {most_instances} instances or {most_bytes >> 20} MB: raise the limits of a series, then retry"
    if series["state"] in ("received", "complete", "running"):
        db.execute("UPDATE series SET state = 'aside', reason = ? WHERE key = ?", (reason, series["key"]))
        _note(db, now, "aside", reason, series["key"], arrival.peer)
    return Receipt("too-much", str(series["key"]))


def _open_series(db: sqlite3.Connection, series: sqlite3.Row | None, arrival: Arrival, now: float) -> sqlite3.Row:
    """The revision that an instance belongs to, in the state "received"."""
    if series is None:
        return _begin(db, arrival, now, None)
    if _has_result(db, series["key"]):  # it may be on its way: what is computed of more instances is another revision
        return _begin(db, arrival, now, series)
    if series["state"] != "received":
        _reopen(db, series, now, arrival)
    return series


def _begin(db: sqlite3.Connection, arrival: Arrival, now: float, earlier: sqlite3.Row | None) -> sqlite3.Row:
    """A new series, or a new revision that begins with the instances of the earlier one."""
    revision = 1 if earlier is None else int(earlier["revision"]) + 1
    key = key_of(arrival.study_uid, arrival.series_uid, revision)
    previous = None if earlier is None else str(earlier["key"])
    patient = arrival.patient
    who = (None,) * 4 if patient is None else (
        patient.name, patient.patient_id, patient.birth_date, patient.accession_number,
    )  # fmt: skip
    db.execute(
        "INSERT INTO series (key, series_uid, study_uid, revision, previous, calling_ae, peer, modality, "
        "first_at, last_at, state, patient_name, patient_id, patient_birth_date, accession_number) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'received', ?, ?, ?, ?)",
        (
            key, arrival.series_uid, arrival.study_uid, revision, previous, arrival.calling_ae, arrival.peer,
            arrival.modality, now, now, *who,
        ),
    )  # fmt: skip
    text = f"from {arrival.calling_ae}"
    if earlier is not None:
        db.execute(
            "INSERT INTO instances SELECT ?, sop_instance_uid, sop_class_uid, transfer_syntax, file, bytes, sha256, "
            "received_at FROM instances WHERE series_key = ?",
            (key, previous),
        )
        db.execute(
            "UPDATE series SET (instances, bytes, expected_instances) = (SELECT instances, bytes, expected_instances "
            "FROM series WHERE key = ?) WHERE key = ?",
            (previous, key),
        )
        text = f"revision {revision}: an instance came after the result of revision {revision - 1}, {text}"
    _note(db, now, "received", text, key, arrival.peer)
    found = _by_key(db, key)
    if found is None:
        raise ValueError("a series that was just begun is gone")
    return found


def _reopen(db: sqlite3.Connection, series: sqlite3.Row, now: float, arrival: Arrival) -> None:
    db.execute(
        "UPDATE series SET state = 'received', reason = NULL, attempts = 0, deaths = 0, next_at = 0 WHERE key = ?",
        (series["key"],),
    )
    _note(db, now, "reopened", f"an instance came while it was {series['state']}", series["key"], arrival.peer)


def _complete_counted(db: sqlite3.Connection, key: str, now: float) -> bool:
    """Complete a series at once where it has as many instances as its sender said."""
    done = db.execute(
        "UPDATE series SET state = 'complete' WHERE key = ? AND state = 'received' AND instances = expected_instances "
        "AND NOT EXISTS (SELECT 1 FROM refusals WHERE series_key = ?)",
        (key, key),
    )
    if done.rowcount:
        _note(db, now, "complete", "as many instances as its sender announced", key)
    return bool(done.rowcount)


def _refused(db: sqlite3.Connection, arrival: Arrival, now: float, why: str) -> None:
    series = _open_series(db, _newest(db, arrival.study_uid, arrival.series_uid), arrival, now)
    key = series["key"]
    added = db.execute("INSERT OR IGNORE INTO refusals VALUES (?, ?, ?)", (key, arrival.sop_instance_uid, now))
    db.execute("UPDATE series SET last_at = ? WHERE key = ?", (now, key))
    (count,) = db.execute("SELECT count(*) FROM refusals WHERE series_key = ?", (key,)).fetchone()
    if added.rowcount and count == 1:  # one line for the first, not one for each of a thousand
        _note(db, now, "refused", why, key, arrival.peer)


def _complete_quiet(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    rows = db.execute(
        "SELECT key FROM series s WHERE state = 'received' AND instances > 0 AND last_at <= ? "
        "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key)",
        (now - quiet_s,),
    ).fetchall()
    for row in rows:
        db.execute("UPDATE series SET state = 'complete' WHERE key = ?", (row["key"],))
        _note(db, now, "complete", f"nothing came for {quiet_s:g} s", row["key"])
    return tuple(str(row["key"]) for row in rows)


def _give_up_refused(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    rows = db.execute(
        "SELECT s.key, count(*) AS n FROM series s JOIN refusals r ON r.series_key = s.key "
        "WHERE s.state = 'received' AND s.last_at <= ? GROUP BY s.key",
        (now - quiet_s,),
    ).fetchall()
    for row in rows:
        reason = (
            f"{row['n']} instances were refused for want of room and did not come again: have the series sent again"
        )
        db.execute("UPDATE series SET state = 'aside', reason = ? WHERE key = ?", (reason, row["key"]))
        _note(db, now, "aside", reason, row["key"])
    return tuple(str(row["key"]) for row in rows)


def _recover(db: sqlite3.Connection) -> tuple[str, ...]:
    rows = db.execute("SELECT key FROM series WHERE state = 'running'").fetchall()
    db.execute(
        "UPDATE series SET state = 'complete', interruptions = interruptions + 1, attempts = max(attempts - 1, 0) "
        "WHERE state = 'running'"
    )
    return tuple(str(row["key"]) for row in rows)


def _claim(db: sqlite3.Connection, now: float) -> Job | None:
    row = db.execute(
        "SELECT * FROM series WHERE state = 'complete' AND next_at <= ? ORDER BY interruptions, first_at LIMIT 1",
        (now,),
    ).fetchone()
    if row is None:
        return None
    db.execute("UPDATE series SET state = 'running', attempts = attempts + 1 WHERE key = ?", (row["key"],))
    instances = _instances(db, row["key"])
    digest = digest_of_set([each.sop_instance_uid for each in instances])
    _note(db, now, "running", f"attempt {row['attempts'] + 1}, {len(instances)} instances", row["key"])
    earlier = db.execute(
        "SELECT folder FROM results WHERE series_key = ? ORDER BY id DESC", (row["previous"],)
    ).fetchone()
    folder = None if earlier is None else str(earlier["folder"])
    return Job(row["key"], row["series_uid"], digest, instances, row["attempts"] + 1, folder)


def _instances(db: sqlite3.Connection, key: str) -> tuple[InstanceRecord, ...]:
    rows = db.execute("SELECT * FROM instances WHERE series_key = ? ORDER BY sop_instance_uid", (key,))
    names = InstanceRecord.__dataclass_fields__
    return tuple(InstanceRecord(**{name: row[name] for name in names}) for row in rows)


def _is_still(db: sqlite3.Connection, key: str, set_digest: str) -> bool:
    """Whether a series is running, and with the instances that the job had."""
    row = _by_key(db, key)
    if row is None or row["state"] != "running":
        return False
    return digest_of_set([each.sop_instance_uid for each in _instances(db, key)]) == set_digest


def _commit(
    db: sqlite3.Connection, job: Job, answer: Answer, deliveries: tuple[tuple[str, str], ...], now: float
) -> bool:
    if not _is_still(db, job.key, job.set_digest):
        _note(db, now, "superseded", "its instances changed while it ran; that result is not kept", job.key)
        return False
    result = db.execute(
        "INSERT INTO results (series_key, revision, set_digest, folder, model, version, weights, demonstration, "
        "elapsed_s, committed_at) SELECT key, revision, ?, ?, ?, ?, ?, ?, ?, ? FROM series WHERE key = ?",
        (
            job.set_digest, answer.folder, answer.model, answer.version, answer.weights, int(answer.demonstration),
            answer.elapsed_s, now, job.key,
        ),
    ).lastrowid  # fmt: skip
    for each in answer.objects:
        row = (result, each.file, each.sop_class_uid, each.sop_instance_uid, each.sha256)
        db.execute("INSERT INTO objects VALUES (?, ?, ?, ?, ?)", row)
    for destination, file in deliveries:
        db.execute(
            "INSERT INTO deliveries (result_id, destination, file, state) VALUES (?, ?, ?, 'waiting')",
            (result, destination, file),
        )
    db.execute("UPDATE series SET state = 'done', reason = NULL, next_at = 0 WHERE key = ?", (job.key,))
    _note(db, now, "done", f"{answer.model} {answer.version} answered in {answer.elapsed_s:.1f} s", job.key)
    return True


def _leave(
    db: sqlite3.Connection, key: str, set_digest: str | None, state: str, reason: str, next_at: float, now: float
) -> bool:
    if set_digest is not None and not _is_still(db, key, set_digest):
        return False
    changed = db.execute(
        "UPDATE series SET state = ?, reason = ?, next_at = ? WHERE key = ?", (state, reason, next_at, key)
    ).rowcount
    if changed:
        _note(db, now, "retry" if state == "complete" else state, reason, key)
    return bool(changed)


def _worker_died(db: sqlite3.Connection, job: Job, reason: str, now: float) -> bool:
    if not _is_still(db, job.key, job.set_digest):
        return False
    db.execute("UPDATE series SET deaths = deaths + 1 WHERE key = ?", (job.key,))
    (deaths,) = db.execute("SELECT deaths FROM series WHERE key = ?", (job.key,)).fetchone()
    state = "complete" if deaths < 2 else "aside"
    _leave(db, job.key, None, state, reason if deaths < 2 else f"{reason}, twice", now, now)
    return bool(deaths < 2)


def _sent(db: sqlite3.Connection, delivery: int, text: str, now: float) -> None:
    db.execute(
        "UPDATE deliveries SET state = 'sent', sent_at = ?, last_error = NULL, attempts = attempts + 1 "
        "WHERE id = ? AND state != 'sent'",
        (now, delivery),
    )
    row = db.execute(
        "SELECT r.series_key, d.destination, d.result_id FROM deliveries d JOIN results r ON r.id = d.result_id "
        "WHERE d.id = ?",
        (delivery,),
    ).fetchone()
    _note(db, now, "sent", text, row["series_key"], row["destination"])
    done = db.execute(
        "UPDATE series SET state = 'delivered', reason = NULL WHERE key = ? AND state = 'done' AND NOT EXISTS "
        "(SELECT 1 FROM deliveries WHERE result_id = ? AND state IN ('waiting', 'dead'))",
        (row["series_key"], row["result_id"]),
    )
    if done.rowcount:
        _note(db, now, "delivered", "every object is at every destination", row["series_key"])


def _not_sent(db: sqlite3.Connection, delivery: int, error: str, wait_s: float | None, now: float) -> None:
    state = "dead" if wait_s is None else "waiting"
    db.execute(
        "UPDATE deliveries SET state = ?, last_error = ?, next_at = ?, attempts = attempts + 1 "
        "WHERE id = ? AND state = 'waiting'",
        (state, error, now + (wait_s or 0.0), delivery),
    )
    if wait_s is not None:
        return
    row = db.execute(
        "SELECT r.series_key, d.destination FROM deliveries d JOIN results r ON r.id = d.result_id WHERE d.id = ?",
        (delivery,),
    ).fetchone()
    reason = f"not delivered to {row['destination']}: {error}"
    db.execute(
        "UPDATE series SET state = 'dead', reason = ? WHERE key = ? AND state = 'done'", (reason, row["series_key"])
    )
    _note(db, now, "dead", reason, row["series_key"], row["destination"])


def _retry(db: sqlite3.Connection, key: str, by: str, now: float) -> bool:
    row = _by_key(db, key)
    if row is None or row["state"] not in ("aside", "dead", "discarded", "done", "complete"):
        return False
    if _has_result(db, key):
        sends = db.execute(
            "UPDATE deliveries SET state = 'waiting', next_at = 0 WHERE state != 'sent' AND result_id IN "
            "(SELECT id FROM results WHERE series_key = ?)",
            (key,),
        ).rowcount
        (left,) = db.execute(
            "SELECT count(*) FROM deliveries WHERE result_id IN (SELECT id FROM results WHERE series_key = ?)", (key,)
        ).fetchone()
        state = "delivered" if left and not sends else "done"
    else:
        state = "complete"
        db.execute("DELETE FROM refusals WHERE series_key = ?", (key,))
    db.execute(
        "UPDATE series SET state = ?, reason = NULL, attempts = 0, deaths = 0, interruptions = 0, next_at = 0 "
        "WHERE key = ?",
        (state, key),
    )
    _note(db, now, "retried", f"by {by}", key)
    return True


def _discard(db: sqlite3.Connection, key: str, by: str, now: float) -> bool:
    row = _by_key(db, key)
    if row is None or row["state"] in ("discarded", "delivered"):
        return False
    db.execute("UPDATE series SET state = 'discarded', reason = ?, next_at = 0 WHERE key = ?", (f"by {by}", key))
    db.execute(
        "UPDATE deliveries SET state = 'withdrawn' WHERE state IN ('waiting', 'dead') AND result_id IN "
        "(SELECT id FROM results WHERE series_key = ?)",
        (key,),
    )
    _note(db, now, "discarded", f"by {by}", key)
    return True
