"""Parts of a DICOM node for tests, and peers to speak with: pynetdicom in this process, DCMTK in its own."""

from __future__ import annotations

import contextlib
import os
import shutil
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
