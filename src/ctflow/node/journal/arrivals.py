"""The journal's writes for instances as they arrive, until their series is complete: each function is one change."""

from __future__ import annotations

import sqlite3

from ctflow.node.journal.records import Arrival, Receipt, Why
from ctflow.node.journal.runs import add_run, remove_runs, runs_of, set_run, show_runs
from ctflow.node.journal.same_uid import decide_same_uid
from ctflow.node.journal.writes import (
    has_result,
    is_pruned,
    key_of,
    note_event,
    prefix_of,
    retry_series,
    series_of_key,
    set_series_aside,
)


def _newest(db: sqlite3.Connection, study_uid: str, series_uid: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM series WHERE study_uid = ? AND series_uid = ? ORDER BY revision DESC LIMIT 1",
        (study_uid, series_uid),
    ).fetchone()
    return row


def receive_instance(
    db: sqlite3.Connection, arrival: Arrival, now: float, most_instances: int, most_bytes: int
) -> Receipt:
    """Add an instance on the disk to its series; return the verdict for the sender."""
    series = _newest(db, arrival.study_uid, arrival.series_uid)
    if series is not None:
        known = db.execute(
            "SELECT * FROM instances WHERE series_key = ? AND sop_instance_uid = ?",
            (series["key"], arrival.sop_instance_uid),
        ).fetchone()
        if known is not None:
            if known["sha256"] in (arrival.sha256, arrival.same_as):
                return _came_again(db, series, arrival, now)
            grown = int(series["bytes"]) - int(known["bytes"]) + arrival.bytes
            if arrival.same_uid == "newest" and grown > most_bytes:
                return _too_much(db, series, arrival, now, most_instances, most_bytes)
            return decide_same_uid(db, series, known, arrival, now, lambda: _open_series(db, series, arrival, now))
        is_over = series["instances"] >= most_instances or series["bytes"] + arrival.bytes > most_bytes
        if is_over and not is_pruned(db, series["key"]):
            return _too_much(db, series, arrival, now, most_instances, most_bytes)
    if not arrival.file:
        return Receipt("again", "")
    series = _open_series(db, series, arrival, now)
    key = str(series["key"])
    db.execute(
        "INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)",
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


def _came_again(db: sqlite3.Connection, series: sqlite3.Row, arrival: Arrival, now: float) -> Receipt:
    key = str(series["key"])
    db.execute("DELETE FROM refusals WHERE series_key = ? AND sop_instance_uid = ?", (key, arrival.sop_instance_uid))
    db.execute("UPDATE series SET duplicates = duplicates + 1 WHERE key = ?", (key,))
    if series["state"] == "discarded":  # a sender that sends it again wants it
        if has_result(db, key):
            retry_series(db, key, arrival.calling_ae, now)
        else:
            _reopen(db, series, now, arrival)
    if series["state"] in ("received", "discarded"):
        db.execute("UPDATE series SET last_at = ? WHERE key = ?", (now, key))
    return Receipt("duplicate", key)


def _too_much(
    db: sqlite3.Connection, series: sqlite3.Row, arrival: Arrival, now: float, most_instances: int, most_bytes: int
) -> Receipt:
    text = f"more than {most_instances} instances or {most_bytes >> 20} MB: raise the limits of a series, then retry"
    if series["state"] in ("received", "complete", "running"):
        set_series_aside(db, series["key"], Why("series-too-large", text), now, arrival.peer)
    return Receipt("too-much", str(series["key"]))


def _open_series(db: sqlite3.Connection, series: sqlite3.Row | None, arrival: Arrival, now: float) -> sqlite3.Row:
    """The revision that an instance belongs to, in the state "received"."""
    if series is None:
        return _begin(db, arrival, now, None)
    # It may be in delivery, or its files may be gone: more instances make another revision.
    if has_result(db, series["key"]) or is_pruned(db, series["key"]):
        _supersede(db, series, now)
        return _begin(db, arrival, now, series)
    if series["state"] != "received":
        _reopen(db, series, now, arrival)
    return series


def _supersede(db: sqlite3.Connection, series: sqlite3.Row, now: float) -> None:
    """Discard the runs of an earlier revision that have no result yet: those of the later one have more instances."""
    text = f"instances came: revision {series['revision'] + 1} has them"
    for row in runs_of(db, series["key"]):
        if row["state"] in ("complete", "running"):
            set_run(db, row["id"], "discarded", Why("superseded", text))
            note_event(db, now, "superseded", f"{prefix_of(row['model'])}{text}", series["key"], model=row["model"])


def _begin(db: sqlite3.Connection, arrival: Arrival, now: float, earlier: sqlite3.Row | None) -> sqlite3.Row:
    """Begin a new series, or a new revision with the instances of the earlier one."""
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
            "received_at, replaced FROM instances WHERE series_key = ?",
            (key, previous),
        )
        db.execute(
            "UPDATE series SET (instances, bytes) = (SELECT count(*), CAST(total(bytes) AS INTEGER) FROM instances "
            "WHERE series_key = ?), expected_instances = (SELECT expected_instances FROM series WHERE key = ?) "
            "WHERE key = ?",
            (key, previous, key),
        )
        what = "the removal" if is_pruned(db, str(previous)) else "the result"
        text = f"revision {revision}: an instance arrived after {what} of revision {revision - 1}, {text}"
    note_event(db, now, "received", text, key, arrival.peer)
    found = series_of_key(db, key)
    if found is None:
        raise ValueError("a series that was just begun is gone")
    return found


def _reopen(db: sqlite3.Connection, series: sqlite3.Row, now: float, arrival: Arrival) -> None:
    remove_runs(db, series["key"])
    db.execute(
        "UPDATE series SET state = 'received', reason = NULL, message = NULL, attempts = 0, next_at = 0 WHERE key = ?",
        (series["key"],),
    )
    note_event(db, now, "reopened", f"an instance arrived while it was {series['state']}", series["key"], arrival.peer)


def _complete_counted(db: sqlite3.Connection, key: str, now: float) -> bool:
    """Complete a series at once if it has as many instances as its sender announced."""
    done = db.execute(
        "SELECT 1 FROM series WHERE key = ? AND state = 'received' AND instances = expected_instances "
        "AND NOT EXISTS (SELECT 1 FROM refusals WHERE series_key = ?)",
        (key, key),
    ).fetchone()
    if done is not None:
        _complete(db, key, now, "as many instances as the sender announced")
    return done is not None


def _complete(db: sqlite3.Connection, key: str, now: float, why: str) -> None:
    """Complete a series: it has a run, whose model is decided when its headers are read."""
    add_run(db, key, now)
    show_runs(db, key)
    note_event(db, now, "complete", why, key)


def note_refused(db: sqlite3.Connection, arrival: Arrival, now: float, why: str) -> None:
    """Record a refused instance: its series must not look whole."""
    series = _open_series(db, _newest(db, arrival.study_uid, arrival.series_uid), arrival, now)
    key = series["key"]
    added = db.execute("INSERT OR IGNORE INTO refusals VALUES (?, ?, ?)", (key, arrival.sop_instance_uid, now))
    db.execute("UPDATE series SET last_at = ? WHERE key = ?", (now, key))
    (count,) = db.execute("SELECT count(*) FROM refusals WHERE series_key = ?", (key,)).fetchone()
    if added.rowcount and count == 1:  # one line for the first, not for each of a thousand
        note_event(db, now, "refused", why, key, arrival.peer)


def complete_quiet_series(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    """Complete every series that has been quiet for `quiet_s`; return their keys."""
    rows = db.execute(
        "SELECT key FROM series s WHERE state = 'received' AND instances > 0 AND last_at <= ? "
        "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key)",
        (now - quiet_s,),
    ).fetchall()
    for row in rows:
        _complete(db, row["key"], now, f"no instance arrived for {quiet_s:g} s")
    return tuple(str(row["key"]) for row in rows)


# When the last instance of any series of the study came by now (two parameters), also of objects that are not run. What
# came later than now came before the clock was set back.
STUDY_AT = """max(s.last_at,
    coalesce((SELECT max(x.last_at) FROM series x WHERE x.study_uid = s.study_uid AND x.last_at <= ?), 0),
    coalesce((SELECT max(received_at) FROM left_out l WHERE l.study_uid = s.study_uid AND received_at <= ?), 0))"""


def complete_quiet_studies(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    """Complete every series of each study that has been quiet for `quiet_s`; return their keys."""
    rows = db.execute(
        f"SELECT key FROM series s WHERE state = 'received' AND instances > 0 AND {STUDY_AT} <= ? "  # noqa: S608
        "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key) ORDER BY first_at, key",
        (now, now, now - quiet_s),
    ).fetchall()
    for row in rows:
        _complete(db, row["key"], now, f"no instance of its study arrived for {quiet_s:g} s")
    return tuple(str(row["key"]) for row in rows)


def give_up_refused_series(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    """Set aside every quiet series with refused instances that did not come again; return their keys."""
    rows = db.execute(
        "SELECT s.key, count(*) AS n FROM series s JOIN refusals r ON r.series_key = s.key "
        "WHERE s.state = 'received' AND s.last_at <= ? GROUP BY s.key",
        (now - quiet_s,),
    ).fetchall()
    for row in rows:
        text = f"{row['n']} instances were refused for lack of disk space and not sent again: resend the series"
        set_series_aside(db, row["key"], Why("not-sent-again", text), now)
    return tuple(str(row["key"]) for row in rows)
