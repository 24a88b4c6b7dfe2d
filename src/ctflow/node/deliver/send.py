"""Delivery of results: one thread per destination, each with its own retry policy, the oldest result first."""

from __future__ import annotations

import logging
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ctflow.compat.pynetdicom import keep_answers
from ctflow.core.atomic import publish_folder, temporary_folder
from ctflow.core.errors import DestinationDown, OutputError, PeerRefused
from ctflow.dicom.write.ct_series import IMPLEMENTATION_UID
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import DeliveryRecord, Why
from ctflow.node.metrics import Metrics
from ctflow.node.receive.headers import IMPLEMENTATION_VERSION
from ctflow.node.receive.receiver import UNCOMPRESSED
from ctflow.node.settings import Backoff

if TYPE_CHECKING:
    from pynetdicom.association import Association

# ctflow's output: Segmentation, Label Map Segmentation, Comprehensive 3D SR, RT Structure Set, Secondary Capture Image,
# Encapsulated PDF.
SENT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.66.7",
    "1.2.840.10008.5.1.4.1.1.88.34",
    "1.2.840.10008.5.1.4.1.1.481.3",
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.104.1",
)
COPY = "(copies)"  # the folder that keeps copies, among the journal's destinations; no site can name one so
WHOLE = "."  # the file of a delivery that is the whole folder of a result
_AT_ONCE = 64  # objects per association: then the queue is read again, and a stop is noticed
_LOOK_AGAIN_S = 60.0
_ANSWER_S = 60.0  # for a peer to store a SEG of hundreds of megabytes
_CONNECT_S = 10.0

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
    """

    def __init__(
        self,
        name: str,
        target: Target,
        journal: Journal,
        results: Path,
        backoff: Backoff,
        metrics: Metrics,
    ) -> None:
        super().__init__(name=f"delivery {name}", daemon=True)
        self._destination = name
        self._target = target
        self._journal = journal
        self._results = results
        self._backoff = backoff
        self._metrics = metrics
        self._woken = threading.Event()
        self._ending = threading.Event()
        self._failures = 0
        self._closed_until = 0.0
        journal.on_change(self._woken.set)

    def stop(self) -> None:
        """End after the object that is being sent."""
        self._ending.set()
        self._woken.set()
        self.join(_ANSWER_S)

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
        if time.time() < self._closed_until:
            self._ending.wait(wait_s)
        else:
            self._woken.wait(wait_s)

    def _round(self) -> float:
        """Send what is due; return the seconds until the next object is due."""
        now = time.time()
        if now < self._closed_until:
            return self._closed_until - now
        due = self._journal.due(self._destination, now, limit=_AT_ONCE)
        if not due:
            following = self._journal.next_delivery_at(self._destination)
            return _LOOK_AGAIN_S if following is None else min(max(following - now, 0.05), _LOOK_AGAIN_S)
        try:
            with self._target.open() as channel:
                self._failures = 0
                for delivery in due:
                    if self._ending.is_set():
                        break
                    self._send(channel, delivery)
        except (DestinationDown, PeerRefused) as error:
            self._is_down(error)
        return 0.0

    def _send(self, channel: Channel, delivery: DeliveryRecord) -> None:
        result = self._journal.result(delivery.result_id)
        if result is None:
            raise ValueError("a delivery belongs to a result")
        try:
            said = channel.send(self._results / result.folder, delivery.file)
        except PeerRefused as error:
            self._metrics.sent(self._destination, "refused")
            self._postpone(delivery, error)
        else:
            self._metrics.sent(self._destination, "sent")
            what = "a copy of the result" if delivery.file == WHOLE else delivery.file
            self._journal.sent(delivery.id, f"{what} to {self._destination}{said}")

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
        self._closed_until = time.time() + wait_s


@dataclass(frozen=True)
class StorageTarget:
    """C-STORE to an AE."""

    calling_ae: str
    called_ae: str
    host: str
    port: int

    @contextmanager
    def open(self) -> Iterator[Channel]:
        """An association.

        Raises:
            DestinationDown: Nothing answers.
            PeerRefused: It rejects the association.
        """
        from pynetdicom import AE, evt  # noqa: PLC0415  # an optional package: the extra `serve`

        ae = AE(self.calling_ae)
        ae.connection_timeout, ae.acse_timeout = _CONNECT_S, 30
        ae.dimse_timeout = ae.network_timeout = _ANSWER_S
        ae.implementation_class_uid = IMPLEMENTATION_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION
        for abstract in SENT_CLASSES:
            ae.add_requested_context(abstract, list(UNCOMPRESSED[:2]))
        opened: list[socket.socket] = []
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, lambda event: opened.append(event.assoc.dul.socket.socket)),
            (evt.EVT_CONN_OPEN, lambda event: keep_answers(event.assoc)),
        ]
        association: Any = ae.associate(self.host, self.port, ae_title=self.called_ae, evt_handlers=handlers)
        try:
            self._check(association)
            yield _Storage(association, self.called_ae)
        finally:
            if association.is_established:
                association.release()
            else:
                association.abort()
            for connection in opened:  # pynetdicom leaves one open if its peer was faster
                connection.close()

    def _check(self, association: Any) -> None:
        if association.is_rejected:
            answer = association.acceptor.primitive
            why = getattr(answer, "reason_str", "") or "no reason given"
            raise PeerRefused(f"{self.called_ae} rejects the association ({why})", reason="association-rejected")
        if not association.is_established:
            raise DestinationDown(
                f"{self.called_ae} does not answer at {self.host}:{self.port}", reason="no-connection"
            )


@dataclass(frozen=True)
class _Storage:
    association: Association
    called_ae: str

    def send(self, folder: Path, file: str) -> str:
        try:
            answer = self.association.send_c_store(folder / file)
        except OSError as error:  # from the file: pynetdicom itself names network errors
            raise PeerRefused(f"{file} cannot be read ({error.strerror})", reason="object-unreadable") from error
        except ValueError as error:  # raised by pynetdicom when no context was accepted for this object
            raise PeerRefused(f"{self.called_ae} accepts no objects like {file}", reason="no-context") from error
        except RuntimeError as error:  # raised by pynetdicom when the association has ended
            raise DestinationDown(f"{self.called_ae} ended the association", reason="association-ended") from error
        status = answer.get("Status")
        if status is None:
            raise DestinationDown(f"{self.called_ae} did not answer for {file}", reason="no-answer")
        if status == 0 or status >> 12 == 0xB:  # PS3.4 B.2.3: warnings mean that it was stored
            return "" if status == 0 else f" (warning {status:04X}H)"
        raise PeerRefused(f"{self.called_ae} refuses {file} with status {status:04X}H", reason="object-refused")


@dataclass(frozen=True)
class FolderTarget:
    """Copies into a folder: each result whole, in its own folder."""

    folder: Path

    @contextmanager
    def open(self) -> Iterator[Channel]:
        """The folder; `DestinationDown` if it does not exist (an unmounted disk must not fill the one below)."""
        if not self.folder.is_dir():
            raise DestinationDown("the folder for copies does not exist: create or mount it", reason="folder-unmounted")
        yield _Folder(self.folder)


@dataclass(frozen=True)
class _Folder:
    target: Path

    def send(self, folder: Path, file: str) -> str:
        name = f"{folder.parent.name}-{folder.name}"
        try:
            with temporary_folder(self.target, name) as temporary:
                shutil.copytree(folder / file, temporary, dirs_exist_ok=True)
                publish_folder(temporary, self.target / name)
        except (OutputError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PeerRefused(f"the copy cannot be written ({reason})", reason="copy-failed") from error
        return ""
