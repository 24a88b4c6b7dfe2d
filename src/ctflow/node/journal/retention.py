"""The journal's part in retention: which series are finished, and what it records before their files are removed.

Rows of instances go in the same transaction that says why; the files go after it. A file that a crash leaves behind is
then one that the journal does not know, or a result that it knows as removed: the next start removes both.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctflow.core.errors import counted
from ctflow.core.volume import digest_of_uid
from ctflow.node.journal.same_uid import is_referred_to
from ctflow.node.journal.writes import note_event

What = Literal["instances", "results", "left-out"]
_MOST_EVENTS = 5000  # in one change: the journal has other writers
# The moment at which a series was finished: its last instance, result or delivery.
_FINISHED_AT = """max(s.last_at,
    coalesce((SELECT max(r.committed_at) FROM results r WHERE r.series_key = s.key), 0),
    coalesce((SELECT max(d.sent_at) FROM deliveries d JOIN results r ON r.id = d.result_id
        WHERE r.series_key = s.key), 0))
"""
_UNSENT = """EXISTS (SELECT 1 FROM deliveries d JOIN results r ON r.id = d.result_id
    WHERE r.series_key = s.key AND d.state IN ('waiting', 'stored', 'dead'))"""
_RESULT = "EXISTS (SELECT 1 FROM results r WHERE r.series_key = s.key)"
# What waits, runs, or is to be sent is never finished; what a person discarded is.
_DELIVERED = f"(s.state = 'discarded' OR (s.state = 'delivered' AND NOT {_UNSENT}))"
_FINISHED = f"""({_DELIVERED} OR s.state = 'aside' AND NOT {_UNSENT} OR s.state = 'dead' AND NOT {_RESULT}
    OR s.state = 'done' AND NOT {_UNSENT})"""


@dataclass(frozen=True)
class Finished:
    """A finished series whose files are, in part, still there.

    Attributes:
        key: The series.
        digest: Its name in messages.
        state: Its state.
        at: Unix time at which it was finished.
        instances: How many it has on the disk.
        bytes: Their bytes, without those that other revisions also have.
        results: Number and folder of each result that is on the disk.
    """

    key: str
    digest: str
    state: str
    at: float
    instances: int
    bytes: int
    results: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class LeftOut:
    """Objects of one series that were kept and not run; `at` is when the last one came."""

    study_uid: str
    series_uid: str
    at: float
    objects: int
    bytes: int

    @property
    def digest(self) -> str:
        """The name of their series in messages."""
        return digest_of_uid(self.series_uid)


def finished_series(db: sqlite3.Connection, *, only_delivered: bool) -> tuple[Finished, ...]:
    """The finished series that still have files, the oldest first."""
    wanted = _DELIVERED if only_delivered else _FINISHED
    rows = db.execute(
        f"SELECT s.key, s.series_uid, s.state, {_FINISHED_AT} AS at, "  # noqa: S608
        "(SELECT count(*) FROM instances i WHERE i.series_key = s.key) AS instances, "
        "(SELECT total(i.bytes) FROM instances i WHERE i.series_key = s.key AND NOT EXISTS "
        "(SELECT 1 FROM instances o WHERE o.file = i.file AND o.series_key != s.key)) AS bytes "
        f"FROM series s WHERE {wanted} ORDER BY at, s.key"
    ).fetchall()
    found = []
    for row in rows:
        results = db.execute(
            "SELECT id, folder FROM results WHERE series_key = ? AND id NOT IN (SELECT result_id FROM pruned_results)",
            (row["key"],),
        ).fetchall()
        if row["instances"] or results:
            pairs = tuple((int(each["id"]), str(each["folder"])) for each in results)
            digest = digest_of_uid(row["series_uid"])
            found.append(
                Finished(row["key"], digest, row["state"], row["at"], row["instances"], int(row["bytes"]), pairs)
            )
    return tuple(found)


def left_out_series(db: sqlite3.Connection) -> tuple[LeftOut, ...]:
    """The objects that are kept and not run, by series, the oldest first."""
    rows = db.execute(
        "SELECT study_uid, series_uid, max(received_at) AS at, count(*) AS objects, total(bytes) AS bytes "
        "FROM left_out GROUP BY study_uid, series_uid ORDER BY at"
    )
    return tuple(
        LeftOut(row["study_uid"], row["series_uid"], row["at"], row["objects"], int(row["bytes"])) for row in rows
    )


def _is_finished(db: sqlite3.Connection, key: str) -> bool:
    question = f"SELECT 1 FROM series s WHERE s.key = ? AND {_FINISHED}"  # noqa: S608
    return db.execute(question, (key,)).fetchone() is not None


def prune_instances(db: sqlite3.Connection, now: float, key: str, why: str) -> tuple[str, ...]:
    """Forget the instances of a series; return the files that nothing refers to any more.

    Nothing is forgotten if the series is not finished any more.
    """
    rows = db.execute("SELECT file FROM instances WHERE series_key = ?", (key,)).fetchall()
    if not rows or not _is_finished(db, key):
        return ()
    db.execute("DELETE FROM instances WHERE series_key = ?", (key,))
    db.execute("INSERT OR REPLACE INTO pruned_series VALUES (?, ?)", (key, now))
    note_event(db, now, "pruned", f"{counted(len(rows), 'instance is', 'instances are')} removed: {why}", key)
    return tuple(str(row["file"]) for row in rows if not is_referred_to(db, row["file"]))


def prune_results(db: sqlite3.Connection, now: float, key: str, why: str) -> tuple[str, ...]:
    """Record that the files of a series' results are removed; return their folders, if it is still finished."""
    rows = db.execute(
        "SELECT id, folder FROM results WHERE series_key = ? AND id NOT IN (SELECT result_id FROM pruned_results)",
        (key,),
    ).fetchall()
    if not rows or not _is_finished(db, key):
        return ()
    db.executemany("INSERT INTO pruned_results VALUES (?, ?, 0)", [(row["id"], now) for row in rows])
    note_event(db, now, "pruned", f"{len(rows)} results are removed: {why}", key)
    return tuple(str(row["folder"]) for row in rows)


def prune_left_out(db: sqlite3.Connection, now: float, which: LeftOut, why: str) -> tuple[str, ...]:
    """Forget objects that were kept and not run; return their files."""
    place = (which.study_uid, which.series_uid)
    rows = db.execute("SELECT file FROM left_out WHERE study_uid = ? AND series_uid = ?", place).fetchall()
    db.execute("DELETE FROM left_out WHERE study_uid = ? AND series_uid = ?", place)
    removed = counted(len(rows), "object that was not run is", "objects that were not run are")
    note_event(db, now, "pruned", f"series {which.digest}: {removed} removed: {why}")
    return tuple(str(row["file"]) for row in rows if not is_referred_to(db, row["file"]))


def folders_to_remove(db: sqlite3.Connection) -> tuple[str, ...]:
    """Folders of results that the journal knows as removed, but that may still be there."""
    rows = db.execute("SELECT folder FROM results r JOIN pruned_results p ON p.result_id = r.id WHERE p.gone = 0")
    return tuple(str(row["folder"]) for row in rows)


def note_gone(db: sqlite3.Connection, folders: Sequence[str]) -> None:
    """Record that the folders of pruned results are gone from the disk."""
    db.executemany(
        "UPDATE pruned_results SET gone = 1 WHERE result_id IN (SELECT id FROM results WHERE folder = ?)",
        [(folder,) for folder in folders],
    )


def old_events(db: sqlite3.Connection, before: float, told: int) -> int:
    """How many events are older and have been logged."""
    (count,) = db.execute(
        "SELECT count(*) FROM events WHERE at < ? AND id <= ? AND id < (SELECT max(id) FROM events)", (before, told)
    ).fetchone()
    return int(count)


def last_old_event(db: sqlite3.Connection, before: float, told: int) -> int:
    """Number of the last of those events; 0 where there is none. A reader looks for it, as it may take long."""
    (last,) = db.execute("SELECT max(id) FROM events WHERE at < ? AND id <= ?", (before, told)).fetchone()
    return int(last or 0)


def forget_events(db: sqlite3.Connection, before: float, told: int) -> int:
    """Forget some of the events that are older and have been logged; return how many: call again until it is 0."""
    return db.execute(
        "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE at < ? AND id <= ? "
        "AND id < (SELECT max(id) FROM events) ORDER BY id LIMIT ?)",  # else its number would be given again
        (before, told, _MOST_EVENTS),
    ).rowcount


_FORGETTABLE = f"""{_FINISHED} AND {_FINISHED_AT} < ?
    AND NOT EXISTS (SELECT 1 FROM instances i WHERE i.series_key = s.key)
    AND NOT EXISTS (SELECT 1 FROM results r WHERE r.series_key = s.key AND NOT EXISTS
        (SELECT 1 FROM pruned_results p WHERE p.result_id = r.id AND p.gone = 1))
    AND NOT EXISTS (SELECT 1 FROM events e WHERE e.series_key = s.key)"""  # noqa: S608  # words of this module


def forgettable_series(db: sqlite3.Connection, before: float) -> tuple[str, ...]:
    """Some finished series of which nothing is left on the disk and no event in the journal; a reader looks for them.

    That looks at every series, and a peer's instance must not wait for it.
    """
    rows = db.execute(f"SELECT s.key FROM series s WHERE {_FORGETTABLE} LIMIT 500", (before,))  # noqa: S608
    return tuple(str(row["key"]) for row in rows)


def forget_series(db: sqlite3.Connection, before: float, keys: Sequence[str]) -> int:
    """Forget those of these series of which still nothing is left; return how many."""
    question = f"SELECT 1 FROM series s WHERE s.key = ? AND {_FORGETTABLE}"  # noqa: S608
    of_results = "WHERE result_id IN (SELECT id FROM results WHERE series_key = ?)"
    forgotten = 0
    for name in keys:
        if db.execute(question, (name, before)).fetchone() is None:
            continue
        key = (name,)
        for table in ("deliveries", "objects", "pruned_results"):
            db.execute(f"DELETE FROM {table} {of_results}", key)  # noqa: S608
        db.execute("UPDATE series SET previous = NULL WHERE previous = ?", key)
        for table in ("results", "runs", "refusals", "pruned_series"):
            db.execute(f"DELETE FROM {table} WHERE series_key = ?", key)  # noqa: S608
        db.execute("DELETE FROM series WHERE key = ?", key)
        forgotten += 1
    return forgotten
