"""Storage commitment in the journal: what peers asked of this node, and what it asked of its destinations."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctflow.core.errors import counted
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.reading import record_of_row
from ctflow.node.journal.records import DeliveryRecord, Why
from ctflow.node.journal.writes import note_event, note_sent

# Failure Reason (0008,1197), PS3.3 C.14.1.1.
NO_SUCH_INSTANCE, CLASS_CONFLICT, CLASS_NOT_SUPPORTED = 0x0112, 0x0119, 0x0122
_AT_ONCE = 16
_MOST_WAITING = 1000  # a report has up to 2 MB
_MOST_OF_PEER = 250  # one that takes no reports leaves room for the others
_KEPT_S = 30 * 86400.0  # what has been reported


@dataclass(frozen=True)
class Reference:
    """An object of a request; `failure` is the reason why it is not committed, None if it is."""

    sop_class_uid: str
    sop_instance_uid: str
    failure: int | None = None


@dataclass(frozen=True)
class CommitmentRequest:
    """A peer's request for storage commitment.

    Attributes:
        transaction_uid: As given by the peer.
        calling_ae: Its AE title.
        peer: Its address.
        with_tls: Whether it came with TLS.
        references: What it asked about, with the answer.
    """

    transaction_uid: str
    calling_ae: str
    peer: str
    with_tls: bool
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class ReportRecord:
    """A report that a peer is to get, not before `next_at`."""

    id: int
    request: CommitmentRequest
    attempts: int
    requested_at: float
    next_at: float


class Commitments:
    """The journal's part for storage commitment; every method may be called from any thread.

    Args:
        journal: The journal.
        inbox: Folder of the instances.
    """

    def __init__(self, journal: Journal, inbox: Path) -> None:
        self._journal, self._inbox = journal, inbox

    # -- asked of this node -------------------------------------------------------------------------------------------

    def examined(self, references: Sequence[Reference], supported: Collection[str]) -> tuple[Reference, ...]:
        """What of these the node has: in the journal, and on the disk.

        Args:
            references: What a peer asks about.
            supported: SOP classes that the node stores.
        """
        return tuple(
            Reference(each.sop_class_uid, each.sop_instance_uid, self._failure(each, supported)) for each in references
        )

    def _failure(self, reference: Reference, supported: Collection[str]) -> int | None:
        found = self._journal.stored_as(reference.sop_instance_uid)
        kept = {sop_class for sop_class, file in found if (self._inbox / file).is_file()}
        if reference.sop_class_uid in kept:
            return None
        if kept:
            return CLASS_CONFLICT
        return NO_SUCH_INSTANCE if reference.sop_class_uid in supported else CLASS_NOT_SUPPORTED

    def is_full(self, calling_ae: str) -> bool:
        """Whether so many reports wait, of this peer or of all, that no more requests of the peer are taken."""
        journal = self._journal
        return journal.waiting_reports(calling_ae) >= _MOST_OF_PEER or journal.waiting_reports() >= _MOST_WAITING

    def asked(self, request: CommitmentRequest, wait_s: float) -> int:
        """Record a request before it is answered; its report is due after `wait_s`. Return its number."""
        return self._journal.change(lambda db, now: _note_asked(db, request, now, wait_s))

    def waiting(self) -> tuple[ReportRecord, ...]:
        """Reports that wait, the one that is due first before the others."""
        return tuple(_report(row) for row in self._journal.due_reports(_AT_ONCE))

    def find(self, number: int) -> ReportRecord | None:
        """A report that waits."""
        row = self._journal.report(number)
        return None if row is None else _report(row)

    def postpone(self, number: int, wait_s: float) -> None:
        """Send a report later: another way is tried meanwhile."""
        self._journal.change(lambda db, now: _postpone(db, number, now + wait_s))

    def reported(self, number: int) -> None:
        """Record that a peer has taken its report."""
        self._journal.change(lambda db, now: _note_reported(db, number, now))

    def not_reported(self, number: int, why: Why, wait_s: float | None) -> None:
        """Record that a report did not arrive; it is sent again after `wait_s`, or never if that is None."""
        self._journal.change(lambda db, now: _note_not_reported(db, number, why, now, wait_s))

    # -- asked of destinations ----------------------------------------------------------------------------------------

    def stored(self, deliveries: Sequence[DeliveryRecord], transaction_uid: str, wait_s: float) -> None:
        """Record, before the request, that a destination took objects, and is to commit to them within `wait_s`."""
        self._journal.change(lambda db, now: _note_stored(db, deliveries, transaction_uid, now, now + wait_s))

    def answered(self, transaction_uid: str, committed: Collection[str], failed: Mapping[str, int]) -> bool:
        """Record a destination's report.

        Args:
            transaction_uid: Of the request.
            committed: SOPInstanceUIDs.
            failed: SOPInstanceUIDs and the reasons.

        Returns:
            False if nothing was asked under this transaction, or all of it was sent again since.
        """
        return self._journal.change(lambda db, now: _note_answered(db, transaction_uid, committed, failed, now))


def _report(row: sqlite3.Row) -> ReportRecord:
    references = tuple(Reference(*each) for each in json.loads(row["report"]))
    request = record_of_row(CommitmentRequest, row, with_tls=bool(row["with_tls"]), references=references)
    return record_of_row(ReportRecord, row, request=request)


def _note_asked(db: sqlite3.Connection, request: CommitmentRequest, now: float, wait_s: float) -> int:
    report = json.dumps([[each.sop_class_uid, each.sop_instance_uid, each.failure] for each in request.references])
    db.execute("DELETE FROM commitments WHERE state != 'waiting' AND requested_at < ?", (now - _KEPT_S,))
    db.execute(
        "INSERT INTO commitments (transaction_uid, calling_ae, peer, with_tls, report, state, requested_at, next_at) "
        "VALUES (?, ?, ?, ?, ?, 'waiting', ?, ?) ON CONFLICT (calling_ae, transaction_uid) DO UPDATE SET "
        "peer = excluded.peer, with_tls = excluded.with_tls, report = excluded.report, state = 'waiting', "
        "attempts = 0, requested_at = excluded.requested_at, next_at = excluded.next_at",
        (
            request.transaction_uid, request.calling_ae, request.peer, int(request.with_tls), report, now, now + wait_s,
        ),
    )  # fmt: skip
    (number,) = db.execute(
        "SELECT id FROM commitments WHERE calling_ae = ? AND transaction_uid = ?",
        (request.calling_ae, request.transaction_uid),
    ).fetchone()
    failed = sum(each.failure is not None for each in request.references)
    text = f"{request.calling_ae} asks for {counted(len(request.references), 'instance')}: {failed or 'none'} missing"
    note_event(db, now, "commitment", text, peer=request.peer)
    return int(number)


def _postpone(db: sqlite3.Connection, number: int, when: float) -> None:
    db.execute("UPDATE commitments SET next_at = ? WHERE id = ? AND state = 'waiting'", (when, number))


def _waiting(db: sqlite3.Connection, number: int) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM commitments WHERE id = ? AND state = 'waiting'", (number,)
    ).fetchone()
    return row


def _note_reported(db: sqlite3.Connection, number: int, now: float) -> None:
    row = _waiting(db, number)
    if row is None:
        return
    db.execute(
        "UPDATE commitments SET state = 'reported', reported_at = ?, report = '[]', last_reason = NULL, "
        "last_error = NULL WHERE id = ?",
        (now, number),
    )
    note_event(db, now, "commitment-reported", f"to {row['calling_ae']}", peer=row["peer"])


def _note_not_reported(db: sqlite3.Connection, number: int, why: Why, now: float, wait_s: float | None) -> None:
    row = _waiting(db, number)
    if row is None:
        return
    state = "dead" if wait_s is None else "waiting"
    db.execute(
        "UPDATE commitments SET state = ?, last_reason = ?, last_error = ?, next_at = ?, attempts = attempts + 1, "
        "report = CASE WHEN ? THEN '[]' ELSE report END WHERE id = ?",  # 2 MB each, and peers may ask without an end
        (state, *why, now + (wait_s or 0.0), wait_s is None, number),
    )
    if wait_s is None:
        text = f"no report to {row['calling_ae']}: {why.message}"
        note_event(db, now, "commitment-unreported", text, peer=row["peer"])


def _note_stored(
    db: sqlite3.Connection, deliveries: Sequence[DeliveryRecord], transaction_uid: str, now: float, until: float
) -> None:
    for each in deliveries:
        changed = db.execute(
            "UPDATE deliveries SET state = 'stored', transaction_uid = ?, next_at = ?, sent_at = ?, "
            "last_reason = NULL, last_error = NULL WHERE id = ? AND state = 'waiting'",
            (transaction_uid, until, now, each.id),
        )
        if changed.rowcount:
            text = f"{each.file} to {each.destination}, which is to commit to it"
            note_event(db, now, "stored", text, each.series_key, each.destination)


def _note_answered(
    db: sqlite3.Connection, transaction_uid: str, committed: Collection[str], failed: Mapping[str, int], now: float
) -> bool:
    rows = db.execute(
        "SELECT d.id, d.destination, d.file, o.sop_instance_uid FROM deliveries d JOIN objects o "
        "ON o.result_id = d.result_id AND o.file = d.file WHERE d.transaction_uid = ? AND d.state = 'stored'",
        (transaction_uid,),
    ).fetchall()
    for row in rows:
        if row["sop_instance_uid"] in failed:  # due at once: its delivery thread decides when it is sent again
            why = f"{row['destination']} does not commit to {row['file']} ({failed[row['sop_instance_uid']]:04X}H)"
            db.execute(
                "UPDATE deliveries SET next_at = 0, last_reason = 'not-committed', last_error = ? WHERE id = ?",
                (why, row["id"]),
            )
        elif row["sop_instance_uid"] in committed:
            note_sent(db, row["id"], f"{row['file']} to {row['destination']}, which has committed to it", now)
    return bool(rows)
