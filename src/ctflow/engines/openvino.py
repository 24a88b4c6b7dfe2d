"""OpenVINO on the CPU: the fastest there, as it keeps the attention scores of a window in the cache.

Two windows are computed side by side, each by half of the cores: 8 to 15 % faster than one window by all of them
(OpenVINO 2026.4, 2 cores), as the halves never wait for each other inside a window.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ctflow.compat.openvino import without_telemetry
from ctflow.core.errors import BackendUnavailable, ExportFailed
from ctflow.core.model import Model
from ctflow.core.processes import usable_cpus
from ctflow.engines.contract import Precision, check_supported, package_state
from ctflow.engines.onnxfile import OnnxEngine, find_onnx
from ctflow.engines.request import EngineRequest, info_of

FILE = "onnx"
DEVICES = ("cpu",)
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_STREAMS = 2


def is_available() -> tuple[bool, str]:
    """Whether the package is installed."""
    return package_state("openvino")


def precisions(device: str) -> tuple[Precision, ...]:
    """The precision that "auto" tries, also the default."""
    return ("fp32",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that OpenVINO supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    check_supported("openvino", device, precision, DEVICES, _HINTS)
    if precision == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendUnavailable("this CPU has no bf16 arithmetic: use --precision fp32", reason="wrong-precision")


def _core() -> Any:
    """OpenVINO, loaded without its telemetry, which would report each import to its maker."""
    with without_telemetry():
        openvino = importlib.import_module("openvino")
    return openvino.Core()


class OpenVinoEngine(OnnxEngine):
    """A compiled graph of one window, computed for several windows side by side."""

    def _run(self, windows: Tensor, logits: Tensor) -> None:
        """Start all, then wait for all, in memory shared with torch."""
        tensor, running = importlib.import_module("openvino").Tensor, []
        try:
            for request, window, answer in zip(self._runners, windows, logits, strict=False):
                request.set_input_tensor(tensor(window[None].numpy(), shared_memory=True))
                request.set_output_tensor(tensor(answer[None].numpy(), shared_memory=True))
                request.start_async()
                running.append(request)
        finally:
            for request in running:  # never leave one writing into memory that the caller may free
                request.wait()


def open_backend(request: EngineRequest, model: Model) -> OpenVinoEngine:
    """Open the engine; see `ctflow.engines.registry.open_engine`."""
    check_settings(request.device, request.chosen_precision)
    path = find_onnx(request, model)
    core = _core()
    cpus = usable_cpus()
    streams = min(_STREAMS, cpus)
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[request.chosen_precision],
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": cpus,
    }
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", options)
    except RuntimeError as error:  # the only kind that OpenVINO raises
        reason = str(error).strip().splitlines()[-1][:200]
        raise ExportFailed(
            f"OpenVINO cannot run {model.spec.network.name}: {reason}; use --engine eager", reason="not-runnable"
        ) from error
    channels = int(compiled.output(0).shape[1])
    versions = {"torch": str(torch.__version__), "openvino": version("openvino")}
    fewest, most = request.batch_range
    side_by_side = replace(request, batch_range=(fewest, max(most, streams)))
    info = info_of(side_by_side, model, channels, versions)
    requests = [compiled.create_infer_request() for _ in range(streams)]
    return OpenVinoEngine(requests, info, (RuntimeError,))
