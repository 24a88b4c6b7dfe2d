"""The C-STORE SCP: receives CT and acknowledges it once it is on the disk and in the journal, not before."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctflow.compat.pynetdicom import wake_by_events, without_logging
from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.dicom.read.pixels.stored import READABLE
from ctflow.dicom.uids import CT_IMAGE_STORAGE, ENHANCED_CT_STORAGE
from ctflow.dicom.write.ct_series import IMPLEMENTATION_UID
from ctflow.node.metrics import Metrics
from ctflow.node.receive.commitment import COMMITMENT, CommitmentService, Conversation
from ctflow.node.receive.headers import IMPLEMENTATION_VERSION
from ctflow.node.receive.intake import LEFT_OUT, Caller, Intake
from ctflow.node.receive.pending import WITHOUT_TLS, PendingConnections, Security, bytes_here
from ctflow.node.receive.secured import Handshake, SecuredSocket
from ctflow.node.receive.shortcut import shorten
from ctflow.node.receive.titles import TITLES_END, refusal_of_titles
from ctflow.node.receive.transport import LimitedSocket, Shared

if TYPE_CHECKING:
    from pynetdicom.events import Event

VERIFICATION = "1.2.840.10008.1.1"
STORED_CLASSES = (CT_IMAGE_STORAGE, *ENHANCED_CT_STORAGE)
LOSSY_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")  # of objects that are not run
UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reception:
    """A receiver's limits.

    Attributes:
        ae_title: The node's title; requests for another one are rejected.
        address: Where it listens: host and port; port 0 takes a free one.
        may_come: Whether an address may connect.
        is_peer: Whether an AE title at an address may have an association.
        associations: Most at the same time; more are rejected.
        most_pdu: Most bytes of a PDU.
        idle_s: Seconds of silence after which an association is ended.
        security: TLS.
        certificate_refusal: Why a peer (AE title, address) may not come with this certificate, whose fingerprint is
            empty without one and None without TLS; empty if it may.
    """

    ae_title: str
    address: tuple[str, int]
    may_come: Callable[[str], bool]
    is_peer: Callable[[str, str], bool]
    associations: int
    most_pdu: int
    idle_s: float
    security: Security = WITHOUT_TLS
    certificate_refusal: Callable[[str, str, str | None], str] = lambda _title, _host, _certificate: ""


def supported_contexts() -> dict[str, tuple[str, ...]]:
    """The contexts offered to a peer: abstract syntax -> transfer syntaxes, the preferred one first."""
    others = tuple(syntax for syntax in READABLE if syntax not in UNCOMPRESSED)
    readable = (*UNCOMPRESSED, *map(str, others))
    return {
        VERIFICATION: UNCOMPRESSED,
        COMMITMENT: UNCOMPRESSED,
        **dict.fromkeys(STORED_CLASSES, readable),
        **dict.fromkeys(LEFT_OUT, (*readable, *LOSSY_JPEG)),
    }


class Receiver:
    """The node's C-STORE SCP.

    Args:
        reception: Its limits.
        intake: Takes the instances.
        metrics: Counts associations and refusals.
        commitment: Answers requests for storage commitment.

    Raises:
        BackendUnavailable: pynetdicom is not installed.
        SettingsInvalid: The address cannot be listened on.
    """

    def __init__(
        self, reception: Reception, intake: Intake, metrics: Metrics, commitment: CommitmentService | None = None
    ) -> None:
        try:
            from pynetdicom import AE, evt  # noqa: PLC0415  # an optional package: the extra `serve`
            from pynetdicom.transport import AssociationServer  # noqa: PLC0415
        except ImportError as error:
            raise BackendUnavailable(
                "the DICOM node needs pynetdicom: pip install 'ctflow[serve]'", reason="not-installed"
            ) from error
        self._reception, self._intake, self._metrics, self._commitment = reception, intake, metrics, commitment
        without_logging()  # the journal keeps the audit trail
        self._shared = Shared()
        self._counted: set[int] = set()
        self._lock = threading.Lock()
        ae = AE(reception.ae_title)
        ae.require_called_aet = True
        ae.maximum_associations = reception.associations
        ae.maximum_pdu_size = reception.most_pdu
        ae.network_timeout = reception.idle_s
        ae.acse_timeout = min(30.0, reception.idle_s)
        ae.implementation_class_uid = IMPLEMENTATION_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION
        for abstract, syntaxes in supported_contexts().items():
            # A destination that reports what it commits to comes as provider of the service.
            roles = {"scu_role": True, "scp_role": True} if abstract == COMMITMENT else {}
            ae.add_supported_context(abstract, list(syntaxes), **roles)
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, lambda event: self._opened(event.assoc)),
            (evt.EVT_REQUESTED, self._requested),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_ESTABLISHED, self._established),
            (evt.EVT_ABORTED, self._aborted),
            (evt.EVT_RELEASED, self._released),
        ]
        try:
            self._server = ae.make_server(reception.address, evt_handlers=handlers, server_class=AssociationServer)
        except OSError as error:
            host, port = reception.address
            raise SettingsInvalid(
                f"cannot listen on {host}:{port} ({error.strerror}): give another port", reason="cannot-listen"
            ) from error
        listening = self._server.socket
        if listening is None:
            raise ValueError("a server that was just made has a socket")
        self.port = int(listening.getsockname()[1])
        listening.listen(256)
        self._waiting = PendingConnections(
            listening,
            may_come=reception.may_come,
            hand_on=self._begin,
            is_full=lambda: self.associations > reception.associations,
            most_pdu=reception.most_pdu,
            patience_s=ae.acse_timeout,
            refused=self._refused,
            security=reception.security,
        )

    @property
    def associations(self) -> int:
        """Number of open associations."""
        return len(self._server.active_associations)

    @property
    def shared(self) -> Shared:
        """Bytes of the messages being received on all connections."""
        return self._shared

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads that must live while the node receives."""
        return (self._waiting,)

    def start(self) -> None:
        """Listen in a separate thread."""
        self._waiting.start()
        log.info("listening as %s on port %d", self._reception.ae_title, self.port)

    def stop(self, grace_s: float) -> None:
        """Accept no more associations, let the open ones finish for a while, then end them."""
        self._waiting.stop()
        associations = self._server.active_associations
        for association in associations:
            association.join(grace_s / max(len(associations), 1))
        for association in self._server.active_associations:
            association.abort()

    # -- associations -------------------------------------------------------------------------------------------------

    def _begin(self, connection: socket.socket, address: tuple[str, int], handshake: Handshake | None) -> None:
        """Pass a connection to pynetdicom, behind a socket that enforces the limits."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = bytes(handshake.came) if handshake else connection.recv(TITLES_END, socket.MSG_PEEK)
        limits: dict[str, Any] = {
            "most_pdu": self._reception.most_pdu,
            "patience_s": self._reception.idle_s,
            "shared": self._shared,
            "refused": lambda why: self._refused(address[0], why),
        }
        refusal = refusal_of_titles(request)
        limited = SecuredSocket(connection, handshake, **limits) if handshake else LimitedSocket(connection, **limits)
        try:
            if refusal is not None:
                self._reject(limited, address[0], *refusal)
                return
            self._server.finish_request(limited, address)
        except BaseException:
            limited.close()
            raise

    def _reject(self, connection: LimitedSocket, host: str, answer: bytes, why: str) -> None:
        """Answer an association request that pynetdicom would leave without a reason, and record it."""
        self._metrics.refused("association")
        log.warning("association rejected: %s", why, extra={"facts": {"peer": host}})
        with contextlib.suppress(OSError):  # the peer may be gone
            # Unread bytes would turn the end of the connection into a reset, and the answer might be lost.
            connection.take_rest(bytes_here(connection))
            connection.send(answer)
        connection.shutdown(socket.SHUT_WR)
        connection.close()

    def _opened(self, association: Any) -> None:
        wake_by_events(association)
        service, with_tls = self._commitment, association.dul.socket.socket.certificate is not None
        shorten(
            association,
            lambda of, request: self._intake.take(request, _caller(of)),
            None
            if service is None
            else lambda layer: Conversation(layer, service, lambda: _caller(association), with_tls=with_tls),
        )

    def _refused(self, host: str, why: str) -> None:
        self._metrics.refused("connection")
        log.warning("connection ended: %s", why, extra={"facts": {"peer": host}})

    def _requested(self, event: Event) -> None:
        requestor = event.assoc.requestor
        title = str(requestor.primitive.calling_ae_title if requestor.primitive else "").strip()
        host = str(requestor.address)
        is_known, why = False, ""
        try:  # pynetdicom would log an error of this handler, and accept the association
            is_known = self._reception.is_peer(title, host)
            why = self._certificate_refusal(event, title, host) if is_known else ""
        except Exception:
            log.exception("an association could not be checked")
            why = "it could not be checked"
        if why or not is_known:
            # Rejected-permanent, by the service user, calling AE title not recognised (PS3.8 9.3.4).
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)
            self._rejected(event)
            event.assoc.kill()

    def _certificate_refusal(self, event: Event, title: str, host: str) -> str:
        """Why the peer's certificate, or its absence, is refused; empty if it is not."""
        held: Any = event.assoc.dul.socket
        connection = held.socket if held is not None else None
        if connection is None:
            return "the peer closed the connection"  # nothing of its security
        why = self._reception.certificate_refusal(title, host, connection.certificate)
        if why:
            self._reception.security.rejected(host, why)
        return why

    def _rejected(self, event: Event) -> None:
        self._metrics.refused("association")
        log.warning("association rejected", extra={"facts": _facts(event.assoc)})

    def _established(self, event: Event) -> None:
        self._change(event, here=True)
        log.info("association", extra={"facts": _facts(event.assoc)})

    def _aborted(self, event: Event) -> None:
        self._change(event, here=False)
        log.warning("association aborted", extra={"facts": _facts(event.assoc)})

    def _released(self, event: Event) -> None:
        self._change(event, here=False)

    def _change(self, event: Event, *, here: bool) -> None:
        """Count an association once, even if both sides abort it or it is aborted before it began."""
        with self._lock:
            known = id(event.assoc) in self._counted
            (self._counted.add if here else self._counted.discard)(id(event.assoc))
        if known != here:
            self._metrics.associations(1 if here else -1)


def _caller(association: Any) -> Caller:
    requestor = association.requestor
    return Caller(str(requestor.ae_title).strip(), str(requestor.address))


def _facts(association: Any) -> dict[str, str]:
    caller = _caller(association)
    return {"ae": caller.ae_title, "peer": caller.address}
