"""Parts of a DICOM node for tests, and peers to speak with: pynetdicom in this process, DCMTK in its own."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.dsutils import decode, encode
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

from ctflow.compat.pynetdicom import keep_answers
from ctflow.core.errors import BundleInvalid
from ctflow.core.processes import Line
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.node.journal.commitments import Commitments
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, ObjectRecord, Why, WorkerResult
from ctflow.node.metrics import Metrics
from ctflow.node.receive.commitment import CommitmentService
from ctflow.node.receive.inbox import Inbox
from ctflow.node.receive.intake import LEFT_OUT, Intake, IntakeLimits
from ctflow.node.receive.receiver import STORED_CLASSES, VERIFICATION, Receiver, Reception, supported_contexts
from ctflow.node.work.messages import Answer, NotReady, Ready, TaskOutcome
from needs import skip_without

PATIENCE_S = 240.0  # of a test with something that happens: at a load of 20 a worker opens torch in more than a minute


def wait_until(happened: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    """Wait for another process or thread; fail by name where it does not happen."""
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen in {limit_s:g} s: {what}")
        time.sleep(0.01)


def instance(number: int = 1, **attributes) -> Dataset:
    """A small CT image."""
    dataset = Dataset()
    dataset.SOPClassUID = CT_IMAGE_STORAGE
    dataset.SOPInstanceUID = f"1.2.826.0.1.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.2", "1.2.826.0.3"
    dataset.Modality, dataset.PatientName, dataset.PatientID = "CT", "SECRET^NAME", "SECRET-ID"
    dataset.InstanceNumber = number
    dataset.Rows = dataset.Columns = 4
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = bytes(32)
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


class RunningScp:
    """A receiver with its journal and inbox, listening on a free port."""

    def __init__(self, folder: Path, *, least_free: int = 0, **changes) -> None:
        values = {
            "ae_title": "CTFLOW", "address": ("127.0.0.1", 0), "may_come": lambda _host: True,
            "is_peer": lambda _title, _host: True, "associations": 8, "most_pdu": 65536, "idle_s": 30.0,
        }  # fmt: skip
        same_uid = changes.pop("same_uid", "refuse")
        series = {"most_instances": 1000, "most_bytes": 10**9, "patient_data": False, "by_study": False}
        limits = IntakeLimits(**{name: changes.pop(name, value) for name, value in series.items()})
        folder.mkdir()
        self.journal = Journal(folder / "journal.sqlite3")
        self.inbox = Inbox(folder / "inbox", least_free)
        try:
            metrics = Metrics(self.journal, folder)
            self.intake = Intake(limits, self.inbox, self.journal, metrics, lambda _caller: same_uid)
            self.commitments = Commitments(self.journal, self.inbox.folder)
            service = CommitmentService(self.commitments, (*STORED_CLASSES, *LEFT_OUT))
            self.receiver = Receiver(Reception(**{**values, **changes}), self.intake, metrics, service)
        except BaseException:
            self.journal.close()
            raise
        self.receiver.start()

    @property
    def port(self) -> int:
        return self.receiver.port

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.inbox.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        self.receiver.stop(0.1)
        self.intake.comparer.close()
        self.journal.close()


@contextlib.contextmanager
def association(port: int, *, calling: str = "ROUTER", called: str = "CTFLOW", contexts=None, **settings) -> Iterator:
    """An association with a node; it is released, or aborted where the test has ended it otherwise."""
    ae = AE(calling)
    for name, value in settings.items():
        setattr(ae, name, value)
    for abstract, syntaxes in (contexts or supported_contexts()).items():
        ae.add_requested_context(abstract, list(syntaxes)[:1])
    opened = []
    handlers = [
        (evt.EVT_CONN_OPEN, lambda event: opened.append(event.assoc.dul.socket.socket)),
        (evt.EVT_CONN_OPEN, lambda event: keep_answers(event.assoc)),
    ]
    found = ae.associate("127.0.0.1", port, ae_title=called, evt_handlers=handlers)
    try:
        yield found
    finally:
        if found.is_established:
            found.release()
        else:
            found.abort()
        for connection in opened:  # pynetdicom leaves one open whose peer was faster
            connection.close()


def store(port: int, *datasets: Dataset) -> list[int]:
    """Send instances in one association; their statuses (-1 where no answer came)."""
    with association(port) as found:
        assert found.is_established
        return [found.send_c_store(dataset).get("Status", -1) for dataset in datasets]


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port on which nobody answers while the context lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Archive:
    """A storage SCP that keeps what it gets; `status` is its answer, `port` 0 takes a free one."""

    def __init__(self, port: int = 0, status: int = 0x0000, contexts=()) -> None:
        self.status = status
        self.received: list[Dataset] = []
        ae = AE("PACS")
        for abstract in contexts or ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"):
            ae.add_supported_context(abstract)
        self._server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])
        self.port = self._server.server_address[1]

    def _store(self, event) -> int:
        if self.status == 0x0000:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            self.received.append(dataset)
        return self.status

    def close(self) -> None:
        self._server.shutdown()


def dcmtk(name: str) -> str:
    """A program of DCMTK; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        skip_without("DCMTK")
    return found


def storescu(port: int, folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Send a folder with DCMTK, without Nagle's 45 ms an image."""
    command = [dcmtk("storescu"), "-aec", "CTFLOW", "--scan-directories", *words, "127.0.0.1", str(port), str(folder)]
    environment = {**os.environ, "TCP_NODELAY": "1"}
    return subprocess.run(command, env=environment, check=check, capture_output=True, text=True, timeout=PATIENCE_S)


def read_header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def result_with_objects(
    journal: Journal, results: Path, number: int, deliveries, *, seg_class: str = "1.2.840.10008.5.1.4.1.1.66.4"
) -> str:
    """A series whose result lies in its folder and waits to be delivered; its key."""
    arrival = Arrival(
        f"1.2.{number}", "1.2", f"1.2.{number}.1", CT_IMAGE_STORAGE, ExplicitVRLittleEndian, "CT", "ROUTER",
        "127.0.0.1", f"{number}.dcm", 10, "0" * 64,
    )  # fmt: skip
    key = journal.receive(arrival, most_instances=9, most_bytes=999).key
    journal.complete_quiet(0)
    job = journal.claim()
    folder = results / key / job.set_digest
    folder.mkdir(parents=True)
    objects = []
    for file, sop_class in (
        ("segmentation.dcm", seg_class), ("measurements.dcm", "1.2.840.10008.5.1.4.1.1.88.34"),
    ):  # fmt: skip
        dataset = instance(number, SOPClassUID=sop_class, SOPInstanceUID=f"2.25.{number}{len(objects)}")
        dataset.save_as(folder / file, enforce_file_format=True)
        objects.append(ObjectRecord(file, sop_class, dataset.SOPInstanceUID, ""))
    answer = WorkerResult(f"{key}/{job.set_digest}", "model", "1", "w", False, 0.1, tuple(objects))
    assert journal.commit(job, answer, deliveries)
    return key


# -- workers that need no torch: what `run_worker` says to the node, and how it may end -------------------------------


def worker_that_answers(connection, _setup) -> None:
    connection.send(Line(logging.WARNING, "worker", "a line of the log"))
    connection.send(Ready("model", "1", False, 0))
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv()
            kind = {"1.2.1": "done", "1.2.2": "aside"}.get(task.job.series_uid, "again")
            folder = f"{task.job.key}/{task.job.set_digest}"
            answer = WorkerResult(folder, "model", "1", "w", False, 0.1, ()) if kind == "done" else None
            outcome = TaskOutcome(kind, Why("gap", f"because {kind}"), answer, {"segment": 0.1})
            connection.send(Answer(task.job.key, outcome))


def worker_that_meets_a_fault(connection, _setup) -> None:
    """Its answer tells which process it was, and which tried before it."""
    connection.send(Ready("model", "1", False, 0))
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv()
            note = task.scratch.parent.parent / "fault"
            note.write_text(f"{note.read_text()} {os.getpid()}" if note.exists() else str(os.getpid()))
            kind = "again" if task.job.attempts == 1 else "aside"
            outcome = TaskOutcome(kind, Why("unexpected", note.read_text()), is_sound=False)
            connection.send(Answer(task.job.key, outcome))


def worker_that_dies(connection, _setup) -> None:
    connection.send(Ready("model", "1", False, 0))
    with contextlib.suppress(EOFError):
        connection.recv()
        os.kill(os.getpid(), signal.SIGKILL)


def worker_that_takes_two(connection, _setup) -> None:
    """It dies of series 1.2.9, beside another and alone; an answer says how many tasks it then had."""
    connection.send(Ready("model", "1", False, 0, 2))
    with contextlib.suppress(EOFError):
        while True:
            tasks = [connection.recv()]
            if connection.poll(30 if tasks[0].job.attempts == 1 else 1):
                tasks.append(connection.recv())
            if "1.2.9" in [task.job.series_uid for task in tasks]:
                os.kill(os.getpid(), signal.SIGKILL)
            for task in reversed(tasks):
                note = f"attempt {task.job.attempts} of {len(tasks)}"
                connection.send(Answer(task.job.key, TaskOutcome("aside", Why("gap", note))))


def worker_that_cannot_open(connection, _setup) -> None:
    connection.send(NotReady(BundleInvalid("the bundle lacks a key", reason="argument")))


def worker_that_takes_two_and_hangs(connection, _setup) -> None:
    connection.send(Ready("model", "1", False, 0, 2))
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()


def worker_that_hangs(connection, _setup) -> None:
    connection.send(Ready("model", "1", False, 0))
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()


def association_request(most_pdu: int = 16384) -> bytes:
    """An A-ASSOCIATE-RQ for CT and Verification, with the contexts of `RawPeer`."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = "RAW", "CTFLOW"
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = most_pdu
    implementation.implementation_class_uid = UID("1.2.3")
    request.user_information = [length, implementation]
    contexts = [build_context(CT_IMAGE_STORAGE, ExplicitVRLittleEndian), build_context(VERIFICATION)]
    for context, number in zip(contexts, (RawPeer.CT, RawPeer.ECHO), strict=True):
        context.context_id = number
    request.presentation_context_definition_list = contexts
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    return bytes(pdu.encode())


class RawPeer:
    """A peer that puts on the wire what a test wants, after a lawful association with CT and Verification contexts.

    Args:
        port: The node's.
        most_pdu: The maximum length that the peer announces; 0 is any.
    """

    CT, ECHO = 1, 3  # its presentation contexts, in Explicit VR Little Endian

    def __init__(self, port: int, most_pdu: int = 16384) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.sendall(association_request(most_pdu))
        assert self.read_pdu()[0] == 2  # A-ASSOCIATE-AC

    def read_pdu(self) -> tuple[int, bytes]:
        """Type and content of the next PDU; type 0 where the node closed the connection."""
        with contextlib.suppress(ConnectionResetError):
            head = self._read(6)
            if len(head) == 6:
                return head[0], self._read(struct.unpack(">L", head[2:])[0])
        return 0, b""

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := self.socket.recv(count - len(data))):
            data += piece
        return data

    def read_response(self) -> Dataset:
        """The command set of the next message, which has no data set."""
        command, last = b"", False
        while not last:
            kind, content = self.read_pdu()
            assert kind == 4, f"a PDU of type {kind}"
            length, _, control = struct.unpack(">LBB", content[:6])
            assert length == len(content) - 4
            command, last = command + content[6:], bool(control & 2)
        return decode(BytesIO(command), True, True)

    def send(self, *fragments: bytes) -> None:
        """Fragments (see `fragment`) in one PDU."""
        content = b"".join(fragments)
        self.socket.sendall(struct.pack(">BBL", 4, 0, len(content)) + content)

    def ask(self, command: bytes, data: bytes) -> Dataset:
        """Send a request with its data set, and read the response."""
        self.send(fragment(self.CT, 3, command), fragment(self.CT, 2, data))
        return self.read_response()

    def close(self) -> None:
        self.socket.close()


def fragment(context: int, control: int, value: bytes) -> bytes:
    """A presentation data value (PS3.8 9.3.5.1)."""
    return struct.pack(">LBB", len(value) + 2, context, control) + value


def store_command(dataset: Dataset, **changes) -> bytes:
    """The command set of a C-STORE request; `changes` are its elements by keyword, None takes one away."""
    command = Dataset()
    values = {
        "AffectedSOPClassUID": dataset.SOPClassUID, "CommandField": 1, "MessageID": 7, "Priority": 2,
        "CommandDataSetType": 1, "AffectedSOPInstanceUID": dataset.SOPInstanceUID, **changes,
    }  # fmt: skip
    for keyword, value in values.items():
        if value is not None:
            setattr(command, keyword, value)
    encoded = encode(command, True, True)
    return struct.pack("<HHLL", 0, 0, 4, len(encoded)) + encoded


def encoded(dataset: Dataset) -> bytes:
    """A data set in Explicit VR Little Endian."""
    return encode(dataset, False, True)
