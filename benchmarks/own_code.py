"""Measure what ctflow's own code gains over the library that it replaces: the same step with and without, in one run.

    python benchmarks/own_code.py headers [--slices 300]
    python benchmarks/own_code.py seg
    python benchmarks/own_code.py sr [--findings 100]
    python benchmarks/own_code.py store [--associations 25]

Each repeat runs every variant once, in turn, so that other load on the machine affects all of them alike. The last
line is one JSON document: the median seconds of each variant, and the median of (without / with) over the repeats.
`store` also counts the receiving process's CPU seconds, because the senders run on the same machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pydicom.dataset import Dataset

from ctflow.core.model import Code, ModelSpec, NetworkSpec, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.read.structure import layout_of_header
from ctflow.dicom.write import encode, frames, measurement_report, segmentation
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance
from ctflow.dicom.write.source import sources_from_headers
from ctflow.measurements.measure import measure_segments

REPOSITORY = Path(__file__).parents[1]
TISSUE = Code("85756007", "SCT", "Tissue")
MADE_BY = Provenance("0", "ab" * 32, {"backend": "eager"})
SPEC = ModelSpec(
    name="any", version="1", network=NetworkSpec("SwinUNETR", {}), in_channels=1, out_channels=2, preprocessing=(),
    roi=(64, 64, 64), overlap=0.25, blend="gaussian", batch_size=1, activation="softmax", threshold=None,
    segments=(Segment(1, "Tumour", TISSUE, TISSUE),), intended_use="", demonstration=False,
)  # fmt: skip
Variants = Mapping[str, Callable[[], Mapping[str, float]]]


def timed(step: Callable[[], object]) -> Callable[[], Mapping[str, float]]:
    """A variant of one step: the seconds that it takes."""

    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        step()
        return {"wall_s": time.perf_counter() - start}

    return run


def compare(variants: Variants, repeats: int) -> dict[str, Any]:
    """Run the variants in turn; the last one is ctflow's own."""
    rounds = [{name: run() for name, run in variants.items()} for _ in range(repeats + 1)][1:]
    own = list(variants)[-1]
    return {
        name: {
            what: {
                "median": round(statistics.median(each[name][what] for each in rounds), 5),
                "times": round(statistics.median(each[name][what] / each[own][what] for each in rounds), 2),
            }
            for what in rounds[0][name]
        }
        for name in variants
    }


# -- headers -----------------------------------------------------------------------------------------------------------


def series(folder: Path, slices: int, size: int = 128) -> Path:
    """A series of noise."""
    values = np.random.default_rng(0).integers(-1024, 1500, (slices, size, size), dtype=np.int16)
    affine = np.diag([1.0, 0.7, 0.7, 1.0])[[2, 1, 0, 3]]
    write_ct_series(Volume(values, Geometry(values.shape, affine)), folder / "ct")
    return folder / "ct"


def headers(folder: Path, given: argparse.Namespace) -> dict[str, Variants]:
    """Scanning a folder: headers from the walk that checks for damage, or by pydicom after that walk."""
    ct = given.ct or series(folder, given.slices)
    streams = [BytesIO(path.read_bytes()) for path in sorted(ct.iterdir()) if path.is_file()]

    def by_pydicom() -> None:
        with mock.patch("ctflow.dicom.read.header.header_of_layout", return_value=None):
            scan_folder(ct)

    def walk() -> None:
        for stream in streams:
            layout_of_header(stream, preamble=True)

    return {
        "scan of a folder": {
            "pydicom.dcmread after the walk": timed(by_pydicom),
            "ctflow": timed(lambda: scan_folder(ct)),
        },
        "the walk alone": {"walk": timed(walk)},
    }


# -- SEG and SR --------------------------------------------------------------------------------------------------------


def case(folder: Path, slices: int, findings: int) -> tuple[np.ndarray, Any, Volume]:
    """Labels with `findings` findings in every slice, prepared sources, and the volume."""
    (candidate,) = select_series(scan_folder(series(folder, slices))).selected
    loaded = assemble_series(candidate.series)
    labels = np.zeros(loaded.volume.array.shape, np.uint8)
    across = 10
    for number in range(findings):
        row, column = 4 + 12 * (number // across % across), 4 + 12 * (number % across)
        labels[5 : slices - 5, row : row + 5 + number % 3, column : column + 5] = 1
    return labels, sources_from_headers([each.header for each in loaded.instances]), loaded.volume


def library_save(dataset: Dataset, stream: BytesIO) -> None:
    """Write a file as pydicom does."""
    dataset.save_as(stream, enforce_file_format=True)


def writing(dataset: Dataset) -> Variants:
    """A data set to bytes."""
    first, second = BytesIO(), BytesIO()
    library_save(dataset, first)
    encode.save_dataset(dataset, second)
    if first.getvalue() != second.getvalue():
        raise SystemExit("the bytes differ")
    return {
        "pydicom's save_as": timed(lambda: library_save(dataset, BytesIO())),
        "ctflow": timed(lambda: encode.save_dataset(dataset, BytesIO())),
    }


def seg(folder: Path, given: argparse.Namespace) -> dict[str, Variants]:
    """Making and writing a SEG with marks on all slices except ten."""
    labels, sources, _ = case(folder, given.slices, 1)
    few = labels.copy()
    few[given.slices // 10 :] = 0

    def make(marks: np.ndarray, kind: Any = "binary") -> Dataset:
        form = segmentation.SegForm(kind)
        return segmentation.segmentation_from_labels(marks, sources, SPEC, MADE_BY, form=form)

    def planes() -> None:
        frames.planes_of_images(sources.cleaned)

    def asking() -> None:
        with mock.patch.object(frames, "frames_known_by_class", nullcontext):
            planes()

    def by_highdicom() -> None:
        with mock.patch.object(segmentation, "_is_made_of_planes", return_value=False):
            make(labels)

    def with_all_slices() -> None:
        with mock.patch.object(segmentation, "_slices_with_frames", return_value=None):
            make(few, "labelmap")

    return {
        "planes of a SEG": {"highdicom asks of each image": timed(asking), "ctflow": timed(planes)},
        "SEG made once its planes are, nearly every slice marked": {
            "highdicom makes all of it": timed(by_highdicom), "ctflow": timed(lambda: make(labels)),
        },
        "labelmap made, a tenth of the slices marked": {
            "highdicom is given all slices": timed(with_all_slices), "ctflow": timed(lambda: make(few, "labelmap")),
        },
        "SEG written": writing(make(labels)),
    }  # fmt: skip


def sr(folder: Path, given: argparse.Namespace) -> dict[str, Variants]:
    """Making and writing a report of many findings."""
    labels, sources, volume = case(folder, 40, given.findings)
    measured = measure_segments(labels, volume, SPEC.segments)
    source = segmentation.segmentation_from_labels(labels, sources, SPEC, MADE_BY)

    def make() -> Dataset:
        return measurement_report.report_from_measurements(measured, source, sources, SPEC, MADE_BY)

    def by_pydicom() -> None:
        with mock.patch.object(measurement_report, "json_from_dataset", json_of):
            make()

    def one_by_one() -> None:
        with mock.patch.object(measurement_report, "_groups", groups_by_highdicom):
            make()

    return {
        "report made": {"pydicom's to_json": timed(by_pydicom), "ctflow": timed(make)},
        "report made, groups": {"highdicom makes each group": timed(one_by_one), "ctflow": timed(make)},
        "report written": writing(make()),
    }


def groups_by_highdicom(findings: Any, segment: Segment, basis: Any, algorithm: Any) -> list[Dataset]:
    """Each group made in the same manner as the first of a report."""
    named = enumerate(findings, start=1)
    return [
        measurement_report._group(finding, measurement_report._named(rank, segment, basis), segment, basis, algorithm)
        for rank, finding in named
    ]


def json_of(dataset: Dataset) -> str:
    """Pydicom's own."""
    return str(dataset.to_json())


# -- reception ---------------------------------------------------------------------------------------------------------


def store(folder: Path, given: argparse.Namespace) -> dict[str, Variants]:
    """C-STORE of CT images until all are acknowledged: on the disk and in the journal."""
    return {
        f"C-STORE, {given.associations} associations of {given.images} images": {
            "pynetdicom": lambda: receive(folder, given, wake=False, short=False),
            "pynetdicom, woken by what happens": lambda: receive(folder, given, wake=True, short=False),
            "ctflow, pynetdicom's loops polling": lambda: receive(folder, given, wake=False),
            "ctflow": lambda: receive(folder, given),
        },
        f"a second of {given.associations} associations without requests": {
            "pynetdicom's loops polling": lambda: idle(folder, given, wake=False),
            "ctflow": lambda: idle(folder, given),
        },
    }


def image(number: int) -> Dataset:
    """A CT image with as many elements as a scanner writes."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from service_support import instance  # noqa: PLC0415

    dataset = instance(number, Rows=512, Columns=512, PixelData=bytes(2 * 512 * 512))
    dataset.add_new(0x00190010, "LO", "ANY")
    for element in range(100):
        dataset.add_new(0x00191000 + element, "LO", f"value {element}")
    return dataset


def receive(folder: Path, given: argparse.Namespace, **how: Any) -> Mapping[str, float]:
    """Let senders of another process send; return the seconds per image."""
    with receiver(folder, given.associations, **how) as port:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        sender = context.Process(target=send, args=(port, given.associations, given.images, theirs))
        sender.start()
        theirs.close()  # else a sender that fails leaves this process waiting for it
        ours.recv()
        wall, cpu = time.perf_counter(), time.process_time()
        ours.send(None)
        statuses = ours.recv()
        found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        sender.join()
    if set(statuses) != {0}:
        raise SystemExit(f"statuses {set(statuses)}")
    return {name: value / len(statuses) for name, value in found.items()}


def idle(folder: Path, given: argparse.Namespace, **how: Any) -> Mapping[str, float]:
    """The CPU seconds of a second in which nothing is sent."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from service_support import RawPeer  # noqa: PLC0415

    with receiver(folder, given.associations, **how) as port:
        peers = [RawPeer(port, 0) for _ in range(given.associations)]
        time.sleep(0.5)
        cpu = time.process_time()
        time.sleep(1.0)
        found = {"cpu_s": time.process_time() - cpu}
        for peer in peers:
            peer.close()
    return found


def silent_bell(association: Any) -> None:
    """Leave pynetdicom's queues as they are; the shortcut's reader then has a bell that never rings."""
    queue = association.dul.event_queue
    queue.bell = os.eventfd(0)
    weakref.finalize(queue, os.close, queue.bell)


@contextmanager
def receiver(
    folder: Path,
    associations: int,
    *,
    wake: bool = True,
    short: bool = True,
) -> Iterator[int]:
    """A receiver, whole or with the libraries' own parts; yields its port."""
    from pynetdicom import evt  # noqa: PLC0415  # the extra `serve`

    from ctflow.node.journal.journal import Journal  # noqa: PLC0415
    from ctflow.node.metrics import Metrics  # noqa: PLC0415
    from ctflow.node.receive import receiver as module  # noqa: PLC0415
    from ctflow.node.receive.inbox import Inbox  # noqa: PLC0415
    from ctflow.node.receive.intake import Intake, IntakeLimits  # noqa: PLC0415
    from ctflow.node.receive.shortcut import StoreRequest  # noqa: PLC0415

    def handle(event: Any) -> int:
        """As `shortcut` calls it, from pynetdicom's own event."""
        context = event.context
        with memoryview(event.request.DataSet.getbuffer()) as data:
            request = StoreRequest(
                str(event.request.AffectedSOPClassUID), str(event.request.AffectedSOPInstanceUID),
                str(context.abstract_syntax), str(context.transfer_syntax), data.toreadonly(),
            )  # fmt: skip
            return intake.take(request, module._caller(event.assoc))[0]

    with tempfile.TemporaryDirectory(dir=folder) as own:
        reception = module.Reception(
            ae_title="CTFLOW", address=("127.0.0.1", 0), may_come=lambda _host: True,
            is_peer=lambda _title, _host: True, associations=associations, most_pdu=2**17, idle_s=60.0,
        )  # fmt: skip
        journal = Journal(Path(own) / "journal.sqlite3")
        metrics = Metrics(journal, Path(own))
        intake = Intake(IntakeLimits(10**6, 10**12), Inbox(Path(own) / "inbox", 0), journal, metrics)
        with (
            mock.patch.object(module, "wake_by_events", module.wake_by_events if wake else silent_bell),
            mock.patch.object(module, "shorten", module.shorten if short else lambda *_: None),
        ):
            found = module.Receiver(reception, intake, metrics)
            if not short:
                found._server.bind(evt.EVT_C_STORE, handle)
            found.start()
            try:
                yield found.port
            finally:
                found.stop(0.1)
                journal.close()


def send(port: int, associations: int, images: int, connection: Any) -> None:
    """A process of senders, each of which waits for its answers."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from service_support import RawPeer, encoded, fragment, store_command  # noqa: PLC0415

    peers = [RawPeer(port, 0) for _ in range(associations)]
    first = 10**6  # so that all UIDs have the same length
    dataset, messages = image(first), []
    data = encoded(dataset)
    for number in range(first, first + associations * images):
        command = store_command(dataset, AffectedSOPInstanceUID=f"1.2.826.0.1.{number}")
        messages.append((command, data.replace(b"1.2.826.0.1.%d" % first, b"1.2.826.0.1.%d" % number)))
    connection.send("ready")
    connection.recv()
    statuses: list[int] = []

    def run(place: int) -> None:
        for command, data in messages[place * images : (place + 1) * images]:
            peers[place].send(fragment(RawPeer.CT, 3, command))
            for start in range(0, len(data), 2**16):
                last = 2 if start + 2**16 >= len(data) else 0
                peers[place].send(fragment(RawPeer.CT, last, data[start : start + 2**16]))
            statuses.append(int(peers[place].read_response().Status))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(associations)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for peer in peers:
        peer.close()
    connection.send(statuses)


SUBJECTS = {"headers": headers, "seg": seg, "sr": sr, "store": store}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--ct", type=Path, help="headers: measure this CT series (default: one of noise)")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--findings", type=int, default=100)
    parser.add_argument("--associations", type=int, default=25)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            step: compare(variants, given.repeats)
            for step, variants in SUBJECTS[given.subject](Path(scratch), given).items()
        }
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    machine = f"{platform.machine()}, {load}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("pydicom", "highdicom", "pynetdicom"))
    print(json.dumps({"benchmark": f"own_code {given.subject}", "steps": found, "machine": f"{machine}, {versions}",  # noqa: T201
                      "date": time.strftime("%Y-%m-%d")}))  # fmt: skip


if __name__ == "__main__":
    main()
