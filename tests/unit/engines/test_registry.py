from __future__ import annotations

import pytest
import torch

from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.engines import registry
from ctflow.engines.registry import backends, device_from_setting, devices_from_setting, open_engine
from ctflow.engines.request import EngineRequest
from reasons import raises_reason


def test_every_backend_says_whether_it_is_there():
    found = {name: (available, reason) for name, available, reason in backends()}
    assert found["eager"] == (True, f"torch {torch.__version__}")


def test_a_backend_that_lacks_only_the_gpu_says_so(monkeypatch):
    """TensorRT-RTX loads, and makes plans, on a machine without a GPU."""
    monkeypatch.setattr(registry, "_availability", lambda name: (True, f"{name} 1.7"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {name: (available, reason) for name, available, reason in backends()}
    assert found["openvino"] == (True, "openvino 1.7")
    available, reason = found["tensorrt-rtx"]
    assert not available
    assert "installed (tensorrt-rtx 1.7), but it needs an NVIDIA GPU" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {available for _, available, _ in backends()} == {True}


def test_an_unknown_name_lists_the_known():
    with raises_reason(
        SettingsInvalid,
        "invalid-value",
        names=("--engine: ", "'warp'", "auto, fused, ", "onnxruntime, eager"),
    ):
        open_engine(EngineRequest("warp", "cpu", "fp32", (1, 1, 1), (1, 1)), None)


class Absent:
    DEVICES = ("cpu",)

    @staticmethod
    def is_available():
        return False, "install it"


def test_an_absent_backend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(registry, "_load", lambda _: Absent)
    for name in ("eager", "auto"):
        with raises_reason(BackendUnavailable, "no-engine", names="eager: install it"):
            open_engine(EngineRequest(name, "cpu", "fp32", (1, 1, 1), (1, 1)), None)


@pytest.mark.parametrize(
    ("setting", "gpus", "devices"),
    [
        (None, 0, ["cpu"]),
        (None, 2, ["cuda:0"]),
        ("cpu", 2, ["cpu"]),
        ("cuda", 1, ["cuda:0"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("cuda:2,0", 3, ["cuda:2", "cuda:0"]),
    ],
)
def test_the_devices_follow_the_setting_and_the_machine(monkeypatch, setting, gpus, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices_from_setting(setting) == tuple(devices)
    assert device_from_setting(setting) == devices[0]


@pytest.mark.parametrize(
    ("setting", "here", "gpus"), [("cuda", "no GPU", 0), ("cuda:1", "1 GPU;", 1), ("cuda:0,2", "2 GPUs", 2)]
)
def test_a_device_that_is_not_there_is_named(monkeypatch, setting, here, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with raises_reason(BackendUnavailable, "no-such-device", names=(here, "--engine auto")):
        devices_from_setting(setting)
