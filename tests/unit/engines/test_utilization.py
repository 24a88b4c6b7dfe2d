"""How busy GPUs are, from a stand-in for the driver's library; without one nothing is known."""

from __future__ import annotations

import ctypes
import time

import pytest
import torch

from ctflow.engines import utilization
from ctflow.engines.utilization import GpuMeter, gpu_uuids


class Nvml:
    """The four functions that are called, with GPUs by their UUIDs and the percent that each tells."""

    def __init__(self, percent: dict[str, int | None], init: int = 0):
        self.percent, self.init, self.uuids = percent, init, list(percent)

    def nvmlInit_v2(self):
        return self.init

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if uuid.decode() not in self.percent:
            return 6
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 1 + self.uuids.index(uuid.decode())
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, rates):
        percent = self.percent[self.uuids[handle.value - 1]]
        if percent is None:
            return 3
        ctypes.cast(rates, ctypes.POINTER(ctypes.c_uint))[0] = percent
        return 0


def measured(monkeypatch, nvml, uuids) -> float | None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    start = time.perf_counter()
    with GpuMeter(uuids, 0.001) as meter:
        time.sleep(0.05)
    return meter.share(start, time.perf_counter())


def test_the_mean_over_the_gpus_is_told(monkeypatch):
    assert measured(monkeypatch, Nvml({"GPU-a": 90, "GPU-b": 50, "GPU-c": 0}), ["GPU-a", "GPU-b"]) == pytest.approx(0.7)


def test_only_samples_between_the_two_times_count():
    meter = GpuMeter(())
    meter.samples.extend([(1.0, 0.0), (2.0, 0.5), (3.0, 1.0), (4.0, 0.0)])
    assert meter.share(1.5, 3.5) == pytest.approx(0.75)
    assert meter.share(4.5, 5.0) is None


@pytest.mark.parametrize(
    ("nvml", "uuids"),
    [
        (Nvml({"GPU-a": 1}), []),
        (Nvml({"GPU-a": 1}, init=9), ["GPU-a"]),
        (Nvml({"GPU-a": 1}), ["GPU-a", "GPU-b"]),
        (Nvml({"GPU-a": None}), ["GPU-a"]),  # as for a part of a GPU
    ],
)
def test_what_the_driver_does_not_tell_is_not_known(monkeypatch, nvml, uuids):
    assert measured(monkeypatch, nvml, uuids) is None


def test_without_a_driver_nothing_is_known(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(utilization.ctypes, "CDLL", absent)
    with GpuMeter(["GPU-a"], 0.001) as meter:
        assert meter.share(0, time.perf_counter()) is None


def test_a_cpu_is_no_gpu():
    assert gpu_uuids(["cpu"]) == ()


@pytest.mark.gpu
def test_a_gpu_that_computes_is_busy():
    (uuid,) = gpu_uuids(["cuda:0"])
    block = torch.ones(4096, 4096, device="cuda:0")
    start = time.perf_counter()
    with GpuMeter([uuid], 0.05) as meter:
        while time.perf_counter() - start < 2:
            block = block @ block * 1e-4
            torch.cuda.synchronize()
    assert meter.share(start + 1, time.perf_counter()) > 0.5
