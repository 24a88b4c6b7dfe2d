"""OpenVINO on the CPU: the fastest there, as it keeps the attention scores of a window in the cache.

Two windows are computed side by side, each by half of the cores: 8 to 15 % faster than one window by all of them
(OpenVINO 2026.4, 2 cores), as the halves never wait for each other inside a window.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ctflow.compat.openvino import without_telemetry
from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, ExportFailed
from ctflow.core.model import Model
from ctflow.engines.contract import EngineInfo, Precision, check_windows
from ctflow.engines.hardware import usable_cpus
from ctflow.engines.onnxfile import find_onnx
from ctflow.engines.request import EngineRequest, info_of

FILE = "onnx"
DEVICES = ("cpu",)
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_STREAMS = 2


def is_available() -> tuple[bool, str]:
    """Whether the package is installed."""
    if find_spec("openvino") is None:
        return False, "the package openvino is not installed: pip install 'ctflow[openvino]'"
    try:
        return True, f"openvino {version('openvino')}"
    except PackageNotFoundError:
        return False, "the package openvino is damaged: pip install --force-reinstall 'ctflow[openvino]'"


def precisions(device: str) -> tuple[Precision, ...]:
    """The precision that "auto" tries, also the default."""
    return ("fp32",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that OpenVINO supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    if torch.device(device).type not in DEVICES:
        raise BackendUnavailable(
            f"openvino runs on the CPU only, not on {device}: use --device cpu", reason="wrong-device"
        )
    if precision not in _HINTS:
        raise BackendUnavailable(
            f"openvino supports {' or '.join(_HINTS)}, not {precision}: set --precision",
            reason="wrong-precision",
        )
    if precision == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendUnavailable("this CPU has no bf16 arithmetic: use --precision fp32", reason="wrong-precision")


def _core() -> Any:
    """OpenVINO, loaded without its telemetry, which would report each import to its maker."""
    with without_telemetry():
        openvino = importlib.import_module("openvino")
    return openvino.Core()


class OpenVinoEngine:
    """A compiled graph of one window; see `ctflow.engines.contract.Engine`.

    Args:
        compiled: OpenVINO's compiled model, of batch 1.
        info: Its description.
        streams: How many windows are computed side by side.
    """

    def __init__(self, compiled: Any, info: EngineInfo, streams: int) -> None:
        self._requests: list[Any] = [compiled.create_infer_request() for _ in range(streams)]
        self._tensor = importlib.import_module("openvino").Tensor
        self._info = info
        # Made at the first call and kept: the contract lets the next call overwrite the result.
        self._logits: Tensor | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`."""
        info = self._info
        if not self._requests:
            raise ValueError("the engine is closed")
        check_windows(windows, info)
        count = len(windows)
        try:
            if self._logits is None or len(self._logits) < count:
                self._logits = torch.empty((count, info.out_channels, *info.roi))
            given, result = windows.detach().contiguous(), self._logits[:count]
            for first in range(0, count, len(self._requests)):
                self._run(given[first : first + len(self._requests)], result[first : first + len(self._requests)])
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "alloc" in str(error):
                raise DeviceOutOfMemory(f"{info.device} has too little memory for {count} windows") from error
            raise
        return result

    def _run(self, windows: Tensor, logits: Tensor) -> None:
        """As many windows as there are requests or fewer, side by side, in memory shared with torch."""
        running = []
        try:
            for request, window, answer in zip(self._requests, windows, logits, strict=False):
                request.set_input_tensor(self._tensor(window[None].numpy(), shared_memory=True))
                request.set_output_tensor(self._tensor(answer[None].numpy(), shared_memory=True))
                request.start_async()
                running.append(request)
        finally:
            for request in running:  # never leave one writing into memory that the caller may free
                request.wait()

    def close(self) -> None:
        """Drop the graph."""
        self._requests, self._logits = [], None


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
    return OpenVinoEngine(compiled, info, streams)
