"""Measure what a run waits for until its first window: processes of one or more checkouts, in turn.

    python benchmarks/startup.py -i DIR [--source SRC ...] [--count 5] [-- --engine openvino --cache DIR]

Each process is `ctflow run` with these options; it ends where the windows begin. SRC is a checkout's `src` folder
(default: this one's), whose demonstration bundle it takes. "cpu" is the processor time of the process, which other
load on the machine affects less than the wall time. The last line is one JSON document with the medians.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
_HEAVY = ("torch", "monai", "scipy", "highdicom", "sympy", "ctflow.phantom")


class FirstWindow(importlib.abc.MetaPathFinder):
    """Ends the process in place of its first window."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The segmenter's module, whose `_predict` will print the figures."""
        if fullname != "ctflow.pipeline.segmenter":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            module.Segmenter._predict = _tell

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _tell(*_: object, **__: object) -> None:
    started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "wall": time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"),
        "cpu": usage.ru_utime + usage.ru_stime,
        "modules": len(sys.modules),
        "imported": [name for name in _HEAVY if name in sys.modules],
    }
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


def _start(source: Path, words: list[str]) -> None:
    """Run in this process, with the code of a checkout."""
    sys.path.insert(0, str(source))
    sys.meta_path.insert(0, FirstWindow())
    from ctflow.cli.start import main as run  # noqa: PLC0415  # of that checkout

    sys.argv = ["ctflow", "run", "-m", str(source.parent / "bundle"), *words]
    sys.exit(run())


def _measure(source: Path, folder: Path, words: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        program = [sys.executable, str(_HERE), "--start", str(source), "-i", str(folder), "-o", output, *words]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str]) -> int:
    """Measure, and print the medians."""
    if argv[:1] == ["--start"]:
        _start(Path(argv[1]), argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--input", type=Path, required=True)
    parser.add_argument("--source", type=Path, action="append")
    parser.add_argument("--count", type=int, default=5)
    end = argv.index("--") if "--" in argv else len(argv)
    given, words = parser.parse_args(argv[:end]), argv[end + 1 :]
    sources = [source.resolve() for source in given.source or [_HERE.parents[1] / "src"]]
    found: dict[Path, list[dict[str, Any]]] = {source: [] for source in sources}
    for number in range(given.count + 1):
        for source in sources:
            one = _measure(source, given.input.resolve(), words)
            if number:  # the first fills the caches of files and byte code
                found[source].append(one)
                sys.stdout.write(f"{source}: {one['wall']:.2f} s, processor {one['cpu']:.2f} s\n")
    medians = [
        {name: round(statistics.median(one[name] for one in runs), 2) for name in ("wall", "cpu", "modules")}
        | {"imported": runs[0]["imported"]}
        for runs in found.values()
    ]
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "monai", "pydicom")}
    sys.stdout.write(json.dumps({"startup": medians, "count": given.count, "cpus": os.cpu_count(), **versions}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
