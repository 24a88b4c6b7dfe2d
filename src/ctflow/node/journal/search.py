"""Which series of the journal are wanted, and what each hour of the last day brought."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctflow.core.volume import digest_of_uid
from ctflow.node.journal.records import STATES, SeriesState

_HOUR_S = 3600
_HOURS = 24
_RESULTS, _OTHERS = ("done",), ("aside", "dead")  # kinds of events


@dataclass(frozen=True)
class SeriesSearch:
    """Which series are wanted.

    Attributes:
        states: In one of these; empty means any.
        text: Begins the digest of the series or the study, or the sender's address, or is part of the sender's AE
            title, of the reason or, where the journal has it, of the patient's name, ID or accession number; empty
            means any.
        since: Unix time after which the last instance came; None means any.
        study: Digest of the study's UID; empty means any.
        model: Name of a model in the settings, which has a run of the series; empty means any.
    """

    states: Sequence[SeriesState] = ()
    text: str = ""
    since: float | None = None
    study: str = ""
    model: str = ""

    def condition(self) -> tuple[str, list[Any]]:
        """The condition on a row `s` of `series`, and its values."""
        states = tuple(self.states) or STATES
        parts, values = [f"s.state IN ({','.join('?' * len(states))})"], list[Any](states)
        if self.since is not None:
            parts.append("s.last_at > ?")
            values.append(self.since)
        if self.study:
            parts.append("digest_of_uid(s.study_uid) = ?")
            values.append(self.study)
        if self.model:
            parts.append("EXISTS (SELECT 1 FROM runs WHERE runs.series_key = s.key AND runs.model = ?)")
            values.append(self.model)
        if self.text:
            plain = self.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            parts.append(f"({' OR '.join(_MATCHES)})")
            values += [f"{plain}%"] * _BEGINNINGS + [f"%{plain}%"] * (len(_MATCHES) - _BEGINNINGS)
        return " AND ".join(parts), values


# LIKE ignores the case of ASCII letters.
_MATCHES = [
    f"{column} LIKE ? ESCAPE '\\'"
    for column in (
        "digest_of_uid(s.series_uid)", "digest_of_uid(s.study_uid)", "s.peer", "s.calling_ae", "s.reason", "s.message",
        "s.patient_name", "s.patient_id", "s.accession_number",
    )
]  # fmt: skip
_BEGINNINGS = 3


def add_functions(connection: sqlite3.Connection) -> None:
    """Let a connection's questions name series as the page does."""
    connection.create_function("digest_of_uid", 1, digest_of_uid, deterministic=True)


def hours_before(rows: Sequence[sqlite3.Row], now: float) -> list[dict[str, Any]]:
    """The last day, hour by hour, the oldest first.

    Args:
        rows: `hour` since 1970, `kind` of event, how many (`n`).
        now: Unix time.

    Returns:
        {"at": Unix time, "good": results, "other": series that were set aside or failed} of each hour.
    """
    last = math.floor(now / _HOUR_S)
    counts = {(row["hour"], row["kind"]): row["n"] for row in rows}
    return [
        {
            "at": hour * _HOUR_S,
            "good": sum(counts.get((hour, kind), 0) for kind in _RESULTS),
            "other": sum(counts.get((hour, kind), 0) for kind in _OTHERS),
        }
        for hour in range(last - _HOURS + 1, last + 1)
    ]


EVENTS_BY_HOUR = f"""SELECT CAST(at / {_HOUR_S} AS INTEGER) AS hour, kind, count(*) AS n FROM events
WHERE at > ? - {_HOURS * _HOUR_S} AND kind IN ({",".join(f"'{kind}'" for kind in (*_RESULTS, *_OTHERS))})
GROUP BY hour, kind"""  # noqa: S608  # numbers and words of this module
