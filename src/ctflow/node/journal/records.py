"""The journal's records: one frozen value per row, without patient data unless that is switched on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ctflow.core.volume import digest_of_uid

SeriesState = Literal["received", "complete", "running", "done", "delivered", "aside", "dead", "discarded"]
STATES: tuple[SeriesState, ...] = ("received", "complete", "running", "done", "delivered", "aside", "dead", "discarded")
DeliveryState = Literal["waiting", "stored", "sent", "dead", "withdrawn"]  # stored: the destination is to commit to it
SameUid = Literal["refuse", "keep_first", "newest"]  # what to do with other content under a known SOPInstanceUID


class Why(NamedTuple):
    """The reason for the state of a series or a delivery.

    Attributes:
        reason: A stable name: an error's (docs/errors.md), a selection rule's (docs/dicom.md) or the node's own
            (docs/node.md).
        message: A sentence without patient data.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class Patient:
    """The patient's identity; kept only where the settings switch patient data on."""

    name: str
    patient_id: str
    birth_date: str
    accession_number: str


@dataclass(frozen=True)
class Arrival:
    """One received instance, fsynced in its file.

    Attributes:
        series_uid: SeriesInstanceUID from the data set.
        study_uid: StudyInstanceUID.
        sop_instance_uid: SOPInstanceUID.
        sop_class_uid: SOPClassUID.
        transfer_syntax: UID.
        modality: Modality, or "".
        calling_ae: AE title of the sender.
        peer: Its address.
        file: Path below the inbox.
        bytes: Length of the encoded data set.
        sha256: Of the encoded data set.
        same_as: Digest of an instance of another transfer syntax that was found to have the same content.
        same_uid: What becomes of it if an instance of its UID has another content.
        expected_instances: How many instances the series has, where the data set counts them.
        patient: Only where patient data is switched on.
    """

    series_uid: str
    study_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax: str
    modality: str
    calling_ae: str
    peer: str
    file: str
    bytes: int
    sha256: str
    same_as: str | None = None
    same_uid: SameUid = "refuse"
    expected_instances: int | None = None
    patient: Patient | None = None


@dataclass(frozen=True)
class Receipt:
    """The journal's verdict on an arrival.

    Attributes:
        verdict: "new" (kept), "duplicate" (its file is not needed), "conflict" (other content has this UID),
            "kept-first" (the same, but the sender need not know), "replaced" (kept in place of the earlier one) or
            "too-much" (the series is larger than allowed and was set aside). "again": the journal has changed since
            the arrival was compared, and needs its file.
        key: The series.
        completes: Whether this is the last one by the sender's count.
        outdated: File of the replaced instance that nothing refers to any more.
    """

    verdict: Literal["new", "duplicate", "conflict", "kept-first", "replaced", "too-much", "again"]
    key: str
    completes: bool = False
    outdated: str | None = None


@dataclass(frozen=True)
class SeriesRecord:
    """One revision of a series.

    Attributes:
        key: Digest of its UIDs and revision; the name of the series everywhere, also in addresses of pages.
        revision: 1, or more where instances came after a result.
        previous: Key of the earlier revision.
        state: Its state.
        reason: Why it is set aside or dead, or why it waits for a retry (`Why`).
        message: The same as a sentence; alone where a ctflow version before reasons wrote it.
        calling_ae: AE title of the sender.
        peer: Its address.
        modality: Modality of the first instance.
        first_at: Unix time of the first instance.
        last_at: Unix time of the last one.
        expected_instances: How many the sender announced.
        instances: How many were received.
        bytes: Their total length.
        duplicates: How many came again.
        refused: Instances that this node refused and that did not come again yet.
        attempts: How often it ran.
        next_at: Unix time before which it is not tried again.
        series_uid: SeriesInstanceUID. Show `digest` instead.
        study_uid: StudyInstanceUID. Show its digest instead.
        patient: None unless patient data is switched on.
    """

    key: str
    revision: int
    previous: str | None
    state: SeriesState
    reason: str | None
    message: str | None
    calling_ae: str
    peer: str
    modality: str
    first_at: float
    last_at: float
    expected_instances: int | None
    instances: int
    bytes: int
    duplicates: int
    refused: int
    attempts: int
    next_at: float
    series_uid: str
    study_uid: str
    patient: Patient | None

    @property
    def digest(self) -> str:
        """The name of the series in every other message of ctflow."""
        return digest_of_uid(self.series_uid)

    @property
    def study_digest(self) -> str:
        """The same for its study."""
        return digest_of_uid(self.study_uid)


@dataclass(frozen=True)
class InstanceRecord:
    """One instance of a series; `file` is below the inbox, `replaced` counts the earlier ones of its UID."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax: str
    file: str
    bytes: int
    sha256: str
    received_at: float
    replaced: int = 0

    @property
    def identity(self) -> str:
        """What a set of instances is named by: the UID, with the content where that has changed under the UID."""
        return f"{self.sop_instance_uid} {self.sha256}" if self.replaced else self.sop_instance_uid


@dataclass(frozen=True)
class ObjectRecord:
    """One DICOM object of a result; `file` is its name in the result's folder, with its volume's folder if any."""

    file: str
    sop_class_uid: str
    sop_instance_uid: str
    sha256: str


@dataclass(frozen=True)
class ResultRecord:
    """A model's result for a set of instances.

    Attributes:
        id: Number in the journal.
        series_key: The series.
        revision: Its revision.
        set_digest: Digest of the SOPInstanceUIDs that were computed.
        folder: Below the results folder; holds segmentation.dcm, measurements.dcm, preview.png, result.json and, where
            the settings ask for it, report.html.
        model: The model's name.
        version: The model's version.
        weights: Digest of its weights.
        demonstration: Whether the model is for demonstration only.
        elapsed_s: From claim to result.
        committed_at: Unix time.
        objects: The DICOM objects.
        run_model: The model's name in the settings; "" where the node has only one.
    """

    id: int
    series_key: str
    revision: int
    set_digest: str
    folder: str
    model: str
    version: str
    weights: str
    demonstration: bool
    elapsed_s: float
    committed_at: float
    objects: tuple[ObjectRecord, ...]
    run_model: str = ""


@dataclass(frozen=True)
class DeliveryRecord:
    """The delivery of one object to one destination."""

    id: int
    result_id: int
    series_key: str
    destination: str
    file: str
    state: DeliveryState
    attempts: int
    next_at: float
    last_reason: str | None
    last_error: str | None
    sent_at: float | None
    run_model: str = ""


@dataclass(frozen=True)
class EventRecord:
    """One line of the audit trail; holds no patient data."""

    id: int
    at: float
    kind: str
    series_key: str | None
    peer: str | None
    text: str
    model: str | None = None  # of several; the name in the settings


@dataclass(frozen=True)
class ModelRun:
    """A model's run of a series.

    Attributes:
        id: Number in the journal.
        series_key: The series.
        model: The model's name in the settings; "" where it is undecided, or the only one.
        state: Its state, one of a series'.
        reason: As of `SeriesRecord`.
        message: As of `SeriesRecord`.
        attempts: How often it ran.
        next_at: Unix time before which it is not tried again.
        priority: 1 is urgent, 0 routine; None where it is undecided.
        queued_at: Unix time since which it waited first.
    """

    id: int
    series_key: str
    model: str
    state: SeriesState
    reason: str | None
    message: str | None
    attempts: int
    next_at: float
    priority: int | None
    queued_at: float


@dataclass(frozen=True)
class SeriesDetail:
    """Everything that the journal knows about one series; events are newest first."""

    series: SeriesRecord
    instances: tuple[InstanceRecord, ...]
    results: tuple[ResultRecord, ...]
    deliveries: tuple[DeliveryRecord, ...]
    events: tuple[EventRecord, ...]
    runs: tuple[ModelRun, ...] = ()


@dataclass(frozen=True)
class Job:
    """A series to run.

    Attributes:
        key: The series.
        series_uid: SeriesInstanceUID.
        set_digest: Digest of the instances' SOPInstanceUIDs.
        instances: The instances to compute.
        attempts: This attempt's number.
        earlier: Folder of the earlier revision's result, below the results folder.
        run: Number of the run in the journal.
        model: Name of the model in the settings; "" where it is undecided, or the only one.
        is_decided: Whether its model and priority were decided by its headers.
    """

    key: str
    series_uid: str
    set_digest: str
    instances: tuple[InstanceRecord, ...]
    attempts: int
    earlier: str | None
    run: int = 0
    model: str = ""
    is_decided: bool = False

    @property
    def digest(self) -> str:
        """The name of the series in messages."""
        return digest_of_uid(self.series_uid)


@dataclass(frozen=True)
class DecidedRun:
    """One of the models that a series runs with.

    Attributes:
        model: Its name in the settings; "" for the only one.
        priority: 1 is urgent, 0 routine.
        why: Why it is set aside at once, where this model does not suit the series.
    """

    model: str
    priority: int
    why: Why | None = None


@dataclass(frozen=True)
class WorkerResult:
    """A result as the worker wrote it, before the journal records it (see `ResultRecord`)."""

    folder: str
    model: str
    version: str
    weights: str
    demonstration: bool
    elapsed_s: float
    objects: tuple[ObjectRecord, ...]
    run_model: str = ""
