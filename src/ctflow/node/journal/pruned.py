"""Whether retention has removed files of a series."""

from __future__ import annotations

import sqlite3


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
