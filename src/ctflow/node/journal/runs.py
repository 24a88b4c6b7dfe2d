"""The journal's runs: one of each model that computes a series; the series' state is that of its runs.

A complete series has one run, whose model is undecided ("") until its headers are read. A series that is being received
has none, so that late instances start from the beginning.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from ctflow.node.journal.records import DecidedRun, Why

# Of several runs the series shows the first of these: what goes on, then what a person must look at.
_SHOWN_FIRST = ("running", "complete", "dead", "aside", "done", "delivered", "discarded")
_OPEN = ("complete", "running")


def add_run(
    db: sqlite3.Connection, key: str, now: float, *, state: str = "complete", why: Why | None = None, model: str = ""
) -> None:
    """Give a series a run; the caller shows its state in the series (`show_runs`)."""
    db.execute(
        "INSERT INTO runs (series_key, model, state, reason, message, queued_at) VALUES (?, ?, ?, ?, ?, ?)",
        (key, model, state, *(why or (None, None)), now),
    )


def runs_of(db: sqlite3.Connection, key: str, model: str | None = None) -> list[sqlite3.Row]:
    """The runs of a series, or only a model's; each says whether it has a result."""
    return db.execute(
        "SELECT *, EXISTS (SELECT 1 FROM results WHERE run_id = runs.id) AS has_result FROM runs "
        "WHERE series_key = ? AND (? IS NULL OR model = ?) ORDER BY id",
        (key, model, model),
    ).fetchall()


def run_of_id(db: sqlite3.Connection, run: int) -> sqlite3.Row | None:
    """A run's row; None where there is none (any more)."""
    row: sqlite3.Row | None = db.execute("SELECT * FROM runs WHERE id = ?", (run,)).fetchone()
    return row


def set_run(db: sqlite3.Connection, run: int, state: str, why: Why | None = None, next_at: float = 0.0) -> None:
    """Change a run's state, and the series' with it."""
    db.execute(
        "UPDATE runs SET state = ?, reason = ?, message = ?, next_at = ? WHERE id = ?",
        (state, *(why or (None, None)), next_at, run),
    )
    row = run_of_id(db, run)
    if row is not None:
        show_runs(db, row["series_key"])


def set_open_runs(db: sqlite3.Connection, key: str, state: str, why: Why, now: float) -> None:
    """End what waits, runs or is received of a series, in this state."""
    rows = runs_of(db, key)
    if not rows:
        add_run(db, key, now, state=state, why=why)
    for row in rows:
        if row["state"] in _OPEN or not row["has_result"]:
            set_run(db, row["id"], state, why)
    show_runs(db, key)


def remove_runs(db: sqlite3.Connection, key: str) -> None:
    """Forget the runs of a series without a result: it is received again; an answer of one that runs is dropped."""
    db.execute("DELETE FROM runs WHERE series_key = ?", (key,))


def show_runs(db: sqlite3.Connection, key: str) -> None:
    """Make the state of a series that of its runs."""
    rows = runs_of(db, key)
    if not rows:
        return
    shown = min(rows, key=lambda row: _SHOWN_FIRST.index(row["state"]))
    next_at = min(row["next_at"] for row in rows if row["state"] == shown["state"])
    attempts = max(row["attempts"] for row in rows)
    db.execute(
        "UPDATE series SET state = ?, reason = ?, message = ?, attempts = ?, next_at = ? WHERE key = ?",
        (shown["state"], shown["reason"], shown["message"], attempts, next_at, key),
    )


def decide_runs(db: sqlite3.Connection, run: sqlite3.Row, decided: Sequence[DecidedRun]) -> None:
    """Put a run of each of these models in the place of a run whose models were undecided."""
    key = run["series_key"]
    db.execute("DELETE FROM runs WHERE id = ?", (run["id"],))
    for each in decided:
        state = "complete" if each.why is None else "aside"
        values = (key, each.model, state, *(each.why or (None, None)), each.priority, run["interruptions"])
        db.execute(
            "INSERT INTO runs (series_key, model, state, reason, message, priority, interruptions, queued_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, run["queued_at"]),
        )
    show_runs(db, key)
