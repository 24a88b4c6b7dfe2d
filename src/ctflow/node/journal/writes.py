"""What the journal writes: each function is one change, within a transaction of the journal's writer."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence

from ctflow.core.volume import digest_of_uid
from ctflow.node.journal.records import Arrival, InstanceRecord, Job, Receipt, Why, WorkerResult


def key_of(study_uid: str, series_uid: str, revision: int) -> str:
    """Name of a revision of a series: 32 hexadecimal digits, whatever the peer's UIDs hold."""
    return hashlib.sha256(json.dumps([study_uid, series_uid, revision]).encode()).hexdigest()[:32]


def digest_of_set(sop_instance_uids: Sequence[str]) -> str:
    """Digest of a set of instances, in any order: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(sop_instance_uids)).encode()).hexdigest()[:32]


def note_event(
    db: sqlite3.Connection, now: float, kind: str, text: str, key: str | None = None, peer: str | None = None
) -> None:
    """An event of the node's history, of a series where it has one."""
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


def receive_instance(
    db: sqlite3.Connection, arrival: Arrival, now: float, most_instances: int, most_bytes: int
) -> Receipt:
    """An instance on the disk becomes part of its series, and what the sender is to be told."""
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
            what += ", or content in another transfer syntax that cannot be compared"
        text = (
            f"instance {digest_of_uid(arrival.sop_instance_uid)} was received again with {what}; the first one is kept"
        )
        note_event(db, now, "conflict", text, key, arrival.peer)
        return Receipt("conflict", key)
    db.execute("UPDATE series SET duplicates = duplicates + 1 WHERE key = ?", (key,))
    if series["state"] == "discarded":  # whoever sends it again wants it
        if _has_result(db, key):
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
        _set_state(db, series["key"], "aside", Why("series-too-large", text))
        note_event(db, now, "aside", text, series["key"], arrival.peer)
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
        text = f"revision {revision}: an instance arrived after the result of revision {revision - 1}, {text}"
    note_event(db, now, "received", text, key, arrival.peer)
    found = _by_key(db, key)
    if found is None:
        raise ValueError("a series that was just begun is gone")
    return found


def _reopen(db: sqlite3.Connection, series: sqlite3.Row, now: float, arrival: Arrival) -> None:
    db.execute(
        "UPDATE series SET state = 'received', reason = NULL, message = NULL, attempts = 0, deaths = 0, next_at = 0 "
        "WHERE key = ?",
        (series["key"],),
    )
    note_event(db, now, "reopened", f"an instance arrived while it was {series['state']}", series["key"], arrival.peer)


def _complete_counted(db: sqlite3.Connection, key: str, now: float) -> bool:
    """Complete a series at once where it has as many instances as its sender said."""
    done = db.execute(
        "UPDATE series SET state = 'complete' WHERE key = ? AND state = 'received' AND instances = expected_instances "
        "AND NOT EXISTS (SELECT 1 FROM refusals WHERE series_key = ?)",
        (key, key),
    )
    if done.rowcount:
        note_event(db, now, "complete", "as many instances as the sender announced", key)
    return bool(done.rowcount)


def note_refused(db: sqlite3.Connection, arrival: Arrival, now: float, why: str) -> None:
    """An instance was refused: its series must not look whole."""
    series = _open_series(db, _newest(db, arrival.study_uid, arrival.series_uid), arrival, now)
    key = series["key"]
    added = db.execute("INSERT OR IGNORE INTO refusals VALUES (?, ?, ?)", (key, arrival.sop_instance_uid, now))
    db.execute("UPDATE series SET last_at = ? WHERE key = ?", (now, key))
    (count,) = db.execute("SELECT count(*) FROM refusals WHERE series_key = ?", (key,)).fetchone()
    if added.rowcount and count == 1:  # one line for the first, not one for each of a thousand
        note_event(db, now, "refused", why, key, arrival.peer)


def complete_quiet_series(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    """Complete every series that has been quiet for so long; their keys."""
    rows = db.execute(
        "SELECT key FROM series s WHERE state = 'received' AND instances > 0 AND last_at <= ? "
        "AND NOT EXISTS (SELECT 1 FROM refusals r WHERE r.series_key = s.key)",
        (now - quiet_s,),
    ).fetchall()
    for row in rows:
        db.execute("UPDATE series SET state = 'complete' WHERE key = ?", (row["key"],))
        note_event(db, now, "complete", f"no instance arrived for {quiet_s:g} s", row["key"])
    return tuple(str(row["key"]) for row in rows)


def give_up_refused_series(db: sqlite3.Connection, now: float, quiet_s: float) -> tuple[str, ...]:
    """Set aside every quiet series with instances that were refused and did not come again; their keys."""
    rows = db.execute(
        "SELECT s.key, count(*) AS n FROM series s JOIN refusals r ON r.series_key = s.key "
        "WHERE s.state = 'received' AND s.last_at <= ? GROUP BY s.key",
        (now - quiet_s,),
    ).fetchall()
    for row in rows:
        text = f"{row['n']} instances were refused for lack of disk space and not sent again: resend the series"
        _set_state(db, row["key"], "aside", Why("not-sent-again", text))
        note_event(db, now, "aside", text, row["key"])
    return tuple(str(row["key"]) for row in rows)


def recover_jobs(db: sqlite3.Connection) -> tuple[str, ...]:
    """What ran when the node ended is to be run again; the keys."""
    rows = db.execute("SELECT key FROM series WHERE state = 'running'").fetchall()
    db.execute(
        "UPDATE series SET state = 'complete', interruptions = interruptions + 1, attempts = max(attempts - 1, 0) "
        "WHERE state = 'running'"
    )
    return tuple(str(row["key"]) for row in rows)


def claim_job(db: sqlite3.Connection, now: float) -> Job | None:
    """The next job, from now on running."""
    row = db.execute(
        "SELECT * FROM series WHERE state = 'complete' AND next_at <= ? ORDER BY interruptions, first_at LIMIT 1",
        (now,),
    ).fetchone()
    if row is None:
        return None
    db.execute("UPDATE series SET state = 'running', attempts = attempts + 1 WHERE key = ?", (row["key"],))
    instances = _instances(db, row["key"])
    digest = digest_of_set([each.sop_instance_uid for each in instances])
    note_event(db, now, "running", f"attempt {row['attempts'] + 1}, {len(instances)} instances", row["key"])
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


def commit_job(
    db: sqlite3.Connection, job: Job, answer: WorkerResult, deliveries: tuple[tuple[str, str], ...], now: float
) -> bool:
    """A job's answer and its deliveries; False where the series changed meanwhile."""
    if not _is_still(db, job.key, job.set_digest):
        note_event(db, now, "superseded", "its instances changed while it ran; that result is discarded", job.key)
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
    db.execute("UPDATE series SET state = 'done', reason = NULL, message = NULL, next_at = 0 WHERE key = ?", (job.key,))
    note_event(db, now, "done", f"{answer.model} {answer.version} answered in {answer.elapsed_s:.1f} s", job.key)
    return True


def leave_job(
    db: sqlite3.Connection, key: str, set_digest: str | None, state: str, why: Why, next_at: float, now: float
) -> bool:
    """A job ends without an answer, in this state."""
    if set_digest is not None and not _is_still(db, key, set_digest):
        return False
    changed = _set_state(db, key, state, why, next_at)
    if changed:
        note_event(db, now, "retry" if state == "complete" else state, why.message, key)
    return changed


def _set_state(db: sqlite3.Connection, key: str, state: str, why: Why, next_at: float = 0.0) -> bool:
    changed = db.execute(
        "UPDATE series SET state = ?, reason = ?, message = ?, next_at = ? WHERE key = ?", (state, *why, next_at, key)
    )
    return bool(changed.rowcount)


def note_worker_died(db: sqlite3.Connection, job: Job, how: str, now: float) -> bool:
    """A worker died over a job; whether it is tried again, which it is not where the series changed meanwhile."""
    if not _is_still(db, job.key, job.set_digest):
        return False
    db.execute("UPDATE series SET deaths = deaths + 1 WHERE key = ?", (job.key,))
    (deaths,) = db.execute("SELECT deaths FROM series WHERE key = ?", (job.key,)).fetchone()
    state = "complete" if deaths < 2 else "aside"
    leave_job(db, job.key, None, state, Why("worker-died", how if deaths < 2 else f"{how}, twice"), now, now)
    return bool(deaths < 2)


def note_sent(db: sqlite3.Connection, delivery: int, text: str, now: float) -> None:
    """A delivery arrived."""
    db.execute(
        "UPDATE deliveries SET state = 'sent', sent_at = ?, last_reason = NULL, last_error = NULL, "
        "attempts = attempts + 1 WHERE id = ? AND state != 'sent'",
        (now, delivery),
    )
    row = db.execute(
        "SELECT r.series_key, d.destination, d.result_id FROM deliveries d JOIN results r ON r.id = d.result_id "
        "WHERE d.id = ?",
        (delivery,),
    ).fetchone()
    note_event(db, now, "sent", text, row["series_key"], row["destination"])
    done = db.execute(
        "UPDATE series SET state = 'delivered', reason = NULL, message = NULL WHERE key = ? AND state = 'done' "
        "AND NOT EXISTS (SELECT 1 FROM deliveries WHERE result_id = ? AND state IN ('waiting', 'dead'))",
        (row["series_key"], row["result_id"]),
    )
    if done.rowcount:
        note_event(db, now, "delivered", "every object is at every destination", row["series_key"])


def note_not_sent(db: sqlite3.Connection, delivery: int, why: Why, wait_s: float | None, now: float) -> None:
    """A delivery failed, to be tried after a wait or, without one, no more."""
    state = "dead" if wait_s is None else "waiting"
    db.execute(
        "UPDATE deliveries SET state = ?, last_reason = ?, last_error = ?, next_at = ?, attempts = attempts + 1 "
        "WHERE id = ? AND state = 'waiting'",
        (state, *why, now + (wait_s or 0.0), delivery),
    )
    if wait_s is not None:
        return
    row = db.execute(
        "SELECT r.series_key, d.destination FROM deliveries d JOIN results r ON r.id = d.result_id WHERE d.id = ?",
        (delivery,),
    ).fetchone()
    text = f"not delivered to {row['destination']}: {why.message}"
    db.execute(
        "UPDATE series SET state = 'dead', reason = ?, message = ? WHERE key = ? AND state = 'done'",
        (why.reason, text, row["series_key"]),
    )
    note_event(db, now, "dead", text, row["series_key"], row["destination"])


def retry_series(db: sqlite3.Connection, key: str, by: str, now: float) -> bool:
    """A person wants a series tried again; False where it cannot be."""
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
        "UPDATE series SET state = ?, reason = NULL, message = NULL, attempts = 0, deaths = 0, interruptions = 0, "
        "next_at = 0 WHERE key = ?",
        (state, key),
    )
    note_event(db, now, "retried", f"by {by}", key)
    return True


def discard_series(db: sqlite3.Connection, key: str, by: str, now: float) -> bool:
    """A person gives a series up; False where it cannot be."""
    row = _by_key(db, key)
    if row is None or row["state"] in ("discarded", "delivered"):
        return False
    _set_state(db, key, "discarded", Why("discarded", f"by {by}"))
    db.execute(
        "UPDATE deliveries SET state = 'withdrawn' WHERE state IN ('waiting', 'dead') AND result_id IN "
        "(SELECT id FROM results WHERE series_key = ?)",
        (key,),
    )
    note_event(db, now, "discarded", f"by {by}", key)
    return True
