"""Parts of a DICOM node for tests, and peers to speak with: pynetdicom in this process, DCMTK in its own."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt

from ctflow.dicom.select import CT_IMAGE_STORAGE
from ctflow.service.inbox import Inbox
from ctflow.service.journal import Journal
from ctflow.service.receive import Receiver, Reception, supported_contexts
from ctflow.service.records import Answer, Arrival, ObjectRecord
from ctflow.service.worker import Line, NotReady, Outcome, Ready

PATIENCE_S = 60.0  # of a test with something that happens; the CI machine is busy


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


class Ear:
    """A receiver with its journal and inbox, listening on a free port."""

    def __init__(self, folder: Path, *, least_free: int = 0, **changes) -> None:
        values = {
            "ae_title": "CTFLOW", "address": ("127.0.0.1", 0), "may_come": lambda _host: True,
            "is_peer": lambda _title, _host: True, "associations": 8, "most_pdu": 65536, "idle_s": 30.0,
            "most_instances": 1000, "most_bytes": 10**9,
        }  # fmt: skip
        folder.mkdir()
        self.journal = Journal(folder / "journal.sqlite3")
        self.inbox = Inbox(folder / "inbox", least_free)
        try:
            self.receiver = Receiver(Reception(**{**values, **changes}), self.inbox, self.journal)
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
    handlers = [(evt.EVT_CONN_OPEN, lambda event: opened.append(event.assoc.dul.socket.socket))]
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
        pytest.skip(f"no {name} (apt-get install dcmtk)")
    return found


def storescu(port: int, folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Send a folder with DCMTK, without Nagle's 45 ms an image."""
    command = [dcmtk("storescu"), "-aec", "CTFLOW", "--scan-directories", *words, "127.0.0.1", str(port), str(folder)]
    environment = {**os.environ, "TCP_NODELAY": "1"}
    return subprocess.run(command, env=environment, check=check, capture_output=True, text=True, timeout=120)


def read_header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def result_with_objects(journal: Journal, results: Path, number: int, deliveries) -> str:
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
        ("segmentation.dcm", "1.2.840.10008.5.1.4.1.1.66.4"), ("measurements.dcm", "1.2.840.10008.5.1.4.1.1.88.34"),
    ):  # fmt: skip
        dataset = instance(number, SOPClassUID=sop_class, SOPInstanceUID=f"2.25.{number}{len(objects)}")
        dataset.save_as(folder / file, enforce_file_format=True)
        objects.append(ObjectRecord(file, sop_class, dataset.SOPInstanceUID, ""))
    answer = Answer(f"{key}/{job.set_digest}", "model", "1", "w", False, 0.1, tuple(objects))
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
            answer = Answer(folder, "model", "1", "w", False, 0.1, ()) if kind == "done" else None
            connection.send(Outcome(kind, f"because {kind}", answer, {"segment": 0.1}))


def worker_that_dies(connection, _setup) -> None:
    connection.send(Ready("model", "1", False, 0))
    with contextlib.suppress(EOFError):
        connection.recv()
        os.kill(os.getpid(), signal.SIGKILL)


def worker_that_cannot_open(connection, _setup) -> None:
    connection.send(NotReady("BundleInvalid", "the bundle lacks a key", 3))


def worker_that_hangs(connection, _setup) -> None:
    connection.send(Ready("model", "1", False, 0))
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
