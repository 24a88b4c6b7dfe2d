"""Reports of storage commitment to the peers that asked for them, on associations of their own."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from ctflow.core.errors import DeliveryError, DestinationDown, OutputError, PeerRefused
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.journal.commitments import Commitments, ReportRecord
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Why
from ctflow.node.receive.commitment import COMMITMENT, COMMITMENT_INSTANCE, report_dataset
from ctflow.node.settings.groups import Backoff

log = logging.getLogger(__name__)


class ReportThread(threading.Thread):
    """Sends the reports that did not go out on the association of their request.

    Args:
        journal: Tells of changes.
        commitments: Lists what waits and records what arrived.
        target_of: How to reach a peer; None if the settings do not say.
        backoff: When to try again, and when to give up.
    """

    def __init__(
        self,
        journal: Journal,
        commitments: Commitments,
        target_of: Callable[[ReportRecord], StorageTarget | None],
        backoff: Backoff,
    ) -> None:
        super().__init__(name="commitment reports", daemon=True)
        self._commitments, self._target_of, self._backoff = commitments, target_of, backoff
        self._woken, self._ending = threading.Event(), threading.Event()
        self._closed_until: dict[tuple[str, str], float] = {}  # peers that cannot be reached
        journal.on_change(self._woken.set)

    def stop(self) -> None:
        """End after the report that is being sent."""
        self._ending.set()
        self._woken.set()
        self.join()

    def run(self) -> None:
        """Run until `stop`."""
        while not self._ending.is_set():
            self._woken.clear()
            wait_s = 5.0
            try:
                wait_s = self._round()
            except (OutputError, OSError, sqlite3.Error) as error:  # the next round may succeed
                log.error("%s: %s", self.name, type(error).__name__)  # noqa: TRY400
            self._woken.wait(wait_s)

    def _round(self) -> float:
        """Send what is due; return the seconds until the next one is."""
        for report in self._commitments.waiting():
            now = time.time()
            if report.next_at > now:
                return min(report.next_at - now, 60.0)
            if self._ending.is_set():
                break
            closed_s = self._closed_until.get(_peer_of(report), 0.0) - time.monotonic()
            if closed_s > 0:  # one that is off must not let the others' reports wait for each of its own
                self._commitments.postpone(report.id, closed_s)
                continue
            self._send(report)
        else:
            return 60.0
        return 0.0

    def _send(self, report: ReportRecord) -> None:
        try:
            target = self._target_of(report)
            if target is None:
                text = "no port for reports is known (peers[].port), and its association has ended"
                self._commitments.not_reported(report.id, Why("no-port", text), None)
                return
            send_report(target, report)
        except DeliveryError as error:
            is_over = time.time() - report.requested_at > self._backoff.give_up_after_s
            wait_s = None if is_over else self._backoff.wait_s(report.attempts + 1)
            log.warning(
                "report of storage commitment: %s", error.described, extra={"facts": {"peer": report.request.peer}}
            )
            self._closed_until = {peer: until for peer, until in self._closed_until.items() if until > time.monotonic()}
            if isinstance(error, DestinationDown):
                self._closed_until[_peer_of(report)] = time.monotonic() + (wait_s or self._backoff.wait_s(1))
            self._commitments.not_reported(report.id, Why(error.reason, error.described), wait_s)
        else:
            self._commitments.reported(report.id)


def _peer_of(report: ReportRecord) -> tuple[str, str]:
    return report.request.calling_ae, report.request.peer


def send_report(target: StorageTarget, report: ReportRecord) -> None:
    """Send one.

    Raises:
        DeliveryError: The peer cannot be reached, or does not take it.
    """
    with target.association((COMMITMENT,), as_provider=True) as association:
        kind, dataset = report_dataset(report.request)
        answer: Any
        try:
            answer, _ = association.send_n_event_report(dataset, kind, COMMITMENT, COMMITMENT_INSTANCE)
        except (ValueError, RuntimeError) as error:  # no context, or it has ended the association
            raise PeerRefused(f"{target.called_ae} takes no reports", reason="no-context") from error
        status = answer.get("Status")
        if status is None:
            raise DestinationDown(f"{target.called_ae} did not answer to the report", reason="no-answer")
        if status != 0:
            said = f"answers with status {status:04X}H"
            raise PeerRefused(f"{target.called_ae} {said} to the report", reason="object-refused")
