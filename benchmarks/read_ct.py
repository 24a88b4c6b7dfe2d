"""How long ctflow takes to read a CT series, against a bare pydicom read of the same files in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pydicom

from ctflow.dicom.assemble import assemble_series
from ctflow.dicom.scan import scan_folder
from ctflow.dicom.select import select_series


def read_bare(folder: Path) -> None:
    """Every file read and decoded, stacked, unsorted, not rescaled."""
    np.stack([pydicom.dcmread(path).pixel_array for path in sorted(folder.iterdir())])


def read_by_ctflow(folder: Path) -> None:
    """Scan, select and assemble: sorted, checked, in HU."""
    (candidate,) = select_series(scan_folder(folder), force=True).chosen
    assemble_series(candidate.series)


def seconds_of(work: Callable[[Path], None], folder: Path) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work(folder)
    return time.perf_counter() - start


def main() -> None:
    """Print a line a way and one JSON document last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="one CT series, nothing else")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    pairs = [
        (seconds_of(read_bare, arguments.folder), seconds_of(read_by_ctflow, arguments.folder))
        for _ in range(arguments.runs + 1)
    ][1:]
    bare, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    sys.stdout.write(f"bare pydicom {bare:.3f} s, ctflow {ours:.3f} s, median ratio {ratio:.2f}\n")
    document = {
        "benchmark": "read_ct",
        "files": len(list(arguments.folder.iterdir())),
        "runs": arguments.runs,
        "bare_pydicom_s": round(bare, 4),
        "ctflow_s": round(ours, 4),
        "ratio": round(ratio, 3),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, pydicom {version('pydicom')}",
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
