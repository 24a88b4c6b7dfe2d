"""The GPU image's root file system on a GPU, entered as a container runtime enters it; a record of what it did.

    python benchmarks/prove_container.py --root ROOT --config CONFIG.json --ct DIR --out DIR

As root, with Python's standard library alone. ROOT is the unpacked image, CONFIG.json its OCI configuration
(`skopeo inspect --config`). Each case runs in a mount namespace: the root read-only, the driver's libraries and devices
bound in as the container toolkit does, user 1000, no network. The record grows with each case and is also the
last line of the output; the exit code is 1 if anything is not as documented (docs/map.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What the container toolkit binds in for the capabilities compute and utility.
_LIBRARIES = ("libcuda.so", "libcudadebugger.so", "libnvidia-ptxjitcompiler.so", "libnvidia-nvvm.so",
              "libnvidia-gpucomp.so", "libnvidia-ml.so", "libnvidia-cfg.so")  # fmt: skip
_DEVICES = ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
_PLAIN = ("null", "zero", "full", "random", "urandom")
_SHARED, _TEMPORARY = "dev/shm", "tmp"
_ISOLATION = "unshare --mount --net, chroot as 1000:1000, read-only root, driver and devices bound in"
_LIBRARY_FOLDER = "usr/lib/x86_64-linux-gnu"


def driver_files() -> dict[str, Path]:
    """The driver's libraries of this machine, by the names that programs load."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    found: dict[str, Path] = {}
    for line in listed.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        soname = name.split(" ")[0]
        if arrow and "x86-64" in name and soname.startswith(_LIBRARIES):
            found.setdefault(soname, Path(path).resolve())
    return found


def entering(
    root: Path, given: argparse.Namespace, output: Path, cache: Path | None, *, gpu: bool, isolated: bool
) -> str:
    """The shell commands that prepare the mounts; the caller's command follows them."""
    lines = ["set -e", "mount --make-rprivate /", f"mount --bind {root} {root}"]
    if gpu:
        for name, path in driver_files().items():
            target = root / _LIBRARY_FOLDER / name
            lines += [f"touch {target}", f"mount --bind {path} {target}"]
    lines += [f"mount --rbind /proc {root}/proc", f"mount -t tmpfs tmpfs {root}/dev"]
    for name in (*_PLAIN, *(_DEVICES if gpu else ())):
        if Path("/dev", name).exists():
            lines += [f"touch {root}/dev/{name}", f"mount --bind /dev/{name} {root}/dev/{name}"]
    lines += [f"mkdir {root}/{_SHARED}"]
    lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}/{folder}" for folder in (_SHARED, _TEMPORARY)]
    lines += [f"mount --bind {given.ct} {root}/var/holoscan/input", f"mount --bind {output} {root}/var/holoscan/output"]
    if cache is not None:
        lines += [f"mount --bind {cache} {root}/var/holoscan/cache"]
    return "\n".join([*lines, *([f"mount -o remount,bind,ro {root}"] if isolated else []), ""])


def run_case(
    name: str, words: Sequence[str], given: argparse.Namespace, *, cache: Path | None = None, gpu: bool = True,
    program: Sequence[str] | None = None, isolated: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """One start of the container: its exit code, seconds, engine and SEG.

    Args:
        name: Of the case.
        words: After the entry point.
        given: The command line.
        cache: A writable folder mounted as the image's cache; None leaves it read-only.
        gpu: Whether the driver and the devices are bound in.
        program: In place of the entry point.
        isolated: As a container; else as root, with the machine's network, on files that may be written.
    """
    output = given.out / name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    os.chown(output, 1000, 1000)
    config = given.configuration["config"]
    command = ["env", "-i", *config["Env"], *(program or config["Entrypoint"]), *words]
    enter = ["chroot", *(["--userspec=1000:1000"] if isolated else []), str(given.root), "/bin/sh", "-c",
             f"cd {config.get('WorkingDir', '/')} && exec {shlex.join(command)}"]  # fmt: skip
    script = entering(given.root, given, output, cache, gpu=gpu, isolated=isolated) + f"exec {shlex.join(enter)}"
    start = time.perf_counter()
    done = subprocess.run(
        ["unshare", "--mount", *(["--net"] if isolated else []), "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    for library in driver_files():  # what was bound over is empty, and no image without a driver has it
        (given.root / _LIBRARY_FOLDER / library).unlink(missing_ok=True)
    (given.out / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return {"words": list(words), "exit_code": done.returncode, "seconds": round(seconds, 2), **found_in(output),
            "last_line": ["", *done.stderr.strip().splitlines()][-1][-400:]}  # fmt: skip


def found_in(output: Path) -> dict[str, Any]:
    """The engine, the stages and the SEG's digest of the one result in a folder."""
    results = sorted(output.glob("*/result.json"))
    if len(results) != 1:
        return {"results": len(results)}
    document = json.loads(results[0].read_text(encoding="utf-8"))
    seg = results[0].with_name("segmentation.dcm")
    return {
        "engine": document.get("engine"),
        "stage_seconds": document.get("stage_seconds"),
        "agreement": document.get("agreement"),
        "measured": document.get("measured"),
        "warnings": document.get("warnings"),
        "seg_sha256": hashlib.sha256(seg.read_bytes()).hexdigest() if seg.exists() else None,
    }


def judged(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not as docs/map.md says."""
    wrong = []

    def must(name: str, what: str, holds: object) -> None:
        if not holds:
            wrong.append(f"{name}: {what}")

    def backend(name: str) -> str:
        return str((cases[name].get("engine") or {}).get("backend"))

    for name, wanted in {"first": "fused", "fused": "fused", "eager": "eager", "volume-1": "fused", "volume-2": "fused",
                         "run": "fused", "outside": "fused", "without-gpu": "openvino"}.items():  # fmt: skip
        must(name, "exit code 0", cases[name]["exit_code"] == 0)
        must(name, f"computed by {wanted}, not {backend(name)}", backend(name) == wanted)
    for name in ("rtx", "without-gpu-fused"):
        must(name, "exit code 4", cases[name]["exit_code"] == 4)
    first = cases["first"].get("seg_sha256")
    for name in ("fused", "volume-1", "volume-2", "run", "outside"):
        must(name, "the same SEG", first is not None and cases[name].get("seg_sha256") == first)
    choosing = cases["volume-1"]["seconds"] - cases["volume-2"]["seconds"]
    must("volume-1", "chosen and compared within 10 s", choosing <= 10)
    return wrong


def main() -> int:
    """Run every case and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the unpacked image")
    parser.add_argument("--config", type=Path, required=True, help="its OCI configuration")
    parser.add_argument("--ct", type=Path, required=True, help="a folder with one CT series")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", type=Path, help="default: record.json in the folder of --out")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    given = parser.parse_args()
    given.root, given.ct, given.out = given.root.resolve(), given.ct.resolve(), given.out.resolve()
    given.record = given.record or given.out / "record.json"
    given.configuration = json.loads(given.config.read_text(encoding="utf-8"))
    cache = given.out / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    os.chown(cache, 1000, 1000)
    ctflow = ("/opt/ctflow/bin/ctflow", "run", "-i", "/var/holoscan/input", "-o", "/var/holoscan/output")
    steps: dict[str, Callable[[str], dict[str, Any]]] = {
        "fused": lambda name: run_case(name, ["--engine", "fused"], given),
        "first": lambda name: run_case(name, [], given),
        "volume-1": lambda name: run_case(name, [], given, cache=cache),
        "volume-2": lambda name: run_case(name, [], given, cache=cache),
        "run": lambda name: run_case(name, [], given, program=ctflow),
        "outside": lambda name: run_case(name, [], given, program=ctflow, cache=cache, isolated=False),
        "eager": lambda name: run_case(name, ["--engine", "eager"], given),
        "rtx": lambda name: run_case(name, ["--engine", "tensorrt-rtx"], given),
        "without-gpu-fused": lambda name: run_case(name, ["--engine", "fused"], given, gpu=False),
        "without-gpu": lambda name: run_case(name, [], given, gpu=False),
    }
    gpus = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                          capture_output=True, text=True, check=False).stdout.strip()  # fmt: skip
    record: dict[str, Any] = {
        "date": given.date,
        "gpu": gpus,
        "cpus": os.cpu_count(),
        "isolation": _ISOLATION,
        "driver_files": {name: str(path) for name, path in driver_files().items()},
        "cases": {},
    }
    for name, step in steps.items():
        record["cases"][name] = step(name)
        given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["not as documented"] = wrong = judged(record["cases"])
    given.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
