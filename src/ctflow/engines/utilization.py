"""How busy GPUs are, as their driver tells it: the share of time in which a kernel ran."""

from __future__ import annotations

import ctypes
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

_KEPT = 36_000  # two hours at the usual interval, or a run of twelve minutes at a benchmark's
_INTERVAL_S = 0.2  # the driver's own samples are a sixth of a second long

log = logging.getLogger(__name__)


class _Rates(ctypes.Structure):
    """NVML's nvmlUtilization_t: percent of the time in which kernels ran, and in which memory was used."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class GpuMeter:
    """Samples how busy GPUs are, in a thread; a context manager.

    It knows nothing without a GPU or NVIDIA's driver, or on a part of a GPU (MIG), of which the driver tells none.

    Args:
        uuids: Of the GPUs, as `gpu_uuids` gives them; none for nothing.
        interval_s: Between samples.
    """

    def __init__(self, uuids: Sequence[str], interval_s: float = _INTERVAL_S) -> None:
        self._uuids, self._interval_s = uuids, interval_s
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self.samples: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # time by perf_counter, and share

    def __enter__(self) -> GpuMeter:
        query = _opened(self._uuids)
        if query is not None:
            self._thread = threading.Thread(target=self._sample, args=(query,), name="gpu", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def share(self, start: float, end: float) -> float | None:
        """Mean between two times by perf_counter, 0 to 1, over all GPUs; None if nothing is known."""
        found = []
        for at, busy in reversed(list(self.samples)):
            if at < start:
                break
            if at <= end:
                found.append(busy)
        return round(statistics.fmean(found), 3) if found else None

    def _sample(self, query: Callable[[], float | None]) -> None:
        while not self._ending.wait(self._interval_s):
            busy = query()
            if busy is not None:
                self.samples.append((time.perf_counter(), busy))


def gpu_uuids(devices: Sequence[str]) -> tuple[str, ...]:
    """The driver's names of GPUs, which hold whatever numbers they have in this process.

    Args:
        devices: Of torch, such as "cuda:0" (`ctflow.engines.registry.devices_from_setting`).
    """
    import torch  # noqa: PLC0415  # seconds to import

    gpus = [device for device in devices if device.startswith("cuda")]
    return tuple(f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in gpus)


def _opened(uuids: Sequence[str]) -> Callable[[], float | None] | None:
    """Asks the driver for the mean over the GPUs; None if it does not tell."""
    if not uuids:
        return None
    try:
        nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    handles = []
    for uuid in uuids:
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            log.warning("the driver does not tell how busy a GPU is")
            return None
        handles.append(handle)

    def ask() -> float | None:
        rates = [_Rates() for _ in handles]
        pairs = zip(handles, rates, strict=True)
        answers = [nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rate)) for handle, rate in pairs]
        return None if any(answers) else statistics.fmean(rate.gpu for rate in rates) / 100

    return ask
