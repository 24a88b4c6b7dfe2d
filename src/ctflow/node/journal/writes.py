"""The journal's writes for jobs, results and deliveries: each function is one change, within a transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence

from ctflow.core.errors import counted
from ctflow.node.journal.reading import record_of_row
from ctflow.node.journal.records import DecidedRun, InstanceRecord, Job, Why, WorkerResult
from ctflow.node.journal.runs import add_run, decide_runs, run_of_id, runs_of, set_open_runs, set_run, show_runs


def key_of(study_uid: str, series_uid: str, revision: int) -> str:
    """Name of a revision of a series: 32 hexadecimal digits, whatever the peer's UIDs hold."""
    return hashlib.sha256(json.dumps([study_uid, series_uid, revision]).encode()).hexdigest()[:32]


def digest_of_set(identities: Sequence[str]) -> str:
    """Digest of a set of instances (`InstanceRecord.identity`), in any order: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(identities)).encode()).hexdigest()[:32]


def is_pruned(db: sqlite3.Connection, key: str) -> bool:
    """Whether instances or results of a series were removed: it cannot run or be sent again."""
    return (
        db.execute(
            "SELECT 1 FROM pruned_series WHERE series_key = ? UNION ALL "
            "SELECT 1 FROM pruned_results p JOIN results r ON r.id = p.result_id WHERE r.series_key = ? LIMIT 1",
            (key, key),
        ).fetchone()
        is not None
    )


def note_event(
    db: sqlite3.Connection,
    now: float,
    kind: str,
    text: str,
    key: str | None = None,
    peer: str | None = None,
    model: str | None = None,
) -> None:
    """Add an event to the node's history, with its series and model if it has one."""
    db.execute(
        "INSERT INTO events (at, kind, series_key, peer, text, model) VALUES (?, ?, ?, ?, ?, ?)",
        (now, kind, key, peer, text, model or None),
    )


def prefix_of(model: str) -> str:
    """How an event's text begins where it is about one of several models."""
    return f"{model}: " if model else ""


def has_result(db: sqlite3.Connection, key: str) -> bool:
    """Whether a series has a model's result."""
    return db.execute("SELECT 1 FROM results WHERE series_key = ?", (key,)).fetchone() is not None


def series_of_key(db: sqlite3.Connection, key: str) -> sqlite3.Row | None:
    """A series' row; None where there is none."""
    row: sqlite3.Row | None = db.execute("SELECT * FROM series WHERE key = ?", (key,)).fetchone()
    return row


def recover_jobs(db: sqlite3.Connection) -> tuple[str, ...]:
    """Queue again what ran when the node ended; return the keys of its series."""
    rows = db.execute("SELECT DISTINCT series_key FROM runs WHERE state = 'running' ORDER BY series_key").fetchall()
    db.execute(
        "UPDATE runs SET state = 'complete', interruptions = interruptions + 1, attempts = max(attempts - 1, 0) "
        "WHERE state = 'running'"
    )
    for row in rows:
        show_runs(db, row["series_key"])
    return tuple(str(row["series_key"]) for row in rows)


def claim_job(db: sqlite3.Connection, run: sqlite3.Row, now: float) -> Job:
    """Mark a run as running, and return it as a job."""
    key, model, attempt = str(run["series_key"]), str(run["model"]), int(run["attempts"]) + 1
    db.execute("UPDATE runs SET state = 'running', attempts = ? WHERE id = ?", (attempt, run["id"]))
    show_runs(db, key)
    series = series_of_key(db, key)
    if series is None:
        raise ValueError("a run has no series")
    instances = _instances(db, key)
    digest = digest_of_set([each.identity for each in instances])
    text = f"{prefix_of(model)}attempt {attempt}, {counted(len(instances), 'instance')}"
    note_event(db, now, "running", text, key, model=model)
    earlier = db.execute(
        "SELECT folder FROM results JOIN runs ON runs.id = run_id WHERE results.series_key = ? AND runs.model = ? "
        "ORDER BY results.id DESC",
        (series["previous"], model),
    ).fetchone()
    folder = None if earlier is None else str(earlier["folder"])
    is_decided = run["priority"] is not None
    return Job(key, series["series_uid"], digest, instances, attempt, folder, int(run["id"]), model, is_decided)


def _instances(db: sqlite3.Connection, key: str) -> tuple[InstanceRecord, ...]:
    rows = db.execute("SELECT * FROM instances WHERE series_key = ? ORDER BY sop_instance_uid", (key,))
    return tuple(record_of_row(InstanceRecord, row) for row in rows)


def _is_still(db: sqlite3.Connection, job: Job) -> bool:
    """Whether a job still runs, and its series still has its instances."""
    row = run_of_id(db, job.run)
    if row is None or row["state"] != "running":
        return False
    return digest_of_set([each.identity for each in _instances(db, job.key)]) == job.set_digest


def commit_job(
    db: sqlite3.Connection, job: Job, answer: WorkerResult, deliveries: tuple[tuple[str, str], ...], now: float
) -> bool:
    """Record a job's result and its deliveries; False if the series changed meanwhile."""
    if not _is_still(db, job):
        text = f"{prefix_of(job.model)}its instances changed while it ran; that result is discarded"
        note_event(db, now, "superseded", text, job.key, model=job.model)
        return False
    result = db.execute(
        "INSERT INTO results (run_id, series_key, revision, set_digest, folder, model, version, weights, "
        "demonstration, elapsed_s, committed_at) SELECT ?, key, revision, ?, ?, ?, ?, ?, ?, ?, ? FROM series "
        "WHERE key = ?",
        (
            job.run, job.set_digest, answer.folder, answer.model, answer.version, answer.weights,
            int(answer.demonstration), answer.elapsed_s, now, job.key,
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
    set_run(db, job.run, "done")
    text = f"{prefix_of(job.model)}{answer.model} {answer.version} answered in {answer.elapsed_s:.1f} s"
    note_event(db, now, "done", text, job.key, model=job.model)
    return True


def decide_job(db: sqlite3.Connection, job: Job, decided: Sequence[DecidedRun], now: float) -> bool:
    """End a job whose headers have told the models of its series; False if the series changed meanwhile."""
    run = run_of_id(db, job.run)
    if run is None or not _is_still(db, job):
        return False
    decide_runs(db, run, decided)
    running = [each for each in decided if each.why is None]
    urgent = ", urgent" if any(each.priority for each in running) else ""
    models = [each.model for each in running if each.model]
    if running:
        what = f"runs with {' and '.join(models)}" if models else "runs"
        note_event(db, now, "decided", f"{what}{urgent}", job.key)
    for each in decided:
        if each.why is not None:
            text = f"{prefix_of(each.model)}{each.why.message}"
            note_event(db, now, "aside", text, job.key, model=each.model)
    return True


def leave_job(db: sqlite3.Connection, job: Job, state: str, why: Why, next_at: float, now: float) -> bool:
    """End a job without a result, in this state; False if its series changed meanwhile."""
    if not _is_still(db, job):
        return False
    set_run(db, job.run, state, why, next_at)
    text = f"{prefix_of(job.model)}{why.message}"
    note_event(db, now, "retry" if state == "complete" else state, text, job.key, model=job.model)
    return True


def set_series_aside(db: sqlite3.Connection, key: str, why: Why, now: float, peer: str | None = None) -> bool:
    """Set a series aside with all its runs that have no result; return whether it exists."""
    if series_of_key(db, key) is None:
        return False
    set_open_runs(db, key, "aside", why, now)
    note_event(db, now, "aside", why.message, key, peer)
    return True


def note_worker_died(db: sqlite3.Connection, job: Job, how: str, now: float) -> bool:
    """Record that a worker died on a job; return whether it is tried again: not if the series changed meanwhile."""
    if not _is_still(db, job):
        return False
    db.execute("UPDATE runs SET deaths = deaths + 1 WHERE id = ?", (job.run,))
    (deaths,) = db.execute("SELECT deaths FROM runs WHERE id = ?", (job.run,)).fetchone()
    state = "complete" if deaths < 2 else "aside"
    leave_job(db, job, state, Why("worker-died", how if deaths < 2 else f"{how}, twice"), now, now)
    return bool(deaths < 2)


def _run_of_delivery(db: sqlite3.Connection, delivery: int) -> sqlite3.Row:
    row: sqlite3.Row = db.execute(
        "SELECT r.series_key, r.run_id, d.destination, d.result_id, runs.model, runs.state FROM deliveries d "
        "JOIN results r ON r.id = d.result_id JOIN runs ON runs.id = r.run_id WHERE d.id = ?",
        (delivery,),
    ).fetchone()
    return row


def note_sent(db: sqlite3.Connection, delivery: int, text: str, now: float) -> None:
    """Record a successful delivery."""
    db.execute(
        "UPDATE deliveries SET state = 'sent', sent_at = ?, last_reason = NULL, last_error = NULL, "
        "attempts = attempts + 1 WHERE id = ? AND state != 'sent'",
        (now, delivery),
    )
    row = _run_of_delivery(db, delivery)
    key, model = row["series_key"], row["model"]
    note_event(db, now, "sent", f"{prefix_of(model)}{text}", key, row["destination"], model=model)
    left = db.execute(
        "SELECT 1 FROM deliveries WHERE result_id = ? AND state IN ('waiting', 'stored', 'dead')", (row["result_id"],)
    ).fetchone()
    if row["state"] == "done" and left is None:
        set_run(db, row["run_id"], "delivered")
        note_event(db, now, "delivered", f"{prefix_of(model)}every object is at every destination", key, model=model)


def note_not_sent(db: sqlite3.Connection, delivery: int, why: Why, wait_s: float | None, now: float) -> None:
    """Record a failed delivery, to be retried after a wait or, without one, never."""
    state = "dead" if wait_s is None else "waiting"
    changed = db.execute(
        "UPDATE deliveries SET state = ?, last_reason = ?, last_error = ?, next_at = ?, attempts = attempts + 1 "
        "WHERE id = ? AND state IN ('waiting', 'stored')",
        (state, *why, now + (wait_s or 0.0), delivery),
    )
    if wait_s is not None or not changed.rowcount:  # it was withdrawn, or a late report says that it has arrived
        return
    row = _run_of_delivery(db, delivery)
    key, model = row["series_key"], row["model"]
    text = f"not delivered to {row['destination']}: {why.message}"
    if row["state"] == "done":
        set_run(db, row["run_id"], "dead", Why(why.reason, text))
    note_event(db, now, "dead", f"{prefix_of(model)}{text}", key, row["destination"], model=model)


def retry_series(db: sqlite3.Connection, key: str, by: str, now: float, model: str | None = None) -> bool:
    """Retry a series, or one model's run, at a person's request; False if there is nothing to retry."""
    if is_pruned(db, key):
        return False
    states = ("aside", "dead", "discarded", "done", "complete")
    rows = [row for row in runs_of(db, key, model) if row["state"] in states]
    if model is None:  # a later revision computes these
        rows = [row for row in rows if row["reason"] != "superseded"]
    for row in rows:
        _retry_run(db, row)
    if rows:
        show_runs(db, key)
        note_event(db, now, "retried", f"{prefix_of(model or '')}by {by}", key, model=model)
    return bool(rows)


def _retry_run(db: sqlite3.Connection, row: sqlite3.Row) -> None:
    state = "complete"
    if row["has_result"]:
        of_run = "result_id IN (SELECT id FROM results WHERE run_id = ?)"
        sends = db.execute(
            f"UPDATE deliveries SET state = 'waiting', next_at = 0 WHERE state != 'sent' AND {of_run}",  # noqa: S608
            (row["id"],),
        ).rowcount
        (all_,) = db.execute(f"SELECT count(*) FROM deliveries WHERE {of_run}", (row["id"],)).fetchone()  # noqa: S608
        state = "delivered" if all_ and not sends else "done"
    else:
        db.execute("DELETE FROM refusals WHERE series_key = ?", (row["series_key"],))
    db.execute(
        "UPDATE runs SET state = ?, reason = NULL, message = NULL, attempts = 0, deaths = 0, interruptions = 0, "
        "next_at = 0 WHERE id = ?",
        (state, row["id"]),
    )


def discard_series(db: sqlite3.Connection, key: str, by: str, now: float, model: str | None = None) -> bool:
    """Discard a series, or one model's run, at a person's request; False if there is nothing to discard."""
    if series_of_key(db, key) is None:
        return False
    if model is None and not runs_of(db, key):  # it is being received
        add_run(db, key, now)
    rows = [row for row in runs_of(db, key, model) if row["state"] not in ("discarded", "delivered")]
    for row in rows:
        set_run(db, row["id"], "discarded", Why("discarded", f"by {by}"))
        db.execute(
            "UPDATE deliveries SET state = 'withdrawn' WHERE state IN ('waiting', 'stored', 'dead') AND result_id IN "
            "(SELECT id FROM results WHERE run_id = ?)",
            (row["id"],),
        )
    if rows:
        note_event(db, now, "discarded", f"{prefix_of(model or '')}by {by}", key, model=model)
    return bool(rows)
