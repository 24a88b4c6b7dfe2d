"""ONNX Runtime on the CPU, for machines where OpenVINO does not run."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, ExportFailed
from ctflow.core.model import Model
from ctflow.engines.contract import EngineInfo, Precision, check_windows
from ctflow.engines.hardware import usable_cpus
from ctflow.engines.onnxfile import find_onnx
from ctflow.engines.request import EngineRequest, info_of

FILE = "onnx"
DEVICES = ("cpu",)
_PACKAGE = "onnxruntime"
_FLOAT32 = 1  # onnx.TensorProto.FLOAT, without the package onnx
_ONLY_ERRORS = 3  # its warnings concern only developers


def is_available() -> tuple[bool, str]:
    """Whether the package is installed."""
    if find_spec(_PACKAGE) is None:
        return False, f"the package {_PACKAGE} is not installed: pip install 'ctflow[onnxruntime]'"
    try:
        return True, f"{_PACKAGE} {version(_PACKAGE)}"
    except PackageNotFoundError:
        return False, f"the package {_PACKAGE} is damaged: pip install --force-reinstall 'ctflow[onnxruntime]'"


def precisions(device: str) -> tuple[Precision, ...]:
    """The precision that "auto" tries, also the default."""
    return ("fp32",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that ONNX Runtime supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    if torch.device(device).type not in DEVICES:
        raise BackendUnavailable(
            f"{_PACKAGE} runs on the CPU only, not on {device}: use --device cpu", reason="wrong-device"
        )
    if precision != "fp32":
        raise BackendUnavailable(
            f"{_PACKAGE} supports fp32, not {precision}: set --precision", reason="wrong-precision"
        )


class OnnxRuntimeEngine:
    """A session of one window; see `ctflow.engines.contract.Engine`.

    Args:
        session: ONNX Runtime's session of a graph of batch 1.
        info: Its description.
    """

    def __init__(self, session: Any, info: EngineInfo) -> None:
        self._session: Any = session
        self._names = session.get_inputs()[0].name, session.get_outputs()[0].name
        self._info = info
        self._logits: Tensor | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`."""
        info = self._info
        if self._session is None:
            raise ValueError("the engine is closed")
        check_windows(windows, info)
        count = len(windows)
        try:
            if self._logits is None or len(self._logits) < count:
                self._logits = torch.empty((count, info.out_channels, *info.roi))
            given, result = windows.detach().contiguous(), self._logits[:count]
            for row in range(count):
                self._run(given[row : row + 1], result[row : row + 1])
        except MemoryError as error:
            raise DeviceOutOfMemory(f"{info.device} has too little memory for {count} windows") from error
        except _runtime_errors() as error:
            if "alloc" in str(error):
                raise DeviceOutOfMemory(f"{info.device} has too little memory for a window") from error
            raise
        return result

    def _run(self, window: Tensor, logits: Tensor) -> None:
        """One window, read from and written into torch's own memory."""
        source, target = self._names
        binding = self._session.io_binding()
        binding.bind_input(source, "cpu", 0, _FLOAT32, tuple(window.shape), window.data_ptr())
        binding.bind_output(target, "cpu", 0, _FLOAT32, tuple(logits.shape), logits.data_ptr())
        self._session.run_with_iobinding(binding)

    def close(self) -> None:
        """Drop the session."""
        self._session = self._logits = None


def _runtime_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's own errors, which have no common base."""
    state = importlib.import_module(f"{_PACKAGE}.capi.onnxruntime_pybind11_state")
    return state.Fail, state.RuntimeException, state.EPFail, state.InvalidGraph, state.NotImplemented, RuntimeError


def open_backend(request: EngineRequest, model: Model) -> OnnxRuntimeEngine:
    """Open the engine; see `ctflow.engines.registry.open_engine`."""
    check_settings(request.device, request.chosen_precision)
    path = find_onnx(request, model)
    runtime = importlib.import_module(_PACKAGE)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ONLY_ERRORS
    # The pattern plans one block for everything alive at once: 2.7 GB instead of 1.6 GB, and no faster.
    options.enable_mem_pattern = False
    # Idle threads would spin for a while after each window and take the CPUs from the next step.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _runtime_errors() as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise ExportFailed(
            f"ONNX Runtime cannot run {model.spec.network.name}: {reason}; use --engine eager", reason="not-runnable"
        ) from error
    channels = int(session.get_outputs()[0].shape[1])
    versions = {"torch": str(torch.__version__), _PACKAGE: version(_PACKAGE)}
    info = info_of(request, model, channels, versions)
    return OnnxRuntimeEngine(session, info)
