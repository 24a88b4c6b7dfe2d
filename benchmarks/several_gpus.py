"""Measure what further GPUs give: the window loop, whole jobs by `ctflow run` and `ctflow cohort run`, and a node.

    python benchmarks/several_gpus.py OUT [--gpus 1,2,4] [--cts 64] [-m BUNDLE] [--parts loop,jobs,node]

OUT gets compare/ (`ctflow bench compare`), jobs.json and node.json as they are measured, and summary.json, which is
also the last line of standard output. Without a bundle the network is the demonstration network widened to
feature_size 48 (docs/model.md), not trained further: time does not depend on it.

A job is one process, from its start to its end, with all results of every CT (SEG, measurement report, preview,
report.html, result.json), overlap 0.25, its kernels and comparison cached by an untimed run. Sustained is
the rate from a quarter of the results on, without the start. Configurations 6 are the article's loop, threads over
torch.compile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from throughput import make_input

from ctflow import __version__
from ctflow.engines.hardware import driver_version

REPOSITORY = Path(__file__).parents[1]
CTFLOW = (sys.executable, "-m", "ctflow")
SHAPE = (300, 512, 512)


def say(text: str) -> None:
    """Print a progress line."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def wide_bundle(folder: Path) -> Path:
    """The demonstration network at feature_size 48."""
    if not folder.exists():
        weights = folder.with_suffix(".pt")
        widen = (sys.executable, REPOSITORY / "training" / "widen_network.py", weights, "--feature-size", "48")
        make = (sys.executable, REPOSITORY / "training" / "make_wide_bundle.py", folder, "--weights", weights)
        for command in (widen, make):
            subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return folder


def devices(count: int) -> str:
    """The setting for the first GPUs."""
    return f"cuda:{','.join(map(str, range(count)))}"


def measure_loop(out: Path, bundle: Path, counts: Sequence[int], engine: str) -> dict[str, Any]:
    """Seconds of a volume by configuration, and the factor to one GPU at each overlap."""
    ids = [
        f"{name}{f'x{count}' if count > 1 else ''}"
        for name in (f"{engine}-fp16", "6", "compile-fp16")
        for count in counts
    ]
    command = (
        *CTFLOW, "bench", "compare", "-m", bundle, "-o", out / "compare", "--device", devices(max(counts)),
        "--cache", out / "engines", "--configurations", ",".join(ids),
    )  # fmt: skip
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    say(done.stdout[-3000:] + done.stderr[-1000:])
    document = json.loads((out / "compare" / "compare.json").read_text())
    found: dict[str, Any] = {}
    for entry in document["configurations"]:
        results = [result.get("median_s") for result in entry.get("results", ())]
        found[entry["id"]] = {"status": entry["status"], "reason": entry["reason"], "seconds": results}
    for name, entry in found.items():
        one = found.get(name.partition("x")[0] if name[0] == "6" else name.rpartition("x")[0], {}).get("seconds")
        if one and entry["seconds"]:
            entry["factors"] = [
                round(a / b, 3) if a and b else None for a, b in zip(one, entry["seconds"], strict=True)
            ]
    return found


def measure_job(words: Sequence[object], folder: Path) -> dict[str, Any]:
    """A process: its seconds, and the rate at which results appeared."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryFile() as log:
        begun, clock = time.time(), time.perf_counter()
        code = subprocess.run([str(word) for word in (*CTFLOW, *words)], check=False, stdout=log, stderr=log).returncode
        elapsed_s = time.perf_counter() - clock
        log.seek(0)
        said = log.read().decode(errors="replace")
    ends = sorted(path.stat().st_mtime - begun for path in folder.rglob("segmentation.dcm"))
    first = len(ends) // 4
    sustained = (len(ends) - 1 - first) / (ends[-1] - ends[first]) if len(ends) > first + 1 else None
    if code != 0:
        say(said[-3000:])
    return {
        "exit_code": code, "results": len(ends), "seconds": round(elapsed_s, 2),
        "first_result_s": round(ends[0], 2) if ends else None,
        "sustained_cts_a_second": round(sustained, 3) if sustained else None,
    }  # fmt: skip


def measure_jobs(out: Path, bundle: Path, counts: Sequence[int], cts: int, repeats: int, engine: str) -> dict[str, Any]:
    """The same CTs by one process of `ctflow run` and by `ctflow cohort run` with a worker a GPU, in turn."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        scratch = Path(place)
        source = make_input(scratch, cts, SHAPE)
        manifest = scratch / "cohort.csv"
        rows = [path for path in sorted(source.iterdir()) if path.is_dir()]
        manifest.write_text("id,location\n" + "".join(f"{path.name},{path}\n" for path in rows))
        common = ("-m", bundle, "--engine", engine, "--overlap", "0.25", "--cache", out / "engines")
        say("untimed")
        measure_job(("run", "-i", rows[0], "-o", scratch / "first", *common, "--device", "cuda:0"), scratch / "first")
        found: dict[str, Any] = {"cts": cts, "shape": SHAPE, "jobs": []}
        for repeat in range(repeats):
            for count in counts:
                run = ("run", "-i", source, "-o", scratch / "out", *common, "--device", devices(count))
                cohort = ("cohort", "run", manifest, "-o", scratch / "out", *common, "--gpus", count)
                for name, words in (("run", run), ("cohort run", cohort)):
                    job = {"job": name, "gpus": count, "repeat": repeat, **measure_job(words, scratch / "out")}
                    found["jobs"].append(job)
                    say(json.dumps(job))
                    (out / "jobs.json").write_text(json.dumps(found, indent=1))
    return found


def measure_node(out: Path, counts: Sequence[int], series: int) -> dict[str, Any]:
    """`prove_node.py workers` on all GPUs."""
    script = REPOSITORY / "benchmarks" / "prove_node.py"
    command = (sys.executable, script, "workers", "--series", series, "--devices",
               ",".join(f"cuda:{number}" for number in range(max(counts))))  # fmt: skip
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    say(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"promise_kept": False}
    (out / "node.json").write_text(json.dumps(found, indent=1))
    return found


def main() -> int:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", help="numbers of GPUs to measure (default: 1, 2 and 4 as far as they are there)")
    parser.add_argument("--cts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="of each job")
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--engine", default="fused")
    parser.add_argument("--parts", default="loop,jobs,node")
    given = parser.parse_args()
    there = torch.cuda.device_count()
    counts = [int(word) for word in given.gpus.split(",")] if given.gpus else [n for n in (1, 2, 4) if n <= there]
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    bundle = given.model or wide_bundle(out / "wide")
    measured: dict[str, Any] = {
        "benchmark": "several_gpus", "date": time.strftime("%Y-%m-%d"), "ctflow": __version__,
        "gpus": [torch.cuda.get_device_name(number) for number in range(there)], "driver": driver_version(),
        "torch": str(torch.__version__), "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    parts = {
        "jobs": lambda: measure_jobs(out, bundle, counts, given.cts, given.repeats, given.engine),
        "node": lambda: measure_node(out, counts, given.cts),
        "loop": lambda: measure_loop(out, bundle, counts, given.engine),
    }
    for name in given.parts.split(","):
        say(name)
        measured[name] = parts[name]()
        (out / "summary.json").write_text(json.dumps(measured, indent=1))
    sys.stdout.write(json.dumps(measured) + "\n")
    failed = [
        job for job in measured.get("jobs", {}).get("jobs", ()) if job["exit_code"] or job["results"] != given.cts
    ]
    return 1 if failed or not measured.get("node", {}).get("promise_kept", True) else 0


if __name__ == "__main__":
    sys.exit(main())
