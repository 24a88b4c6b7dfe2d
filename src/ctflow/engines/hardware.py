"""What computes here: the GPU, its driver, and how many CPUs this process may use."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import torch


def gpu_identity(device: str) -> str:
    """Name, compute capability and driver of a GPU: a plan runs on no other."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, compute capability {found.major}.{found.minor}, driver {driver_version()}"


def driver_version() -> str:
    """The NVIDIA driver's version, from its own library; "unknown" where that cannot be asked."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return "unknown"
    try:
        return text.value.decode() if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0 else "unknown"
    finally:
        nvml.nvmlShutdown()


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, and its container's share of time rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        return count
