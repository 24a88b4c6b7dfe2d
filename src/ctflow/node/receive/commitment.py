"""Storage commitment (PS3.4 Annex J) as it arrives: requests of peers, and reports of destinations."""

from __future__ import annotations

import logging
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from pydicom.dataset import Dataset

from ctflow.compat.pydicom import lenient
from ctflow.compat.pynetdicom import UpperLayer
from ctflow.core.errors import OutputError
from ctflow.dicom.attributes import PARSE_ERRORS, text
from ctflow.node.journal.commitments import CommitmentRequest, Commitments, Reference
from ctflow.node.receive.headers import is_usable
from ctflow.node.receive.intake import Caller
from ctflow.node.receive.shortcut import Message, element, pdus, text_of, unsigned_short

COMMITMENT = "1.2.840.10008.1.20.1"  # Storage Commitment Push Model SOP Class
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"  # its well-known instance
REQUEST, ALL_COMMITTED, SOME_FAILED = 1, 1, 2  # action type; event types
# Statuses of N-ACTION and N-EVENT-REPORT (PS3.7 Annex C).
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT = 0x0113
INVALID_VALUE = 0x0115
MISSING_ATTRIBUTE = 0x0120
NO_SUCH_ACTION = 0x0123
RESOURCE_LIMIT = 0x0213
MOST_REFERENCES = 20_000  # of each sequence
_ITEM, _BIG_ITEM = b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"  # the tag with which each begins
# After a request the peer may release its association, or wait for the report on it.
SAME_ASSOCIATION_S, NEW_ASSOCIATION_S, PATIENCE_S = 1.0, 2.0, 30.0
log = logging.getLogger(__name__)


class CommitmentRefused(Exception):
    """A request or report cannot be taken."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status:04X}H")
        self.status = status


class CommitmentService:
    """Answers what peers say about storage commitment.

    Args:
        commitments: Records it.
        supported: SOP classes that the node stores.
    """

    def __init__(self, commitments: Commitments, supported: Iterable[str]) -> None:
        self.commitments = commitments
        self._supported = frozenset(supported)

    def request(
        self, action: int, instance: str, data: bytes, syntax: str, caller: Caller, *, with_tls: bool
    ) -> tuple[int, int | None]:
        """Take an N-ACTION request.

        Args:
            action: Its action type.
            instance: Its requested SOP instance.
            data: Its data set.
            syntax: The data set's transfer syntax.
            caller: Who asks.
            with_tls: Whether it came with TLS.

        Returns:
            The status, and the number of the report that is due; None where there is none.
        """
        try:
            if instance != COMMITMENT_INSTANCE:
                return NO_SUCH_INSTANCE, None
            if action != REQUEST:
                return NO_SUCH_ACTION, None
            transaction, references, _ = _read(data, syntax)
            if not references or self.commitments.is_full(caller.ae_title):
                return (RESOURCE_LIMIT if references else MISSING_ATTRIBUTE), None
            examined = self.commitments.examined(references, self._supported)
            asked = CommitmentRequest(transaction, caller.ae_title, caller.address, with_tls, examined)
            return SUCCESS, self.commitments.asked(asked, NEW_ASSOCIATION_S)
        except CommitmentRefused as refused:
            return refused.status, None
        except (OutputError, OSError, sqlite3.Error):
            log.exception("a request for storage commitment could not be recorded")
            return PROCESSING_FAILURE, None

    def report(self, event: int, instance: str, data: bytes, syntax: str) -> int:
        """Take an N-EVENT-REPORT request of a destination; return the status (see `request`)."""
        try:
            if instance != COMMITMENT_INSTANCE:
                return NO_SUCH_INSTANCE
            if event not in (ALL_COMMITTED, SOME_FAILED):
                return NO_SUCH_EVENT
            transaction, committed, failed = _read(data, syntax)
            known = self.commitments.answered(
                transaction,
                {each.sop_instance_uid for each in committed},
                {each.sop_instance_uid: each.failure or PROCESSING_FAILURE for each in failed},
            )
        except CommitmentRefused as refused:
            return refused.status
        except (OutputError, OSError, sqlite3.Error):
            log.exception("a report of storage commitment could not be recorded")
            return PROCESSING_FAILURE
        return SUCCESS if known else INVALID_VALUE


@lenient()
def _read(data: bytes, syntax: str) -> tuple[str, list[Reference], list[Reference]]:
    """The transaction, what is referenced, and what has failed, of a data set."""
    from pynetdicom.dsutils import decode  # noqa: PLC0415  # an optional package: the extra `serve`

    # Before they are decoded: half a million empty items, which 4 MB hold, take a quarter of a minute.
    if data.count(_BIG_ITEM if syntax == "1.2.840.10008.1.2.2" else _ITEM) > 2 * MOST_REFERENCES:
        raise CommitmentRefused(RESOURCE_LIMIT)
    try:
        dataset = decode(BytesIO(data), syntax == "1.2.840.10008.1.2", syntax != "1.2.840.10008.1.2.2")
        transaction = text(dataset, "TransactionUID")
        referenced = _references(dataset, "ReferencedSOPSequence")
        failed = _references(dataset, "FailedSOPSequence")
    except PARSE_ERRORS as error:
        raise CommitmentRefused(PROCESSING_FAILURE) from error
    if not transaction:
        raise CommitmentRefused(MISSING_ATTRIBUTE)
    if not is_usable(transaction):
        raise CommitmentRefused(INVALID_VALUE)
    return transaction, referenced, failed


def _references(dataset: Dataset, keyword: str) -> list[Reference]:
    items = dataset.get(keyword) or ()
    if len(items) > MOST_REFERENCES:
        raise CommitmentRefused(RESOURCE_LIMIT)
    found = [
        Reference(text(item, "ReferencedSOPClassUID"), text(item, "ReferencedSOPInstanceUID"), _failure(item))
        for item in items
    ]
    for each in found:
        if not (each.sop_class_uid and each.sop_instance_uid):
            raise CommitmentRefused(MISSING_ATTRIBUTE)
        if not (is_usable(each.sop_class_uid) and is_usable(each.sop_instance_uid)):
            raise CommitmentRefused(INVALID_VALUE)
    return found


def _failure(item: Dataset) -> int | None:
    found = item.get("FailureReason")
    return found if isinstance(found, int) and 0 < found < 2**16 else None


def request_dataset(transaction_uid: str, references: Sequence[Reference]) -> Dataset:
    """The data set of a request (PS3.4 J.3.2.1.1)."""
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    dataset.ReferencedSOPSequence = [_item(each) for each in references]
    return dataset


def report_dataset(request: CommitmentRequest) -> tuple[int, Dataset]:
    """Event type and data set of a report (PS3.4 J.3.3.1.1)."""
    committed = [each for each in request.references if each.failure is None]
    failed = [each for each in request.references if each.failure is not None]
    dataset = Dataset()
    dataset.TransactionUID = request.transaction_uid
    if committed:
        dataset.ReferencedSOPSequence = [_item(each) for each in committed]
    if failed:
        dataset.FailedSOPSequence = [_item(each) for each in failed]
    return SOME_FAILED if failed else ALL_COMMITTED, dataset


def _item(reference: Reference) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    if reference.failure is not None:
        item.FailureReason = reference.failure
    return item


def encoded(dataset: Dataset, syntax: str) -> bytes:
    """A data set in one of the uncompressed transfer syntaxes."""
    from pynetdicom.dsutils import encode  # noqa: PLC0415  # an optional package: the extra `serve`

    found: Any = encode(dataset, syntax == "1.2.840.10008.1.2", syntax != "1.2.840.10008.1.2.2")
    if found is None:
        raise ValueError("a data set of our own can be encoded")
    return bytes(found)


_ACTION, _EVENT, _EVENT_ANSWER = 0x0130, 0x0100, 0x8100  # Command Field, PS3.7 10.3
_IS_ANSWER, _HAS_DATA, _HAS_NONE = 0x8000, 0x0001, 0x0101


class Conversation:
    """Storage commitment on one association to this node: `shortcut.Others`.

    The report of a request goes out on the same association if that is still open after a while, as the peer may wait
    for it there. `deliver/reports.py` sends those that did not.

    Args:
        layer: Of the association.
        service: Answers.
        caller: The peer.
        with_tls: Whether it came with TLS.
    """

    def __init__(
        self, layer: UpperLayer, service: CommitmentService, caller: Callable[[], Caller], *, with_tls: bool
    ) -> None:
        self._layer, self._service, self._caller, self._with_tls = layer, service, caller, with_tls
        self._due: list[tuple[float, int, Message]] = []
        self._sent: dict[int, int] = {}  # message -> number of the report
        self._messages = 0

    def takes(self, kind: int, abstract_syntax: str) -> bool:
        """Whether messages of this kind are taken in such a context."""
        return abstract_syntax == COMMITMENT and kind in (_ACTION, _EVENT, _EVENT_ANSWER)

    def take(self, message: Message) -> None:
        """Take a message, and answer a request."""
        if message.kind == _EVENT_ANSWER:
            self._take_answer(message)
            return
        is_action = message.kind == _ACTION
        instance = text_of(message.elements.get(0x1001 if is_action else 0x1000, b""))
        kind = unsigned_short(message.elements, 0x1008 if is_action else 0x1002)
        if is_action:
            status, report = self._service.request(
                kind, instance, message.data, message.transfer_syntax, self._caller(), with_tls=self._with_tls
            )
            if report is not None:
                # Without its megabytes of data: a peer may send a thousand before the first report is due.
                self._due.append((time.monotonic() + SAME_ASSOCIATION_S, report, replace(message, data=b"")))
        else:
            status = self._service.report(kind, instance, message.data, message.transfer_syntax)
        self._send(
            message,
            {
                0x0002: _uid(COMMITMENT),
                0x0100: _short(message.kind | _IS_ANSWER),
                0x0120: message.elements.get(0x0110, _short(0)),
                0x0800: _short(_HAS_NONE),
                0x0900: _short(status),
                0x1000: _uid(COMMITMENT_INSTANCE),
                **({} if is_action or kind < 0 else {0x1002: _short(kind)}),
                **({0x1008: _short(kind)} if is_action and kind >= 0 else {}),
            },
        )

    def idle(self) -> None:
        """Send a report that is due."""
        if not self._due or self._due[0][0] > time.monotonic():
            return
        _, report, message = self._due.pop(0)
        try:
            found = self._service.commitments.find(report)
            if found is None:  # it was sent on another association
                return
            self._service.commitments.postpone(report, PATIENCE_S)
        except (OutputError, OSError, sqlite3.Error):
            log.exception("a report of storage commitment was not sent")
            return
        kind, dataset = report_dataset(found.request)
        self._messages += 1
        self._sent[self._messages] = report
        self._send(
            message,
            {
                0x0002: _uid(COMMITMENT),
                0x0100: _short(_EVENT),
                0x0110: _short(self._messages),
                0x0800: _short(_HAS_DATA),
                0x1000: _uid(COMMITMENT_INSTANCE),
                0x1002: _short(kind),
            },
            encoded(dataset, message.transfer_syntax),
        )

    def _take_answer(self, message: Message) -> None:
        report = self._sent.pop(unsigned_short(message.elements, 0x0120), None)
        if report is None or unsigned_short(message.elements, 0x0900) != SUCCESS:
            return  # sent again on an association of its own
        try:
            self._service.commitments.reported(report)
        except (OutputError, OSError, sqlite3.Error):  # then it is sent again, which is harmless
            log.exception("a report of storage commitment could not be recorded")

    def _send(self, message: Message, elements: Mapping[int, bytes], data: bytes = b"") -> None:
        body = b"".join(element(number, value) for number, value in sorted(elements.items()))
        command = element(0x0000, struct.pack("<L", len(body))) + body
        most, context = self._layer.most_pdu, message.context_id
        parts = [*pdus(context, command, most), *(pdus(context, data, most, is_command=False) if data else ())]
        self._layer.send(b"".join(parts))


def _uid(value: str) -> bytes:
    return value.encode() + b"\0" * (len(value) % 2)


def _short(value: int) -> bytes:
    return struct.pack("<H", value)
