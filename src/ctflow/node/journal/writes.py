"""The journal's writes for jobs, results and deliveries: each function is one change, within a transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Sequence

from ctflow.node.journal.reading import record_of_row
from ctflow.node.journal.records import InstanceRecord, Job, Why, WorkerResult


def key_of(study_uid: str, series_uid: str, revision: int) -> str:
    """Name of a revision of a series: 32 hexadecimal digits, whatever the peer's UIDs hold."""
    return hashlib.sha256(json.dumps([study_uid, series_uid, revision]).encode()).hexdigest()[:32]


def digest_of_set(identities: Sequence[str]) -> str:
    """Digest of a set of instances (`InstanceRecord.identity`), in any order: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(identities)).encode()).hexdigest()[:32]


def note_event(
    db: sqlite3.Connection, now: float, kind: str, text: str, key: str | None = None, peer: str | None = None
) -> None:
    """Add an event to the node's history, with its series if it has one."""
    db.execute(
        "INSERT INTO events (at, kind, series_key, peer, text) VALUES (?, ?, ?, ?, ?)", (now, kind, key, peer, text)
    )


def has_result(db: sqlite3.Connection, key: str) -> bool:
    """Whether a series has a model's result."""
    return db.execute("SELECT 1 FROM results WHERE series_key = ?", (key,)).fetchone() is not None


def series_of_key(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    """A series' row; None where there is none."""
    row: sqlite3.Row | None = db.execute("SELECT * FROM series WHERE key = ?", (key,)).fetchone()
    return row


def recover_jobs(db: sqlite3.Connection) -> tuple[str, ...]:
    """Queue again the series that ran when the node ended; return the keys."""
    rows = db.execute("SELECT key FROM series WHERE state = 'running'").fetchall()
    db.execute(
        "UPDATE series SET state = 'complete', interruptions = interruptions + 1, attempts = max(attempts - 1, 0) "
        "WHERE state = 'running'"
    )
    return tuple(str(row["key"]) for row in rows)


def claim_job(db: sqlite3.Connection, now: float, beside: Collection[str] = ()) -> Job | None:
    """Take the next job and mark it as running; beside these only if it may (`Journal.claim`)."""
    row = db.execute(
        "SELECT * FROM series WHERE state = 'complete' AND next_at <= ? ORDER BY interruptions, first_at LIMIT 1",
        (now,),
    ).fetchone()
    if row is None or (beside and (row["attempts"] or row["key"] in beside)):
        return None
    db.execute("UPDATE series SET state = 'running', attempts = attempts + 1 WHERE key = ?", (row["key"],))
    instances = _instances(db, row["key"])
    digest = digest_of_set([each.identity for each in instances])
    note_event(db, now, "running", f"attempt {row['attempts'] + 1}, {len(instances)} instances", row["key"])
    earlier = db.execute(
        "SELECT folder FROM results WHERE series_key = ? ORDER BY id DESC", (row["previous"],)
    ).fetchone()
    folder = None if earlier is None else str(earlier["folder"])
    return Job(row["key"], row["series_uid"], digest, instances, row["attempts"] + 1, folder)


def _instances(db: sqlite3.Connection, key: str) -> tuple[InstanceRecord, ...]:
    rows = db.execute("SELECT * FROM instances WHERE series_key = ? ORDER BY sop_instance_uid", (key,))
    return tuple(record_of_row(InstanceRecord, row) for row in rows)


def _is_still(db: sqlite3.Connection, key: str, set_digest: str) -> bool:
    """Whether a series still runs with the job's instances."""
    row = series_of_key(db, key)
    if row is None or row["state"] != "running":
        return False
    return digest_of_set([each.identity for each in _instances(db, key)]) == set_digest


def commit_job(
    db: sqlite3.Connection, job: Job, answer: WorkerResult, deliveries: tuple[tuple[str, str], ...], now: float
) -> bool:
    """Record a job's result and its deliveries; False if the series changed meanwhile."""
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
    """End a job without a result, in this state."""
    if set_digest is not None and not _is_still(db, key, set_digest):
        return False
    changed = set_state(db, key, state, why, next_at)
    if changed:
        note_event(db, now, "retry" if state == "complete" else state, why.message, key)
    return changed


def set_state(db: sqlite3.Connection, key: str, state: str, why: Why, next_at: float = 0.0) -> bool:
    """Change the state of a series; return whether the series exists."""
    changed = db.execute(
        "UPDATE series SET state = ?, reason = ?, message = ?, next_at = ? WHERE key = ?", (state, *why, next_at, key)
    )
    return bool(changed.rowcount)


def note_worker_died(db: sqlite3.Connection, job: Job, how: str, now: float) -> bool:
    """Record that a worker died on a job; return whether it is tried again: not if the series changed meanwhile."""
    if not _is_still(db, job.key, job.set_digest):
        return False
    db.execute("UPDATE series SET deaths = deaths + 1 WHERE key = ?", (job.key,))
    (deaths,) = db.execute("SELECT deaths FROM series WHERE key = ?", (job.key,)).fetchone()
    state = "complete" if deaths < 2 else "aside"
    leave_job(db, job.key, None, state, Why("worker-died", how if deaths < 2 else f"{how}, twice"), now, now)
    return bool(deaths < 2)


def note_sent(db: sqlite3.Connection, delivery: int, text: str, now: float) -> None:
    """Record a successful delivery."""
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
    """Record a failed delivery, to be retried after a wait or, without one, never."""
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
    """Retry a series at a person's request; False if it cannot be retried."""
    row = series_of_key(db, key)
    if row is None or row["state"] not in ("aside", "dead", "discarded", "done", "complete"):
        return False
    if has_result(db, key):
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
    """Discard a series at a person's request; False if it cannot be discarded."""
    row = series_of_key(db, key)
    if row is None or row["state"] in ("discarded", "delivered"):
        return False
    set_state(db, key, "discarded", Why("discarded", f"by {by}"))
    db.execute(
        "UPDATE deliveries SET state = 'withdrawn' WHERE state IN ('waiting', 'dead') AND result_id IN "
        "(SELECT id FROM results WHERE series_key = ?)",
        (key,),
    )
    note_event(db, now, "discarded", f"by {by}", key)
    return True
