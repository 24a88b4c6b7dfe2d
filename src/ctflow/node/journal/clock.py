"""What waits in the journal when the computer's clock is set.

Quiet periods, retries and deadlines are kept as Unix times, because they outlast the process. Without this a clock that
is set back by an hour would hold up every series that is being received, and every retry, for an hour; and one that is
set forward would end the quiet period of a series in the middle of its transfer, and give up what waits to be sent.
What is finished keeps its times.
"""

from __future__ import annotations

import sqlite3

from ctflow.node.journal.writes import note_event

# In the seconds until a set clock is noticed, moments are already written by the new one: those may not move as well.
# So a moment in the past is never moved to after now, and none becomes later that is still to come.
_UNSENT = "id IN (SELECT result_id FROM deliveries WHERE state IN ('waiting', 'stored'))"
_FORWARD = (
    "UPDATE series SET last_at = min(last_at + :by, :now) WHERE state = 'received'",
    f"UPDATE results SET committed_at = min(committed_at + :by, :now) WHERE {_UNSENT}",  # noqa: S608
    "UPDATE deliveries SET next_at = next_at + :by WHERE state = 'stored' AND next_at <= :now",
    "UPDATE commitments SET requested_at = min(requested_at + :by, :now) WHERE state = 'waiting'",
)
_BACK = (
    "UPDATE series SET last_at = min(last_at, :now) WHERE state = 'received'",
    "UPDATE series SET first_at = min(first_at, :now) WHERE state IN ('received', 'complete', 'running')",
    "UPDATE series SET next_at = next_at + :by WHERE state = 'complete'",
    "UPDATE runs SET queued_at = min(queued_at, :now), next_at = next_at + :by WHERE state = 'complete'",
    f"UPDATE results SET committed_at = min(committed_at, :now) WHERE {_UNSENT}",  # noqa: S608
    "UPDATE deliveries SET next_at = next_at + :by WHERE state IN ('waiting', 'stored')",
    "UPDATE commitments SET requested_at = min(requested_at, :now), next_at = next_at + :by WHERE state = 'waiting'",
)
_BOUNDS = (
    "UPDATE series SET next_at = min(next_at, :latest) WHERE state = 'complete'",
    "UPDATE runs SET next_at = min(next_at, :latest) WHERE state = 'complete'",
    "UPDATE deliveries SET next_at = min(next_at, :latest) WHERE state IN ('waiting', 'stored')",
    "UPDATE commitments SET next_at = min(next_at, :latest) WHERE state = 'waiting'",
)
_NEWEST = """SELECT max((SELECT coalesce(max(last_at), 0) FROM series WHERE state = 'received'),
    coalesce((SELECT at FROM events ORDER BY id DESC LIMIT 1), 0))"""
_LEAST_S = 1.5  # a difference that is noticed at a start


def move_with_clock(db: sqlite3.Connection, now: float, by_s: float, tell: str) -> None:
    """Move what waits if the clock was set by so many seconds; `tell` is for the audit trail, if it is not empty."""
    for statement in _BACK if by_s < 0 else _FORWARD:
        db.execute(statement, {"by": by_s, "now": now})
    if tell:
        note_event(db, now, "clock-set", tell)


def move_after_start(db: sqlite3.Connection, now: float, longest_s: float) -> None:
    """Bound what waits by the longest wait of all, and move it if the journal's newest time is still to come.

    How far a clock was set back while no process saw it cannot be known, only that it was at least so far.
    """
    (newest,) = db.execute(_NEWEST).fetchone()
    if newest - now > _LEAST_S:
        move_with_clock(db, now, now - newest, f"the clock was set back by {newest - now:.0f} s or more")
    for statement in _BOUNDS:
        db.execute(statement, {"latest": now + longest_s})
