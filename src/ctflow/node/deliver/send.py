"""Delivery of results: one thread per destination, each with its own retry policy, the oldest result first."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ctflow.core.errors import DestinationDown, OutputError, PeerRefused
from ctflow.node.journal.commitments import Commitments, Reference
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import DeliveryRecord, Why
from ctflow.node.metrics import Metrics
from ctflow.node.settings.groups import Backoff

COPY = "(copies)"  # the folder that keeps copies, among the journal's destinations; no site can name one so
WHOLE = "."  # the file of a delivery that is the whole folder of a result
_AT_ONCE = 64  # objects per association: then the queue is read again, and a stop is noticed
_LOOK_AGAIN_S = 60.0
ANSWER_S = 60.0  # for a peer to store a SEG of hundreds of megabytes

log = logging.getLogger(__name__)


class Channel(Protocol):
    """An open connection to a destination."""

    def send(self, folder: Path, file: str) -> str:
        """Send one object; return the destination's answer.

        Raises:
            PeerRefused: The destination does not take this object (now).
            DestinationDown: The destination is unreachable.
        """
        ...


@runtime_checkable
class Committing(Protocol):
    """A channel whose destination may commit to what it takes.

    Attributes:
        commits: Whether it offers to.
    """

    commits: bool

    def request_commitment(self, transaction_uid: str, references: Sequence[Reference]) -> None:
        """Ask the destination to commit to objects, and wait a moment, as many report at once on the same connection.

        Raises:
            PeerRefused: The destination does not take the request.
        """
        ...


@dataclass(frozen=True)
class CommitmentPolicy:
    """What a delivery thread does about storage commitment.

    Attributes:
        commitments: Records what was asked.
        timeout_s: A destination must commit within so many seconds, or it gets the object again.
    """

    commitments: Commitments
    timeout_s: float


class Target(Protocol):
    """How to reach a destination; `open` raises DestinationDown or PeerRefused."""

    def open(self) -> AbstractContextManager[Channel]:
        """An open channel."""
        ...


class DeliveryThread(threading.Thread):
    """Sends the waiting objects to one destination.

    Args:
        name: The destination's name in the journal.
        target: How to reach it.
        journal: Lists what waits and records what arrived.
        results: Folder of the results.
        backoff: When to try again, and when to give up.
        metrics: Counts every attempt.
        policy: For storage commitment; None where nothing is asked.
    """

    def __init__(
        self,
        name: str,
        target: Target,
        journal: Journal,
        results: Path,
        backoff: Backoff,
        metrics: Metrics,
        policy: CommitmentPolicy | None = None,
    ) -> None:
        super().__init__(name=f"delivery {name}", daemon=True)
        self._destination = name
        self._target = target
        self._journal = journal
        self._results = results
        self._backoff = backoff
        self._metrics = metrics
        self._policy = policy
        self._woken = threading.Event()
        self._ending = threading.Event()
        self._failures = 0
        self._closed_until = 0.0
        journal.on_change(self._woken.set)

    def stop(self) -> None:
        """End after the object that is being sent."""
        self._ending.set()
        self._woken.set()
        self.join(ANSWER_S)

    def run(self) -> None:
        """Run until `stop`."""
        while not self._ending.is_set():
            self._woken.clear()
            wait_s = 5.0
            try:
                wait_s = self._round()
            except OutputError as error:  # the journal's disk is full: what was sent is sent again, which is harmless
                log.error("%s", error)  # noqa: TRY400  # named: no traceback needed
            except (OSError, sqlite3.Error) as error:  # no descriptors, no socket: the next round may get them
                log.error("%s: %s", self.name, type(error).__name__)  # noqa: TRY400
            if wait_s > 0:
                self._sleep(wait_s)

    def _sleep(self, wait_s: float) -> None:
        """Sleep until something changes or is due; a destination that is down is not tried until then."""
        if time.monotonic() < self._closed_until:
            self._ending.wait(wait_s)
        else:
            self._woken.wait(wait_s)

    def _round(self) -> float:
        """Send what is due; return the seconds until the next object is due."""
        closed_s = self._closed_until - time.monotonic()
        if closed_s > 0:
            return closed_s
        now = time.time()
        for late in self._journal.uncommitted(self._destination, now, limit=_AT_ONCE):
            why = late.last_error or f"{self._destination} did not commit to {late.file} in time"
            self._metrics.sent(self._destination, "not-committed")
            self._postpone(late, PeerRefused(why, reason="not-committed"))
        due = self._journal.due(self._destination, now, limit=_AT_ONCE)
        if not due:
            following = self._journal.next_delivery_at(self._destination)
            return _LOOK_AGAIN_S if following is None else min(max(following - now, 0.05), _LOOK_AGAIN_S)
        try:
            with self._target.open() as channel:
                self._failures = 0
                stored = []
                for delivery in due:
                    if self._ending.is_set():
                        break
                    if self._send(channel, delivery):
                        stored.append(delivery)
                if stored:
                    self._request_commitment(channel, stored)
        except (DestinationDown, PeerRefused) as error:
            self._is_down(error)
        return 0.0

    def _send(self, channel: Channel, delivery: DeliveryRecord) -> bool:
        """Send one object; return whether its destination is yet to commit to it."""
        result = self._journal.result(delivery.result_id)
        if result is None:
            raise ValueError("a delivery belongs to a result")
        try:
            said = channel.send(self._results / result.folder, delivery.file)
        except PeerRefused as error:
            self._metrics.sent(self._destination, "refused")
            self._postpone(delivery, error)
            return False
        else:
            self._metrics.sent(self._destination, "sent")
            if self._policy is not None and isinstance(channel, Committing) and channel.commits:
                return True
            what = "a copy of the result" if delivery.file == WHOLE else delivery.file
            self._journal.sent(delivery.id, f"{what} to {self._destination}{said}")
            return False

    def _request_commitment(self, channel: Channel, stored: Sequence[DeliveryRecord]) -> None:
        """Ask for commitment to what was sent; recorded before, as the report may come from elsewhere at once."""
        policy = self._policy
        if policy is None or not isinstance(channel, Committing):
            raise TypeError("only a channel that commits has stored objects")
        transaction = f"2.25.{uuid.uuid4().int}"
        references = [self._reference(delivery) for delivery in stored]
        policy.commitments.stored(stored, transaction, policy.timeout_s)
        try:
            channel.request_commitment(transaction, references)
        except PeerRefused as error:
            for delivery in stored:
                self._postpone(delivery, error)

    def _reference(self, delivery: DeliveryRecord) -> Reference:
        result = self._journal.result(delivery.result_id)
        (found,) = [each for each in (result.objects if result else ()) if each.file == delivery.file]
        return Reference(found.sop_class_uid, found.sop_instance_uid)

    def _postpone(self, delivery: DeliveryRecord, error: PeerRefused) -> None:
        result = self._journal.result(delivery.result_id)
        age_s = time.time() - (result.committed_at if result else 0.0)
        wait_s = self._backoff.wait_s(delivery.attempts + 1)
        is_over = age_s > self._backoff.give_up_after_s
        self._journal.not_sent(delivery.id, Why(error.reason, error.described), None if is_over else wait_s)

    def _is_down(self, error: DestinationDown | PeerRefused) -> None:
        self._metrics.sent(self._destination, "down")
        self._failures += 1
        wait_s = self._backoff.wait_s(self._failures)
        log.warning("destination %s: %s; again in %g s", self._destination, error.described, wait_s)
        why = Why(error.reason, error.described)
        # The oldest one shows on the page why it waits; the others stay due as they were, which keeps the order.
        for delivery in self._journal.due(self._destination, time.time(), limit=_AT_ONCE):
            result = self._journal.result(delivery.result_id)
            too_old = result is not None and time.time() - result.committed_at > self._backoff.give_up_after_s
            if too_old or delivery.last_error != why.message:
                self._journal.not_sent(delivery.id, why, None if too_old else 0.0)
        self._closed_until = time.monotonic() + wait_s
