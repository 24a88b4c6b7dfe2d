"""ONNX Runtime on the CPU, for machines where OpenVINO does not run."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import torch
from torch import Tensor

from ctflow.core.errors import ExportFailed
from ctflow.core.model import Model
from ctflow.core.processes import usable_cpus
from ctflow.engines.contract import Precision, check_supported, package_state
from ctflow.engines.onnxfile import OnnxEngine, find_onnx
from ctflow.engines.request import EngineRequest, info_of

FILE = "onnx"
DEVICES = ("cpu",)
_PACKAGE = "onnxruntime"
_FLOAT32 = 1  # onnx.TensorProto.FLOAT, without the package onnx
_ONLY_ERRORS = 3  # its warnings concern only developers


def is_available() -> tuple[bool, str]:
    """Whether the package is installed."""
    return package_state(_PACKAGE)


def precisions(device: str) -> tuple[Precision, ...]:
    """The precision that "auto" tries, also the default."""
    return ("fp32",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that ONNX Runtime supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    check_supported(_PACKAGE, device, precision, DEVICES, ("fp32",))


class OnnxRuntimeEngine(OnnxEngine):
    """A session of one window."""

    def _run(self, windows: Tensor, logits: Tensor) -> None:
        (session,) = self._runners
        source, target = session.get_inputs()[0].name, session.get_outputs()[0].name
        binding = session.io_binding()
        binding.bind_input(source, "cpu", 0, _FLOAT32, tuple(windows.shape), windows.data_ptr())
        binding.bind_output(target, "cpu", 0, _FLOAT32, tuple(logits.shape), logits.data_ptr())
        session.run_with_iobinding(binding)


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
    return OnnxRuntimeEngine([session], info, _runtime_errors())
