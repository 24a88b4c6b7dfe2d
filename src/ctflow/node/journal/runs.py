"""The journal's runs: one of each model that computes a series, and which begins next.

The state of a series is that of its runs. A complete series has one run, whose model is undecided ("") until its
headers are read. A series that is being received has none, so that late instances start from the beginning.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ctflow.node.journal.records import DecidedRun, Why

# Of several runs the series shows the first of these: what goes on, then what a person must look at.
_SHOWN_FIRST = ("running", "complete", "dead", "aside", "done", "delivered", "discarded")
_OPEN = ("complete", "running")
_MOST_PASSED = 8  # how often a run that needs another model waits for runs of open ones
_WAITS = """FROM runs r JOIN series s ON s.key = r.series_key WHERE r.state = 'complete' AND r.next_at <= ?"""
_ORDER = "ORDER BY r.interruptions, s.first_at, r.id LIMIT 1"
_URGENT, _ROUTINE = "r.priority = 1", "coalesce(r.priority, 0) = 0"


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


@dataclass(frozen=True)
class QueueRules:
    """How a node orders its runs.

    Attributes:
        decides: Whether models and priority of a series are decided before it runs: then that comes first, as it takes
            only the headers.
        urgent_in_a_row: After so many urgent runs a routine one that waits is taken.
        routine_waits_s: A routine run that has waited so long is taken after one urgent one.
    """

    decides: bool = False
    urgent_in_a_row: int = 4
    routine_waits_s: float = 1800.0


class RunQueue:
    """Takes the next run; used by the journal's thread alone. What it counts is lost at an end, which harms nothing."""

    def __init__(self, rules: QueueRules) -> None:
        self._rules = rules
        self._urgent = 0  # in a row
        self._passed = (0, 0)  # the first routine run, and how often another was taken before it

    def next(
        self, db: sqlite3.Connection, now: float, beside: Collection[str] = (), held: Collection[str] = ()
    ) -> sqlite3.Row | None:
        """The run that begins now; None if there is none.

        Args:
            db: The journal.
            now: Unix time.
            beside: Series that run in the same worker; none runs beside them that was tried before.
            held: Models that are open in the worker.
        """
        marks = ",".join("?" * len(beside))

        def first(condition: str, *values: object) -> sqlite3.Row | None:
            question = f"SELECT r.* {_WAITS} AND r.series_key NOT IN ({marks}) AND {condition} {_ORDER}"
            row: sqlite3.Row | None = db.execute(question, (now, *beside, *values)).fetchone()
            return row

        undecided = first("r.priority IS NULL") if self._rules.decides else None
        if undecided is not None:
            return None if beside and undecided["attempts"] else undecided
        decided = "r.priority IS NOT NULL AND " if self._rules.decides else ""
        urgent, routine = first(decided + _URGENT), first(decided + _ROUTINE)
        found = routine if urgent is None or self._is_due(routine, now) else urgent
        other = None
        if found is not None and found is routine and held and found["model"] not in held and self._may_pass(found):
            models = ",".join("?" * len(held))
            other = first(f"{decided}{_ROUTINE} AND r.attempts = 0 AND r.model IN ({models})", *held)
        taken = other or found
        if taken is None or (beside and taken["attempts"]):
            return None
        if other is not None and found is not None:
            self._passed = (found["id"], self._times_passed(found) + 1)
        self._urgent = self._urgent + 1 if taken is urgent else 0
        return taken

    def _is_due(self, routine: sqlite3.Row | None, now: float) -> bool:
        """Whether a routine run comes before urgent ones, of which one at least has run since the last routine one."""
        if routine is None or not self._urgent:
            return False
        is_late = now - routine["queued_at"] >= self._rules.routine_waits_s
        return is_late or self._urgent >= self._rules.urgent_in_a_row

    def _times_passed(self, run: sqlite3.Row) -> int:
        return self._passed[1] if self._passed[0] == run["id"] else 0

    def _may_pass(self, run: sqlite3.Row) -> bool:
        return self._times_passed(run) < _MOST_PASSED
