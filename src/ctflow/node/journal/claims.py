"""Which run begins next: urgent before routine, of open models before others, and none waits for ever."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass

_MOST_PASSED = 8  # how often a run that needs another model waits for runs of open ones
_WAITS = """FROM runs r JOIN series s ON s.key = r.series_key WHERE r.state = 'complete' AND r.next_at <= ?"""
_ORDER = "ORDER BY r.interruptions, s.first_at, r.id LIMIT 1"
_URGENT, _ROUTINE = "r.priority = 1", "coalesce(r.priority, 0) = 0"


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
