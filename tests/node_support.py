"""A node's data folder with series in every state, for the tests of its page."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, ObjectRecord, Patient, Why, WorkerResult
from ctflow.node.metrics import Metrics
from ctflow.node.settings.groups import Destination
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.web import Web
from ctflow.node.web.pages import NodeView

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
FILES = ("segmentation.dcm", "measurements.dcm")
PACS = Destination("pacs", "ARCHIVE", "10.1.2.3", 11112)
BACKUP = Destination("backup", "BACKUP", "10.1.2.4", 11112)
PATIENT = Patient("Doe^Jane", "PID-4711", "19500102", "A-99")


@contextmanager
def loggers_kept() -> Iterator[None]:
    """The process's loggers are afterwards as they were."""
    loggers = [logging.getLogger(name) for name in ("", "ctflow.audit", "pynetdicom", "pydicom", "uvicorn")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float = 1_770_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Ward:
    """A node whose journal is filled by hand.

    Attributes:
        settings: Its settings; the page takes any free port.
        journal: Its journal.
        results: Folder of its results.
        clock: Its clock.
        problems: Why it is not ready.
        remarks: What else does not work.
    """

    def __init__(self, folder: Path, *, destinations=(PACS,), patient_data=False, demonstration=None, **web) -> None:
        self.results = folder / "results"
        self.results.mkdir(parents=True)
        self.settings = ServiceSettings(
            data=folder, destinations=destinations, web=Web(port=0, patient_data=patient_data, **web)
        )
        self.clock = Clock()
        self.journal = Journal(folder / "journal.sqlite3", self.clock)
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.metrics = Metrics(self.journal, folder)
        self.node = NodeView(
            self.settings,
            self.journal,
            self.results,
            self.metrics,
            lambda: self.problems,
            lambda: self.remarks,
            lambda: demonstration,
            self.clock,
        )

    def close(self) -> None:
        self.journal.close()

    def receive(self, name: str, count: int = 1, *, first: int = 0, **other) -> str:
        """Instances of a series come in, 0.1 s apart; the series' key."""
        key = ""
        for number in range(first, first + count):
            self.clock.now += 0.1
            values = {
                "series_uid": f"1.2.{name}", "study_uid": "1.2.3", "sop_instance_uid": f"1.2.{name}.{number}",
                "sop_class_uid": CT, "transfer_syntax": EXPLICIT, "modality": "CT", "calling_ae": "ORTHANC",
                "peer": "10.1.2.3", "file": f"ab/{name}/{number}.dcm", "bytes": 526_000, "sha256": f"{number:064x}",
            }  # fmt: skip
            receipt = self.journal.receive(Arrival(**{**values, **other}), most_instances=1000, most_bytes=10**9)
            key = receipt.key
        return key

    def complete(self, name: str, count: int = 1, **other) -> str:
        key = self.receive(name, count, **other)
        self.clock.now += 10
        self.journal.complete_quiet(10)
        return key

    def run(self, name: str, count: int = 1, **other):
        """A series that runs; its job. Nothing else may wait."""
        self.complete(name, count, **other)
        self.clock.now += 1
        return self.journal.claim()

    def done(self, name: str, count: int = 1, *, result: Path | None = None, demonstration=False, **other) -> str:
        """A series with a result, whose files are copied from a result's folder if one is given."""
        job = self.run(name, count, **other)
        if result is not None:
            shutil.copytree(result, self.results / job.key)
        self.clock.now += 7.2
        objects = tuple(ObjectRecord(file, "1.2", f"2.25.{number}", "00") for number, file in enumerate(FILES))
        model, version = "lung tumour", "1.0"
        if result is not None:
            written = json.loads((result / "result.json").read_text())["model"]
            model, version = written["name"], written["version"]
        answer = WorkerResult(job.key, model, version, "ab" * 32, demonstration, 7.2, objects)
        deliveries = [(each.name, file) for each in self.settings.destinations for file in FILES]
        assert self.journal.commit(job, answer, deliveries)
        return job.key

    def delivered(self, name: str, count: int = 1, **other) -> str:
        key = self.done(name, count, **other)
        for record in self.journal.detail(key).deliveries:
            self.clock.now += 0.3
            self.journal.sent(record.id, f"{record.file} to {record.destination}")
        return key

    def undeliverable(self, name: str, count: int = 1, **other) -> str:
        key = self.done(name, count, **other)
        for record in self.journal.detail(key).deliveries:
            self.journal.not_sent(
                record.id, Why("association-rejected", "PeerRefused: the peer rejected the association"), None
            )
        return key


def fill_busy(ward: Ward, result: Path | None = None, *, scale: int = 1) -> dict[str, str]:
    """Series in every state, of a few instances each (each is synced) or `scale` times as many; name -> key."""
    keys = {}
    for number in range(6):
        keys[f"delivered{number}"] = ward.delivered(f"1{number}", (3 + number) * scale, result=result, patient=PATIENT)
        ward.clock.now += 400
    keys["discarded"] = ward.complete("20", scale, calling_ae="TEST")
    ward.journal.discard(keys["discarded"])
    job = ward.run("30", 2 * scale, calling_ae="SCANNER2", peer="10.1.7.20")
    ward.journal.set_aside(
        job.key, Why("gap", "BrokenSeries [gap]: slices are 2.5 mm apart, but 5 mm at one place: send the series again")
    )
    keys["aside"] = job.key
    keys["dead"] = ward.undeliverable("40", 4 * scale, result=result)
    job = ward.run("50", 3 * scale)
    why = Why("out-of-memory", "DeviceOutOfMemory: cuda:0 has too little memory for this volume")
    ward.journal.try_again(job, why, 600)
    keys["waits"] = job.key
    keys["late"] = ward.done("60", 20, result=result)
    records = ward.journal.detail(keys["late"]).deliveries
    ward.journal.sent(records[0].id, "segmentation.dcm to pacs")
    why = Why("no-connection", "DestinationDown: 10.1.2.3:11112 does not answer")
    ward.journal.not_sent(records[1].id, why, 120)
    keys["running"] = ward.run("70", 5 * scale).key
    keys["complete"] = ward.complete("80", 4 * scale)
    keys["received"] = ward.receive("90", 17, expected_instances=64)
    return keys
