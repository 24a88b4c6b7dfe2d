"""Compare one `ctflow run` of several CTs with a process for each, on a few CPU cores: ratios of whole processes.

    python benchmarks/cases_on_cpu.py [--count 3 --shape 300,512,512] [--cores 2] [--engine auto] [-m BUNDLE]

Copies of one phantom get UIDs of their own. The engine's file and its comparison with PyTorch are in a cache that an
untimed run fills, and the page cache is warm. GPUs are hidden. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from throughput import make_input

from ctflow import __version__


def seconds_of(inputs: Sequence[Path], output: Path, words: Sequence[str]) -> float:
    """One process after another, a `ctflow run` of each folder: seconds of all, to the end of the last process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CTFLOW_DEVICE": "cpu"}
    begun = time.perf_counter()
    for number, folder in enumerate(inputs):
        command = (sys.executable, "-m", "ctflow", "run", "-i", folder, "-o", output / str(number), *words)
        done = subprocess.run(
            [str(word) for word in command], env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    elapsed_s = time.perf_counter() - begun
    shutil.rmtree(output)
    return round(elapsed_s, 2)


def measure(given: argparse.Namespace, scratch: Path) -> list[dict[str, float]]:
    """Both ways in turn."""
    depth, height, width = (int(word) for word in given.shape.split(","))
    folder = make_input(scratch, given.count, (depth, height, width))
    words = [
        "--engine",
        given.engine,
        "--cache",
        str(scratch / "cache"),
        *(["-m", str(given.model)] * bool(given.model)),
    ]
    series = sorted(folder.iterdir())
    seconds_of(series[:1], scratch / "out", words)
    found = []
    for _ in range(given.rounds):
        one_s = seconds_of([folder], scratch / "out", words)
        each_s = seconds_of(series, scratch / "out", words)
        found.append({"one_process_s": one_s, "a_process_each_s": each_s, "ratio": round(each_s / one_s, 3)})
        sys.stderr.write(json.dumps(found[-1]) + "\n")
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--shape", default="300,512,512", help="D,H,W of the phantom")
    parser.add_argument("--cores", type=int, default=2, help="the last ones of this machine")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[-given.cores :]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        rounds = measure(given, Path(place))
    document: dict[str, Any] = {
        "benchmark": "cases_on_cpu", "ctflow": __version__, "python": platform.python_version(), "cores": len(cores),
        "count": given.count, "shape": given.shape, "engine": given.engine, "rounds": rounds,
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
