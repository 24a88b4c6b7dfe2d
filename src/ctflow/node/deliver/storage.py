"""Results to an AE by C-STORE."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctflow.compat.pynetdicom import keep_answers
from ctflow.core.errors import DestinationDown, PeerRefused
from ctflow.dicom.write.ct_series import IMPLEMENTATION_UID
from ctflow.node.deliver.send import ANSWER_S, Channel
from ctflow.node.journal.commitments import Reference
from ctflow.node.receive.commitment import COMMITMENT, COMMITMENT_INSTANCE, REQUEST, request_dataset
from ctflow.node.receive.headers import IMPLEMENTATION_VERSION
from ctflow.node.receive.receiver import UNCOMPRESSED, VERIFICATION
from ctflow.node.tls import TlsContext

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
TakeReport = Callable[[int, str, bytes, str], int]  # `CommitmentService.report`
_CONNECT_S = 10.0
_REPORT_S = 2.0  # for the report on the same association: many peers send it at once


@dataclass(frozen=True)
class StorageTarget:
    """C-STORE to an AE."""

    calling_ae: str
    called_ae: str
    host: str
    port: int
    tls: TlsContext | None = None
    commitment: Literal["none", "auto", "required"] = "none"
    report: TakeReport | None = None

    @contextmanager
    def open(self) -> Iterator[Channel]:
        """An association.

        Raises:
            DestinationDown: Nothing answers.
            PeerRefused: It rejects the association, or offers no storage commitment where that is required.
        """
        wanted = () if self.commitment == "none" else (COMMITMENT,)
        reported = threading.Event()
        with self.association((*SENT_CLASSES, *wanted), handlers=self._handlers(reported)) as association:
            offered = any(context.abstract_syntax == COMMITMENT for context in association.accepted_contexts)
            if self.commitment == "required" and not offered:
                raise PeerRefused(f"{self.called_ae} offers no storage commitment", reason="no-commitment")
            yield _Storage(association, self.called_ae, offered, reported)

    def _handlers(self, reported: threading.Event) -> list[Any]:
        """What takes a report of storage commitment on the association of its request."""
        from pynetdicom import evt  # noqa: PLC0415  # an optional package: the extra `serve`

        take = self.report
        if take is None or self.commitment == "none":
            return []

        def handle(event: Any) -> tuple[int, None]:
            asked, data = event.request, event.request.EventInformation
            content = b"" if data is None else data.getvalue()
            instance, syntax = str(asked.AffectedSOPInstanceUID or ""), str(event.context.transfer_syntax)
            status = take(int(asked.EventTypeID or 0), instance, content, syntax)
            reported.set()
            return status, None

        return [(evt.EVT_N_EVENT_REPORT, handle)]

    def ask(self) -> str:
        """Ask for a C-ECHO; return what it answered, in words.

        Raises:
            DestinationDown: Nothing answers.
            PeerRefused: It rejects the association, or the C-ECHO.
        """
        with self.association((VERIFICATION,)) as association:
            try:
                status = association.send_c_echo().get("Status")
            except (ValueError, RuntimeError) as error:  # no context, or it has ended the association
                raise PeerRefused(f"{self.called_ae} does not answer C-ECHO", reason="no-context") from error
            if status != 0:
                raise PeerRefused(f"{self.called_ae} does not answer C-ECHO with success", reason="object-refused")
            secured: Any = association.dul.socket.socket if self.tls is not None else None
            return "answers C-ECHO" + (f", with {secured.version()}" if secured is not None else "")

    @contextmanager
    def association(
        self, classes: Sequence[str], *, as_provider: bool = False, handlers: Sequence[Any] = ()
    ) -> Iterator[Any]:
        """An association with contexts of these SOP classes; as their provider, not their user.

        Raises:
            DestinationDown: Nothing answers.
            PeerRefused: It rejects the association.
        """
        from pynetdicom import AE, build_role, evt  # noqa: PLC0415  # an optional package: the extra `serve`

        ae = AE(self.calling_ae)
        ae.connection_timeout, ae.acse_timeout = _CONNECT_S, 30
        ae.dimse_timeout = ae.network_timeout = ANSWER_S
        ae.implementation_class_uid = IMPLEMENTATION_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION
        for abstract in classes:
            ae.add_requested_context(abstract, list(UNCOMPRESSED[:2]))
        opened: list[socket.socket] = []
        all_handlers: list[Any] = [
            *handlers,
            (evt.EVT_CONN_OPEN, lambda event: opened.append(event.assoc.dul.socket.socket)),
            (evt.EVT_CONN_OPEN, lambda event: keep_answers(event.assoc)),
        ]
        if self.tls is not None:
            self.tls.forget_failure()
        association: Any = ae.associate(
            self.host,
            self.port,
            ae_title=self.called_ae,
            evt_handlers=all_handlers,
            ext_neg=[build_role(each, scp_role=True) for each in classes] if as_provider else [],
            tls_args=None if self.tls is None else (self.tls.context, self.host),
        )
        try:
            self._check(association)
            for context in association.accepted_contexts if as_provider else ():
                context._as_scp = True  # many users of storage commitment do not negotiate the role, and take reports
            yield association
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
            if self.tls is not None and self.tls.failure:
                raise DestinationDown(f"{self.called_ae}: {self.tls.failure}", reason="tls")
            if association.rejected_contexts:
                raise PeerRefused(f"{self.called_ae} accepts nothing that was proposed", reason="no-context")
            raise DestinationDown(
                f"{self.called_ae} does not answer at {self.host}:{self.port}", reason="no-connection"
            )


@dataclass(frozen=True)
class _Storage:
    association: Association
    called_ae: str
    commits: bool = False
    reported: threading.Event = field(default_factory=threading.Event)

    def request_commitment(self, transaction_uid: str, references: Sequence[Reference]) -> None:
        """Ask the destination to commit to what it took (`send.Committing`)."""
        dataset = request_dataset(transaction_uid, references)
        try:
            answer, _ = self.association.send_n_action(dataset, REQUEST, COMMITMENT, COMMITMENT_INSTANCE)
        except (ValueError, RuntimeError) as error:  # it has ended the association
            raise PeerRefused(f"{self.called_ae} ended the association", reason="commitment-refused") from error
        status = answer.get("Status")
        if status != 0:
            said = "does not answer" if status is None else f"answers with status {status:04X}H"
            raise PeerRefused(f"{self.called_ae} {said} to the request", reason="commitment-refused")
        # Many report at once on this association, and it must be open for that; other reports come to the receiver.
        self.reported.wait(_REPORT_S)

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
