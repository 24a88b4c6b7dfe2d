"""The journal's writes for an instance whose UID is known with another content, and for objects that are not run."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from ctflow.core.volume import digest_of_uid
from ctflow.node.journal.records import Arrival, Receipt
from ctflow.node.journal.writes import note_event


def decide_same_uid(
    db: sqlite3.Connection,
    series: sqlite3.Row,
    known: sqlite3.Row,
    arrival: Arrival,
    now: float,
    opened: Callable[[], sqlite3.Row],
) -> Receipt:
    """Refuse an instance with other content than the known one, keep the first, or replace it.

    Args:
        db: The journal.
        series: The newest revision of its series.
        known: The instance that it has.
        arrival: The instance that came.
        now: Unix time.
        opened: The revision that gets the instance, in the state "received": a new one after a result.
    """
    key = str(series["key"])
    if arrival.same_uid == "refuse":
        what = "another content"
        if known["transfer_syntax"] != arrival.transfer_syntax:
            what += ", or content in another transfer syntax that cannot be compared"
        digest = digest_of_uid(arrival.sop_instance_uid)
        text = f"instance {digest} was received again with {what}; the first one is kept"
        note_event(db, now, "conflict", text, key, arrival.peer)
        return Receipt("conflict", key)
    if arrival.same_uid == "keep_first":
        text = "instances were received again with another content; the first ones are kept (same_uid: keep_first)"
        _note_once(db, now, "kept-first", text, key, arrival.peer)
        if series["state"] == "received":
            db.execute("UPDATE series SET last_at = ? WHERE key = ?", (now, key))
        return Receipt("kept-first", key)
    return _replace(db, str(opened()["key"]), known, arrival, now) if arrival.file else Receipt("again", key)


def _replace(db: sqlite3.Connection, key: str, known: sqlite3.Row, arrival: Arrival, now: float) -> Receipt:
    """Put an instance in the place of the known one."""
    uid = arrival.sop_instance_uid
    db.execute(
        "UPDATE instances SET sop_class_uid = ?, transfer_syntax = ?, file = ?, bytes = ?, sha256 = ?, "
        "received_at = ?, replaced = replaced + 1 WHERE series_key = ? AND sop_instance_uid = ?",
        (
            arrival.sop_class_uid, arrival.transfer_syntax, arrival.file, arrival.bytes, arrival.sha256, now, key, uid,
        ),
    )  # fmt: skip
    db.execute("DELETE FROM refusals WHERE series_key = ? AND sop_instance_uid = ?", (key, uid))
    grown = arrival.bytes - int(known["bytes"])
    db.execute("UPDATE series SET bytes = bytes + ?, last_at = ? WHERE key = ?", (grown, now, key))
    text = "instances were received again with another content and replace the earlier ones (same_uid: newest)"
    _note_once(db, now, "replaced", text, key, arrival.peer)
    old = str(known["file"])
    return Receipt("replaced", key, outdated=None if is_referred_to(db, old) else old)


def is_referred_to(db: sqlite3.Connection, file: str) -> bool:
    """Whether any instance or other object has this file."""
    question = "SELECT 1 FROM instances WHERE file = ? UNION ALL SELECT 1 FROM left_out WHERE file = ? LIMIT 1"
    return db.execute(question, (file, file)).fetchone() is not None


def _note_once(db: sqlite3.Connection, now: float, kind: str, text: str, key: str, peer: str) -> None:
    """Add an event unless the series' last one is the same: a series of a thousand instances has one line."""
    last = db.execute("SELECT kind FROM events WHERE series_key = ? ORDER BY id DESC LIMIT 1", (key,)).fetchone()
    if last is None or last["kind"] != kind:
        note_event(db, now, kind, text, key, peer)


def keep_left_out(
    db: sqlite3.Connection, arrival: Arrival, now: float, most_instances: int, most_bytes: int
) -> Receipt:
    """Record an object that is kept but not run: a Secondary Capture, a dose report."""
    place = (arrival.study_uid, arrival.series_uid, arrival.sop_instance_uid)
    known = db.execute(
        "SELECT * FROM left_out WHERE study_uid = ? AND series_uid = ? AND sop_instance_uid = ?", place
    ).fetchone()
    if known is not None and known["sha256"] == arrival.sha256:
        return Receipt("duplicate", "")
    who = f"series {digest_of_uid(arrival.series_uid)} from {arrival.calling_ae}"
    if known is not None and arrival.same_uid != "newest":
        if arrival.same_uid == "keep_first":
            return Receipt("kept-first", "")
        note_event(db, now, "conflict", f"{who}: an object came again with another content", peer=arrival.peer)
        return Receipt("conflict", "")
    count, length = db.execute(
        "SELECT count(*), total(bytes) FROM left_out WHERE study_uid = ? AND series_uid = ?", place[:2]
    ).fetchone()
    if count - (known is not None) >= most_instances or length + arrival.bytes > most_bytes:
        return Receipt("too-much", "")
    db.execute(
        "INSERT OR REPLACE INTO left_out VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *place, arrival.sop_class_uid, arrival.transfer_syntax, arrival.modality, arrival.calling_ae, arrival.peer,
            arrival.file, arrival.bytes, arrival.sha256, now,
        ),
    )  # fmt: skip
    if not count:  # one line for a series, not one for each object
        note_event(db, now, "left-out", f"{who}: objects that are no CT images are kept and not run", peer=arrival.peer)
    if known is None:
        return Receipt("new", "")
    old = str(known["file"])
    return Receipt("replaced", "", outdated=None if is_referred_to(db, old) else old)
