"""Resolve what ctflow needs for each Python, build of torch, platform and extra; nothing is installed.

Prints a table of how many packages each would install, and ends with 1 and the resolver's words where one cannot be
had, where a version is not in constraints.txt, or where there is no network. The ordinary index has torch's CUDA build
for Linux; the CPU build is the same without what only CUDA needs, so the resolver is told its requirements.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13")
ON_NVIDIAS_INDEX = {"tensorrt", "torch-tensorrt"}
EVERYWHERE = ("", "onnxruntime", "openvino", "serve")
HAS_NO_WHEELS = {("Linux Arm, glibc 2.28", "openvino")}
CPU_BUILD = "torch-on-cpu.toml"
# The first only requires its parts, the others are the tests', in Python alone. Everything else has to have a wheel for
# the system.
HAS_NO_WHEEL = ("tensorrt-rtx-cu13", "acvl-utils", "dcmrtstruct2nii")
# What the CPU build of torch requires (tests/unit/test_install.py compares it with the installed one).
TORCH_ON_CPU = ("filelock", "typing-extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec")
# Left to torch, whose CUDA build requires one version of each; and pip, which every environment brings along.
NOT_PINNED = re.compile(r"(nvidia-|cuda-toolkit$|triton$|pip$)")
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_35",
    "Linux x86-64, glibc 2.28": "x86_64-manylinux_2_28",
    "Linux Arm": "aarch64-manylinux_2_35",
    "Linux Arm, glibc 2.28": "aarch64-manylinux_2_28",
    "macOS 14, Apple silicon": "aarch64-apple-darwin",
    "Windows x86-64": "x86_64-pc-windows-msvc",
}


@dataclass(frozen=True)
class Combination:
    """One environment to resolve."""

    platform: str
    build: str  # "CUDA" or "CPU"; "" where the platform has one build
    python: str
    extra: str
    lowest: bool = False

    @property
    def label(self) -> str:
        """As a person reads it."""
        build = f" {self.build}" if self.build else ""
        oldest = ", oldest versions" if self.lowest else ""
        return f"{self.platform}{build}, Python {self.python}, {self.extra or 'no extra'}{oldest}"


@dataclass(frozen=True)
class Resolved:
    """What a combination would install by name and version, or why it cannot be installed."""

    packages: dict[str, str]
    error: str = ""


def combinations(extras: Sequence[str]) -> list[Combination]:
    """All environments that are promised."""
    found = []
    for python in PYTHONS:
        for extra in ("", *extras):
            found += [Combination("Linux x86-64", build, python, extra) for build in ("CUDA", "CPU")]
        for platform in list(PLATFORMS)[1:]:
            there = [extra for extra in EVERYWHERE if extra in ("", *extras) and (platform, extra) not in HAS_NO_WHEELS]
            found += [Combination(platform, "", python, extra) for extra in there]
    return [*found, *(Combination("Linux x86-64", "CUDA", "3.11", extra, lowest=True) for extra in ("", *extras))]


def resolve(combination: Combination, project: Path, cache: Path) -> Resolved:
    """Ask uv: first of what this run has fetched already, then of the index."""
    command = [
        "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", combination.python,
        "--python", sys.executable, "--python-platform", PLATFORMS[combination.platform], "--cache-dir", str(cache),
        "--only-binary", ":all:", *(f"--no-binary={name}" for name in HAS_NO_WHEEL),
        str(project / "pyproject.toml"),
    ]  # fmt: skip
    command += ["--extra", combination.extra] if combination.extra else []
    if combination.lowest:
        command += ["--resolution", "lowest-direct"]
    else:
        command += ["--constraint", str(project / "constraints.txt")]
    if combination.build == "CPU":
        command += ["--config-file", str(cache / CPU_BUILD)]
    known = _answer([*command, "--offline"])
    return _answer(command) if known.error else known


def _answer(command: Sequence[str]) -> Resolved:
    """What uv resolved, or its words."""
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0", "UV_PYTHON_DOWNLOADS": "never", "PATH": _path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        lines = (line.split(";")[0].strip() for line in done.stdout.splitlines())
        return Resolved(dict(line.split("==", 1) for line in lines if "==" in line))
    return Resolved({}, done.stderr.strip() or f"uv ended with {done.returncode}")


def _path() -> str:
    """Uv lies beside this interpreter where it came with the extra dev."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def tell_of_cpu_build(project: Path, folder: Path) -> None:
    """Write uv's settings that say what the CPU build of torch requires."""
    version = pinned(project)["torch"]
    requires = ", ".join(f'"{name}"' for name in TORCH_ON_CPU)
    text = f'[[dependency-metadata]]\nname = "torch"\nversion = "{version}"\nrequires-dist = [{requires}]\n'
    (folder / CPU_BUILD).write_text(text, encoding="utf-8")


def pinned(project: Path) -> dict[str, str]:
    """constraints.txt as names and versions."""
    lines = (project / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {normal(name): version.strip() for name, version in pairs}


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unpinned(combination: Combination, resolved: Resolved, pins: dict[str, str]) -> list[str]:
    """Packages whose version nothing fixes, so that tomorrow's installation would be another one (Linux x86-64)."""
    if combination.lowest or combination.platform != "Linux x86-64":
        return []
    return sorted(name for name in resolved.packages if normal(name) not in pins and not NOT_PINNED.match(name))


def lacks_cuda(combination: Combination, results: dict[Combination, Resolved]) -> bool:
    """Whether a row of the CUDA build shows another one, as an index of CPU builds would give."""
    found = results[combination]
    return (
        combination.build == "CUDA"
        and not found.error
        and not any(each.startswith("nvidia-") for each in found.packages)
    )


def table(results: dict[Combination, Resolved], extras: Sequence[str]) -> str:
    """Number of packages: a row for each platform, build and Python; a column for each extra."""
    columns = ["(none)", *extras]
    rows: dict[str, dict[str, str]] = {}
    for combination, resolved in results.items():
        build = f", {combination.build} torch" if combination.build else ""
        row = f"{combination.platform}{build}, {combination.python}{', oldest' if combination.lowest else ''}"
        cell = "FAILED" if resolved.error else str(len(resolved.packages))
        rows.setdefault(row, {})[combination.extra or "(none)"] = cell
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{column:>14}" for column in columns)]
    lines += [
        f"{row:<{width}}" + "".join(f"{cells.get(column, '-'):>14}" for column in columns)
        for row, cells in rows.items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Resolve all and print the table; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--project", type=Path, default=Path(__file__).resolve().parents[1], help="with pyproject.toml")
    project = parser.parse_args(argv).project
    text = (project / "pyproject.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["project"].get("optional-dependencies", {})
    extras = [extra for extra in known if extra not in ON_NVIDIAS_INDEX]
    wanted = combinations(extras)
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(4) as pool:
        tell_of_cpu_build(project, Path(cache))
        results = dict(zip(wanted, pool.map(lambda each: resolve(each, project, Path(cache)), wanted), strict=True))
    sys.stdout.write(f"Packages that each installation takes:\n{table(results, extras)}\n")
    pins = pinned(project)
    problems = [f"{each.label}:\n{resolved.error}" for each, resolved in results.items() if resolved.error]
    loose = sorted({name for each, resolved in results.items() for name in unpinned(each, resolved, pins)})
    no_cuda = [each.label for each in results if lacks_cuda(each, results)]
    problems += [f"no NVIDIA package, so no CUDA build of torch: {'; '.join(no_cuda)}"] if no_cuda else []
    problems += [f"not in constraints.txt: {', '.join(loose)}"] if loose else []
    for text in problems:
        sys.stderr.write(f"\n{text}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
