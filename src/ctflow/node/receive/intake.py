"""What becomes of an instance that a peer sends: checked, stored and recorded, and only then acknowledged."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ctflow.core.errors import OutputError
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import text
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, InstanceRecord, Receipt, SameUid
from ctflow.node.journal.writes import key_of
from ctflow.node.metrics import Metrics
from ctflow.node.receive.comparer import DECODED, Comparer
from ctflow.node.receive.headers import (
    COMPARABLE,
    file_meta,
    header_of_object,
    is_same_in_other_syntax,
    is_usable,
    patient_of_header,
    whole_number,
)
from ctflow.node.receive.inbox import Inbox
from ctflow.node.receive.shortcut import OTHER_STUDY, StoreAnswer, StoreRequest

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
# Kept, but not run: a scanner or router sends them with the images of a study, and must be able to finish.
LEFT_OUT = (
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.7.1",
    "1.2.840.10008.5.1.4.1.1.7.2",
    "1.2.840.10008.5.1.4.1.1.7.3",
    "1.2.840.10008.5.1.4.1.1.7.4",
    "1.2.840.10008.5.1.4.1.1.11.1",
    "1.2.840.10008.5.1.4.1.1.11.2",
    "1.2.840.10008.5.1.4.1.1.88.11",
    "1.2.840.10008.5.1.4.1.1.88.22",
    "1.2.840.10008.5.1.4.1.1.88.59",
    "1.2.840.10008.5.1.4.1.1.88.67",
    "1.2.840.10008.5.1.4.1.1.104.1",
)
_COUNT = "NumberOfSeriesRelatedInstances"
log = logging.getLogger(__name__)


class _Busy(Exception):
    """Too many images wait to be compared."""


@dataclass(frozen=True)
class IntakeLimits:
    """How much a series may have, and what is kept of it.

    Attributes:
        most_instances: Most instances of a series.
        most_bytes: Most bytes of a series.
        patient_data: Whether the journal keeps the patient's name, ID, birth date and accession number.
        by_study: Whether series wait for their whole study, so that the sender's count of instances completes none.
    """

    most_instances: int
    most_bytes: int
    patient_data: bool = False
    by_study: bool = False


@dataclass(frozen=True)
class Caller:
    """Who sends an instance: its AE title, or what stands for it, and its address."""

    ae_title: str
    address: str


class Intake:
    """Takes instances, by whatever way they come.

    Args:
        limits: Of a series.
        inbox: Stores the files.
        journal: Records the instances.
        metrics: Counts them.
        same_uid: What becomes of other content under a known UID, by sender.
    """

    def __init__(
        self,
        limits: IntakeLimits,
        inbox: Inbox,
        journal: Journal,
        metrics: Metrics,
        same_uid: Callable[[Caller], SameUid] = lambda _caller: "refuse",
    ) -> None:
        self._limits, self._inbox, self._journal, self._metrics = limits, inbox, journal, metrics
        self._same_uid = same_uid
        self.comparer = Comparer()

    def take(self, request: StoreRequest, caller: Caller) -> StoreAnswer:
        """Store an instance and say so, or refuse it, whatever happens.

        Args:
            request: The instance.
            caller: Who sends it.

        Returns:
            Status (DICOM PS3.4 B.2.3) and comment; a success only when it is on the disk and in the journal.
        """
        try:
            return self._decide(request, caller)
        except Exception as error:
            # The last place that can name it: its text may hold anything from the instance.
            log.exception("an instance could not be checked")
            return OUT_OF_RESOURCES, f"unexpected {type(error).__name__}; the log says where"

    def _decide(self, request: StoreRequest, caller: Caller) -> StoreAnswer:
        if request.sop_class_uid != request.abstract_syntax:
            return WRONG_CLASS, "SOPClassUID is not that of the presentation context"
        if not is_usable(request.sop_instance_uid):
            return WRONG_CLASS, "SOPInstanceUID of the request is absent, too long or not printable"
        meta = file_meta(request.sop_class_uid, request.sop_instance_uid, request.transfer_syntax)
        header = header_of_object(meta, request.data, request.transfer_syntax)
        if isinstance(header, str):
            return CANNOT_UNDERSTAND, header
        for keyword, uid, status in (
            ("SOPClassUID", request.sop_class_uid, WRONG_CLASS),
            ("SOPInstanceUID", request.sop_instance_uid, WRONG_CLASS),
            ("StudyInstanceUID", request.study_uid, OTHER_STUDY),
        ):
            if uid and text(header, keyword) != uid:
                return status, f"{keyword} differs from the request's"
        study, series = text(header, "StudyInstanceUID"), text(header, "SeriesInstanceUID")
        if not (is_usable(study) and is_usable(series)):
            return CANNOT_UNDERSTAND, "a UID is absent, too long or not printable"
        arrival = Arrival(
            series_uid=series,
            study_uid=study,
            sop_instance_uid=request.sop_instance_uid,
            sop_class_uid=request.sop_class_uid,
            transfer_syntax=request.transfer_syntax,
            modality=text(header, "Modality")[:16],
            calling_ae=caller.ae_title,
            peer=caller.address,
            file="",
            bytes=len(request.data),
            sha256=hashlib.sha256(request.data).hexdigest(),
            expected_instances=None if self._limits.by_study else whole_number(text(header, _COUNT)),
            same_uid=self._same_uid(caller),
            patient=patient_of_header(header) if self._limits.patient_data else None,
        )
        return self._keep(arrival, [meta, request.data])

    def _keep(self, arrival: Arrival, parts: Sequence[bytes | memoryview]) -> StoreAnswer:
        """Write an instance, record it in the journal, and only then acknowledge it."""
        known, name, taken = None, "", False
        try:
            known = self._known(arrival)
            same_as = self._same_as(known, arrival, parts)
            is_written = known is None or self._replaces(known, arrival, same_as)
            if is_written and not self._inbox.has_space(arrival.bytes):
                return self._no_space(arrival, "the disk is nearly full")
            if is_written:
                series = key_of(arrival.study_uid, arrival.series_uid, 1)
                name = self._inbox.write(series, arrival.sop_instance_uid, parts)
            receipt = self._record(replace(arrival, file=name, same_as=same_as))
            taken = receipt.verdict in ("new", "replaced")
        except OutputError as error:
            return self._no_space(arrival, str(error))
        except _Busy:  # the first one is kept, so its series can run
            self._count("busy", arrival)
            return OUT_OF_RESOURCES, "too many images in other transfer syntaxes are being compared: send it again"
        except (OSError, sqlite3.Error) as error:  # no descriptors, a file that was removed: it may pass
            log.exception("an instance could not be stored")
            return self._no_space(arrival, f"unexpected {type(error).__name__}; the log says where")
        finally:
            if name and not taken:
                self._inbox.remove(name)
        first = known is None and arrival.sop_class_uid not in LEFT_OUT
        if receipt.verdict == "again" or (first and receipt.verdict in ("conflict", "kept-first")):
            # It came twice at once, or the known one was removed meanwhile: now it can be told.
            return self._keep(replace(arrival, file=""), parts)
        if receipt.outdated is not None:
            self._inbox.remove_outdated(receipt.outdated)
        self._count(receipt.verdict, arrival)
        return _ANSWERS.get(receipt.verdict, (SUCCESS, ""))

    def _known(self, arrival: Arrival) -> InstanceRecord | None:
        if arrival.sop_class_uid in LEFT_OUT:
            return None
        return self._journal.holds(arrival.study_uid, arrival.series_uid, arrival.sop_instance_uid)

    def _replaces(self, known: InstanceRecord, arrival: Arrival, same_as: str | None) -> bool:
        """Whether an instance takes the place of the known one, so that its file is needed."""
        return arrival.same_uid == "newest" and known.sha256 not in (arrival.sha256, same_as)

    def _record(self, arrival: Arrival) -> Receipt:
        most = {"most_instances": self._limits.most_instances, "most_bytes": self._limits.most_bytes}
        record = self._journal.leave_out if arrival.sop_class_uid in LEFT_OUT else self._journal.receive
        return record(arrival, **most)

    def _same_as(
        self, known: InstanceRecord | None, arrival: Arrival, parts: Sequence[bytes | memoryview]
    ) -> str | None:
        """Digest of the stored instance, if this one is the same in another transfer syntax."""
        if known is None or known.transfer_syntax == arrival.transfer_syntax:
            return None
        path, came = self._inbox.folder / known.file, b"".join(parts)
        syntaxes = {known.transfer_syntax, arrival.transfer_syntax}
        is_same: bool | None = False
        if syntaxes <= COMPARABLE:
            is_same = is_same_in_other_syntax(path, known.transfer_syntax, came, arrival.transfer_syntax)
        elif syntaxes <= DECODED:
            is_same = self.comparer.is_same(path, came)
        if is_same is None:
            raise _Busy
        return known.sha256 if is_same else None

    def _count(self, verdict: str, arrival: Arrival) -> None:
        if verdict == "new" and arrival.sop_class_uid in LEFT_OUT:
            self._metrics.left_out()
        elif verdict == "new":
            self._metrics.received(arrival.bytes)
        elif verdict == "duplicate":
            self._metrics.duplicate()
        elif verdict in ("kept-first", "replaced"):
            self._metrics.same_uid(verdict)
        else:
            self._metrics.refused(verdict)

    def _no_space(self, arrival: Arrival, why: str) -> StoreAnswer:
        self._count("out-of-resources", arrival)
        log.error(
            "instance %s refused: %s",
            digest_of_uid(arrival.sop_instance_uid),
            why,
            extra={"facts": {"peer": arrival.peer}},
        )
        if arrival.sop_class_uid in LEFT_OUT:  # no series waits for it
            return OUT_OF_RESOURCES, why
        try:
            self._journal.refused(arrival, why)
        except OutputError:
            log.exception("the journal cannot be written")
        return OUT_OF_RESOURCES, why
