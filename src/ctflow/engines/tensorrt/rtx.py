"""TensorRT-RTX: plans are built on any machine, also without a GPU, and run on RTX cards (not on an H100 or H200)."""

from __future__ import annotations

from ctflow.engines.contract import Precision
from ctflow.engines.tensorrt.engine import DEVICES, RTX_FILE, check_gpu, open_backend, precisions
from ctflow.engines.tensorrt.runtime import runtime_state

__all__ = ["DEVICES", "FILE", "check_settings", "is_available", "open_backend", "precisions"]
_NAME = "tensorrt-rtx"
FILE = RTX_FILE


def is_available() -> tuple[bool, str]:
    """Whether the package is installed and loads."""
    return runtime_state(_NAME)


def check_settings(device: str, precision: Precision) -> None:
    """Check that TensorRT-RTX supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    check_gpu(_NAME, device, precision)
