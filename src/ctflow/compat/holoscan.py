"""Make libholoscan loadable: it needs libcudart.so.13 even without a GPU and a CUDA toolkit.

Read for Holoscan 4.2, whose wheel depends on no package with the library. Issue 461 of
Project-MONAI/monai-deploy-app-sdk describes the error. `ctflow.operators` calls this before anything imports Holoscan.
"""

from __future__ import annotations

import ctypes
import importlib.util
import resource
from pathlib import Path

_RUNTIME = "libcudart.so.13"
_STACK_BYTES = 32 * 2**20  # Holoscan warns of crashes below this


def load_cuda_runtime() -> str:
    """Load the CUDA runtime library, the system's or else that of the package nvidia-cuda-runtime.

    Once a library of this name is in the process, the dynamic loader also uses it for libholoscan.

    Returns:
        The name or path that was loaded.

    Raises:
        OSError: Neither exists; says which package to install.
    """
    try:
        ctypes.CDLL(_RUNTIME, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        path = _packaged_runtime()
        if path is None:
            raise OSError(f"{_RUNTIME} not found: pip install 'nvidia-cuda-runtime>=13,<14'") from None
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        return str(path)
    return _RUNTIME


def _packaged_runtime() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for found in Path(folder).glob(f"*/lib/{_RUNTIME}"):
            return found
    return None


def raise_stack_limit() -> None:
    """Raise the soft stack limit to what Holoscan recommends, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
