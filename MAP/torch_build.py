"""Exit code 0 if torch, as installed or in the wheel that is given, is a build for CPUs; 1 if it is not, or absent."""

from __future__ import annotations

import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires


def main() -> int:
    """Look at what it requires: the CUDA build needs NVIDIA's libraries."""
    needed = _of_installed() if sys.argv[1] == "installed" else _of_wheel(sys.argv[1])
    return 0 if needed and not any(line.startswith(("nvidia", "cuda", "triton")) for line in needed) else 1


def _of_installed() -> list[str]:
    try:
        return requires("torch") or []
    except PackageNotFoundError:
        return []


def _of_wheel(path: str) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(name).decode("utf-8").splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]


if __name__ == "__main__":
    sys.exit(main())
