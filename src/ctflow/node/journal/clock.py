"""What waits in the journal when the computer's clock is set.

Quiet periods, retries and deadlines are kept as Unix times, because they outlast the process. Without this a clock that
is set back by an hour would hold up every series that is being received, and every retry, for an hour; and one that is
set forward would end the quiet period of a series in the middle of its transfer.
"""

from __future__ import annotations

import sqlite3

from ctflow.node.journal.writes import note_event

_NEWEST = """SELECT max((SELECT coalesce(max(last_at), 0) FROM series WHERE state = 'received'),
    coalesce((SELECT at FROM events ORDER BY id DESC LIMIT 1), 0))"""
# In the seconds until a set clock is noticed, moments are already written by the new one. So nothing is moved to a
# later moment than now: a quiet period starts again, a wait becomes shorter.
_QUIET = "UPDATE series SET last_at = :now WHERE state = 'received'"
_BACK = (
    # Others of the same study, for which a series may wait; nothing has come later than now.
    "UPDATE series SET last_at = :now WHERE last_at > :now",
    "UPDATE left_out SET received_at = :now WHERE received_at > :now",
    "UPDATE runs SET queued_at = min(queued_at, :now), next_at = next_at + :by WHERE state = 'complete'",
    "UPDATE series SET next_at = next_at + :by WHERE state = 'complete'",
    "UPDATE deliveries SET next_at = next_at + :by WHERE state IN ('waiting', 'stored')",
    "UPDATE commitments SET requested_at = min(requested_at, :now), next_at = next_at + :by WHERE state = 'waiting'",
)


def move_with_clock(db: sqlite3.Connection, now: float, by_s: float) -> None:
    """Move what waits if the clock was set by so many seconds, and tell the audit trail."""
    for statement in (_QUIET, *(_BACK if by_s < 0 else ())):
        db.execute(statement, {"by": by_s, "now": now})
    note_event(db, now, "clock-set", f"the clock was set {'back' if by_s < 0 else 'forward'} by {abs(by_s):.0f} s")


def move_after_start(db: sqlite3.Connection, now: float, least_s: float) -> None:
    """After a start: the clock was set back if the journal's newest time is later than now by more than `least_s`."""
    (newest,) = db.execute(_NEWEST).fetchone()
    if newest - now > least_s:
        move_with_clock(db, now, now - newest)
