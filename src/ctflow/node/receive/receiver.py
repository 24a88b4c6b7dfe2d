"""The C-STORE SCP: receives CT and acknowledges it once it is on the disk and in the journal, not before."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ctflow.compat.pynetdicom import wake_by_events, without_logging
from ctflow.core.errors import BackendUnavailable, OutputError, SettingsInvalid
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import text
from ctflow.dicom.read.pixels.stored import READABLE
from ctflow.dicom.uids import CT_IMAGE_STORAGE, ENHANCED_CT_STORAGE
from ctflow.dicom.write.ct_series import IMPLEMENTATION_UID
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, InstanceRecord
from ctflow.node.journal.writes import key_of
from ctflow.node.metrics import Metrics
from ctflow.node.receive.headers import (
    IMPLEMENTATION_VERSION,
    file_meta,
    header_of_object,
    is_same_in_other_syntax,
    is_usable,
    patient_of_header,
    whole_number,
)
from ctflow.node.receive.inbox import Inbox
from ctflow.node.receive.pending import PendingConnections, bytes_here
from ctflow.node.receive.shortcut import StoreAnswer, StoreRequest, shorten
from ctflow.node.receive.titles import TITLES_END, refusal_of_titles
from ctflow.node.receive.transport import LimitedSocket, Shared

if TYPE_CHECKING:
    from pynetdicom.events import Event

VERIFICATION = "1.2.840.10008.1.1"
STORED_CLASSES = (CT_IMAGE_STORAGE, *ENHANCED_CT_STORAGE)
UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2")
# DICOM PS3.7 Annex C and PS3.4 B.2.3.
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
WRONG_CLASS = 0xA900
CANNOT_UNDERSTAND = 0xC000
CONFLICT = 0xC001  # other content was received under this SOPInstanceUID
TOO_MUCH = 0xC002  # the series is larger than this node accepts
_ANSWERS = {
    "conflict": (CONFLICT, "different content, or another syntax, was received under this UID"),
    "too-much": (TOO_MUCH, "the series is larger than this node accepts"),
}
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
        most_instances: Most instances of a series.
        most_bytes: Most bytes of a series.
        patient_data: Whether the journal keeps the patient's name, ID, birth date and accession number.
    """

    ae_title: str
    address: tuple[str, int]
    may_come: Callable[[str], bool]
    is_peer: Callable[[str, str], bool]
    associations: int
    most_pdu: int
    idle_s: float
    most_instances: int
    most_bytes: int
    patient_data: bool = False


def supported_contexts() -> dict[str, tuple[str, ...]]:
    """The contexts offered to a peer: abstract syntax -> transfer syntaxes, the preferred one first."""
    others = tuple(syntax for syntax in READABLE if syntax not in UNCOMPRESSED)
    return {VERIFICATION: UNCOMPRESSED, **dict.fromkeys(STORED_CLASSES, (*UNCOMPRESSED, *map(str, others)))}


class Receiver:
    """The node's C-STORE SCP.

    Args:
        reception: Its limits.
        inbox: Stores the files.
        journal: Records the instances.
        metrics: Counts instances, associations and refusals.

    Raises:
        BackendUnavailable: pynetdicom is not installed.
        SettingsInvalid: The address cannot be listened on.
    """

    def __init__(self, reception: Reception, inbox: Inbox, journal: Journal, metrics: Metrics) -> None:
        try:
            from pynetdicom import AE, evt  # noqa: PLC0415  # an optional package: the extra `serve`
            from pynetdicom.transport import AssociationServer  # noqa: PLC0415
        except ImportError as error:
            raise BackendUnavailable(
                "the DICOM node needs pynetdicom: pip install 'ctflow[serve]'", reason="not-installed"
            ) from error
        self._reception, self._inbox, self._journal, self._metrics = reception, inbox, journal, metrics
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
            ae.add_supported_context(abstract, list(syntaxes))
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
        )

    @property
    def associations(self) -> int:
        """Number of open associations."""
        return len(self._server.active_associations)

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

    def _begin(self, connection: socket.socket, address: tuple[str, int]) -> None:
        """Pass a connection to pynetdicom, behind a socket that enforces the limits."""
        refusal = refusal_of_titles(connection.recv(TITLES_END, socket.MSG_PEEK))
        if refusal is not None:
            self._reject(connection, address[0], *refusal)
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limited = LimitedSocket(
            connection,
            most_pdu=self._reception.most_pdu,
            patience_s=self._reception.idle_s,
            shared=self._shared,
            refused=lambda why: self._refused(address[0], why),
        )
        try:
            self._server.finish_request(limited, address)
        except BaseException:
            limited.close()
            raise

    def _reject(self, connection: socket.socket, host: str, answer: bytes, why: str) -> None:
        """Answer an association request that pynetdicom would leave without a reason, and record it."""
        self._count("association", 0)
        log.warning("association rejected: %s", why, extra={"facts": {"peer": host}})
        with contextlib.suppress(OSError):  # the peer may be gone
            # Unread bytes would turn the end of the connection into a reset, and the answer might be lost.
            connection.recv(bytes_here(connection))
            connection.sendall(answer)
        connection.close()

    def _opened(self, association: Any) -> None:
        wake_by_events(association)
        shorten(association, self._store)

    def _refused(self, host: str, why: str) -> None:
        self._count("connection", 0)
        log.warning("connection ended: %s", why, extra={"facts": {"peer": host}})

    def _requested(self, event: Event) -> None:
        requestor = event.assoc.requestor
        title = str(requestor.primitive.calling_ae_title if requestor.primitive else "").strip()
        if not self._reception.is_peer(title, str(requestor.address)):
            # Rejected-permanent, by the service user, calling AE title not recognised (PS3.8 9.3.4).
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)
            self._rejected(event)
            event.assoc.kill()

    def _rejected(self, event: Event) -> None:
        self._count("association", 0)
        log.warning("association rejected", extra={"facts": _caller(event.assoc)})

    def _established(self, event: Event) -> None:
        self._change(event, here=True)
        log.info("association", extra={"facts": _caller(event.assoc)})

    def _aborted(self, event: Event) -> None:
        self._change(event, here=False)
        log.warning("association aborted", extra={"facts": _caller(event.assoc)})

    def _released(self, event: Event) -> None:
        self._change(event, here=False)

    def _change(self, event: Event, *, here: bool) -> None:
        """Count an association once, even if both sides abort it or it is aborted before it began."""
        with self._lock:
            known = id(event.assoc) in self._counted
            (self._counted.add if here else self._counted.discard)(id(event.assoc))
        if known != here:
            self._metrics.associations(1 if here else -1)

    # -- instances ----------------------------------------------------------------------------------------------------

    def _store(self, association: Any, request: StoreRequest) -> StoreAnswer:
        """Answer a C-STORE request, whatever happens."""
        try:
            return self._decide(association, request)
        except Exception as error:
            # The last place that can name it: its text may hold anything from the instance.
            log.exception("an instance could not be checked")
            return OUT_OF_RESOURCES, f"unexpected {type(error).__name__}; the log says where"

    def _decide(self, association: Any, request: StoreRequest) -> StoreAnswer:
        if request.sop_class_uid != request.abstract_syntax:
            return WRONG_CLASS, "SOPClassUID is not that of the presentation context"
        if not is_usable(request.sop_instance_uid):
            return WRONG_CLASS, "SOPInstanceUID of the request is absent, too long or not printable"
        meta = file_meta(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax)
        header = header_of_object(meta, request.data, request.transfer_syntax)
        if isinstance(header, str):
            return CANNOT_UNDERSTAND, header
        for keyword, uid in (("SOPClassUID", request.sop_class_uid), ("SOPInstanceUID", request.sop_instance_uid)):
            if text(header, keyword) != uid:
                return WRONG_CLASS, f"{keyword} differs from the request's"
        study, series = text(header, "StudyInstanceUID"), text(header, "SeriesInstanceUID")
        if not (is_usable(study) and is_usable(series)):
            return CANNOT_UNDERSTAND, "a UID is absent, too long or not printable"
        caller = _caller(association)
        arrival = Arrival(
            series_uid=series,
            study_uid=study,
            sop_instance_uid=request.sop_instance_uid,
            sop_class_uid=request.sop_class_uid,
            transfer_syntax=request.transfer_syntax,
            modality=text(header, "Modality")[:16],
            calling_ae=caller["ae"],
            peer=caller["peer"],
            file="",
            bytes=len(request.data),
            sha256=hashlib.sha256(request.data).hexdigest(),
            expected_instances=whole_number(text(header, "NumberOfSeriesRelatedInstances")),
            patient=patient_of_header(header) if self._reception.patient_data else None,
        )
        return self._keep(arrival, [meta, request.data])

    def _keep(self, arrival: Arrival, parts: Sequence[bytes | memoryview]) -> StoreAnswer:
        """Write an instance, record it in the journal, and only then acknowledge it."""
        series = key_of(arrival.study_uid, arrival.series_uid, 1)
        known, name, taken = None, "", False
        try:
            known = self._journal.holds(arrival.study_uid, arrival.series_uid, arrival.sop_instance_uid)
            if known is None and not self._inbox.has_space(arrival.bytes):
                return self._no_space(arrival, "the disk is nearly full")
            name = known.file if known else self._inbox.write(series, arrival.sop_instance_uid, parts)
            receipt = self._journal.receive(
                replace(arrival, file=name, same_as=self._same_as(known, arrival, parts)),
                most_instances=self._reception.most_instances,
                most_bytes=self._reception.most_bytes,
            )
            taken = receipt.verdict == "new"
        except OutputError as error:
            return self._no_space(arrival, str(error))
        except (OSError, sqlite3.Error) as error:  # no descriptors, a file that was removed: it may pass
            log.exception("an instance could not be stored")
            return self._no_space(arrival, f"unexpected {type(error).__name__}; the log says where")
        finally:
            if name and known is None and not taken:
                self._inbox.remove(name)
        if receipt.verdict == "conflict" and known is None:  # it came twice at once: now one can be compared
            return self._keep(arrival, parts)
        self._count(receipt.verdict, arrival.bytes)
        return _ANSWERS.get(receipt.verdict, (SUCCESS, ""))

    def _same_as(
        self, known: InstanceRecord | None, arrival: Arrival, parts: Sequence[bytes | memoryview]
    ) -> str | None:
        """Digest of the stored instance, if this one is the same in another transfer syntax."""
        if known is None or known.transfer_syntax == arrival.transfer_syntax:
            return None
        path, came = self._inbox.folder / known.file, b"".join(parts)
        is_same = is_same_in_other_syntax(path, known.transfer_syntax, came, arrival.transfer_syntax)
        return known.sha256 if is_same else None

    def _count(self, verdict: str, count_bytes: int) -> None:
        if verdict == "new":
            self._metrics.received(count_bytes)
        elif verdict == "duplicate":
            self._metrics.duplicate()
        else:
            self._metrics.refused(verdict)

    def _no_space(self, arrival: Arrival, why: str) -> StoreAnswer:
        self._count("out-of-resources", arrival.bytes)
        log.error(
            "instance %s refused: %s",
            digest_of_uid(arrival.sop_instance_uid),
            why,
            extra={"facts": {"peer": arrival.peer}},
        )
        try:
            self._journal.refused(arrival, why)
        except OutputError:
            log.exception("the journal cannot be written")
        return OUT_OF_RESOURCES, why


def _caller(association: Any) -> dict[str, str]:
    requestor = association.requestor
    return {"ae": str(requestor.ae_title).strip(), "peer": str(requestor.address)}
