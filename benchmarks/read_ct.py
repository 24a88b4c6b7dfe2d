"""Measure time and memory of reading a CT series with ctflow and with pydicom alone, on the same files.

`--syntax` measures a copy of the series in a compressed transfer syntax, and also decoding slice by slice.
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
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pydicom
from pydicom.uid import UID

from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series

SYNTAXES = {
    "jpeg2000": "1.2.840.10008.1.2.4.90",
    "jpegls": "1.2.840.10008.1.2.4.80",
    "rle": "1.2.840.10008.1.2.5",
}
_SAMPLE_S = 0.01


def read_bare(folder: Path) -> int:
    """Every file read and decoded, stacked, unsorted, not rescaled; bytes of the int16 volume."""
    return int(np.stack([pydicom.dcmread(path).pixel_array for path in sorted(folder.iterdir())]).size * 2)


def read_by_ctflow(folder: Path) -> int:
    """Scan, select and assemble: sorted, checked, in HU; bytes of the int16 volume."""
    (candidate,) = select_series(scan_folder(folder), force=True).selected
    return int(assemble_series(candidate.series).volume.array.size * 2)


def read_one_by_one(folder: Path) -> int:
    """The same, but compressed slices are decoded one after another in this process."""
    with mock.patch("ctflow.dicom.read.pixels.decode.LEAST_SLICES", sys.maxsize):
        return read_by_ctflow(folder)


READERS: dict[str, Callable[[Path], int]] = {
    "bare_pydicom": read_bare,
    "one_by_one": read_one_by_one,
    "ctflow": read_by_ctflow,
}


def compressed_copy(folder: Path, syntax: str, output: Path) -> None:
    """The series in another transfer syntax, without loss."""
    for number, path in enumerate(sorted(folder.iterdir())):
        dataset = pydicom.dcmread(path)
        dataset.compress(UID(SYNTAXES[syntax]), generate_instance_uid=False)
        dataset.save_as(output / f"{number:05}.dcm")


def seconds_of(work: Callable[[Path], int], folder: Path) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work(folder)
    return time.perf_counter() - start


def peak_of(reader: str, folder: Path) -> dict[str, float]:
    """Peak memory of a fresh process and its children, shared pages counted once, in MB."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_watched, args=(reader, folder, sender))
    process.start()
    volume_bytes, peak_bytes = receiver.recv()
    process.join()
    return {"peak_mb": round(peak_bytes / 1e6, 1), "int16_volume_mb": round(volume_bytes / 1e6, 1)}


def _watched(reader: str, folder: Path, sender: multiprocessing.connection.Connection) -> None:
    done, peaks = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            peaks.append(sum(_proportional_bytes(pid) for pid in _family(os.getpid())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    volume_bytes = READERS[reader](folder)
    done.set()
    watcher.join()
    sender.send((volume_bytes, max(peaks)))


def _family(pid: int) -> Iterable[int]:
    """The process and all its descendants."""
    yield pid
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks)
    except OSError:
        return
    for child in children.split():
        yield from _family(int(child))


def _proportional_bytes(pid: int) -> int:
    """Pss: pages shared by several processes are divided among them; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(folder: Path, readers: Iterable[str], runs: int) -> dict[str, object]:
    """Median seconds of each reader, the readers in turn; ratios to the first, run by run; memory of the last."""
    readers = list(readers)
    rounds = [[seconds_of(READERS[reader], folder) for reader in readers] for _ in range(runs + 1)][1:]
    seconds = {
        f"{reader}_s": round(statistics.median(row[at] for row in rounds), 4) for at, reader in enumerate(readers)
    }
    last = [{f"{reader}/ctflow": row[at] / row[-1] for at, reader in enumerate(readers[:-1])} for row in rounds]
    ratios = {name: round(statistics.median(row[name] for row in last), 3) for name in last[0]}
    return {"files": len(list(folder.iterdir())), "runs": runs, **seconds, **ratios, **peak_of("ctflow", folder)}


def main() -> None:
    """Print a line and one JSON document last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with one CT series and nothing else")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--syntax", choices=sorted(SYNTAXES), help="measure a copy in this transfer syntax")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, readers = arguments.folder, ["bare_pydicom", "ctflow"]
        if arguments.syntax:
            compressed_copy(folder, arguments.syntax, Path(scratch))
            folder, readers = Path(scratch), list(READERS)
        found = measure(folder, readers, arguments.runs)
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in found.items()) + "\n")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    document = {
        "benchmark": "read_ct",
        "syntax": arguments.syntax,
        **found,
        "machine": f"{machine}, pydicom {version('pydicom')}",
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
