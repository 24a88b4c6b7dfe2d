"""In the image: loads every library of torch and CUDA, so that none lacks another that was left out."""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from pathlib import Path

_DRIVER = "libcuda.so.1"  # comes from the machine, when the container starts


def main() -> int:
    """Name each that does not load; 1 if there is one."""
    import torch  # noqa: F401, PLC0415  # loads in its order what the others look for

    site = Path(sysconfig.get_path("purelib"))
    libraries = sorted({*site.glob("torch/lib/*.so*"), *site.glob("nvidia/*/lib/*.so*")})
    failed = [error for path in libraries if (error := _error(path)) and _DRIVER not in error]
    sys.stderr.write("".join(f"{error}\n" for error in failed))
    sys.stdout.write(f"libraries: {len(libraries)}, of which do not load: {len(failed)}\n")
    return 1 if failed else 0


def _error(path: Path) -> str:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
