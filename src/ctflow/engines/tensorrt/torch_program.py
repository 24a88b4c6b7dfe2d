"""Torch-TensorRT: a PyTorch program in which TensorRT computes what it can, and PyTorch on the GPU the rest.

NOT RUN BY US: no machine that we have has both a GPU and Torch-TensorRT. The calls follow the sources of Torch-TensorRT
2.11 to 2.14 and are tested with a stand-in for it.

`ctflow.export.torch_program` makes the program. It takes one batch size (smaller batches are padded) and belongs to one
GPU of the machine by its number, as its tensors record their device. A program holds pickled objects: open none from a
folder that others may write to.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ctflow.core.errors import BackendUnavailable, EngineMismatch, counted, first_line
from ctflow.core.model import Model
from ctflow.engines.contract import EngineInfo, Precision, check_supported, check_windows, not_taken
from ctflow.engines.hardware import driver_version, gpu_identity, memory_for, switches
from ctflow.engines.onnxfile import key_of_model
from ctflow.engines.request import EngineRequest, info_of
from ctflow.engines.store.store import EngineKey
from ctflow.engines.tensorrt.engine import find_plan
from ctflow.engines.tensorrt.runtime import load_runtime, runtime_state

FILE: str | None = "program"
DEVICES = ("cuda",)
_NAME = "torch-tensorrt"
_MODULE = "torch_tensorrt"
_OLDEST = (2, 11)  # the first version that follows a network's number formats by default
_INSTALL = "pip install 'ctflow[torch-tensorrt]'"


def is_available() -> tuple[bool, str]:
    """Whether the packages are installed; they are not loaded, which takes seconds."""
    if find_spec(_MODULE) is None:
        return False, f"the package {_NAME} is not installed: {_INSTALL}"
    below, reason = runtime_state("tensorrt")  # torch-tensorrt 2.14 does not require it
    if not below:
        return False, reason
    found = _version(_NAME)
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if parts and parts < _OLDEST:
        return False, f"{_NAME} {found} is older than 2.11: pip install --upgrade 'ctflow[{_NAME}]'"
    return True, f"{_NAME} {found}"


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions that `auto` tries; the last is the default."""
    return ("fp16",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that Torch-TensorRT supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    check_supported(_NAME, device, precision, DEVICES)


def load_torch_tensorrt() -> Any:
    """The Python module; programs can be opened only after it was loaded.

    Raises:
        BackendUnavailable: It does not load; gives the system's reason.
    """
    load_tensorrt()  # else torch_tensorrt substitutes a module of its own
    try:
        return importlib.import_module(_MODULE)
    except Exception as error:  # it raises Exception itself where TensorRT's libraries are not found
        raise BackendUnavailable(f"{_NAME} does not load: {first_line(error)}", reason="not-loadable") from error


def load_tensorrt() -> Any:
    """The Python module of the TensorRT below.

    Raises:
        BackendUnavailable: It does not load; gives the system's reason.
    """
    return load_runtime("tensorrt")


def program_key(request: EngineRequest, model: Model) -> EngineKey:
    """Key of a program. Torch-TensorRT's own cache of engines lacks the GPU and the driver.

    Args:
        request: What the program is for; it has the largest batch.
        model: The model.

    Raises:
        BackendUnavailable: TensorRT does not load.
    """
    return key_of_model(
        model,
        kind="program",
        version=", ".join(f"{name} {found}" for name, found in (*_versions().items(), ("monai", _version("monai")))),
        roi=request.roi,
        batch=request.batch_range[1],
        precision=request.chosen_precision,
        device=f"{gpu_identity(request.device)}, cuda:{torch.device(request.device).index or 0}",
    )


class TorchTensorRtEngine:
    """A program on one GPU; see `ctflow.engines.contract.Engine`. One thread at a time may call it.

    Args:
        program: (batch, C_in, *roi) -> (batch, C_out, *roi), float32 on the device.
        info: Its description.
        shape: Of the program's input.

    Raises:
        DeviceOutOfMemory: The GPU has too little memory for the input.
    """

    def __init__(self, program: Any, info: EngineInfo, shape: tuple[int, ...]) -> None:
        self._program: Any = program
        self._info = info
        with memory_for(f"{shape[0]} windows", info.device):
            # zeros, because the padding of a smaller batch is also computed.
            self._windows = torch.zeros(shape, device=info.device)

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`.

        Raises:
            BackendUnavailable: TensorRT failed; gives its reason.
        """
        info = self._info
        if self._program is None:
            raise ValueError("the engine is closed")
        check_windows(windows, info)
        count = len(windows)
        try:
            with (
                memory_for(counted(count, "window"), info.device),
                torch.cuda.device(info.device),
                torch.inference_mode(False),
                torch.no_grad(),
                switches(info.precision),
            ):
                self._windows[:count].copy_(windows, non_blocking=True)
                logits: Tensor = self._program(self._windows)
                return logits[:count]
        except RuntimeError as error:
            raise BackendUnavailable(
                f"{_NAME} failed on {info.device}: {first_line(error)}", reason="device-failed"
            ) from error

    def close(self) -> None:
        """Free the program and its input."""
        if self._program is not None:
            self._program = None
            del self._windows


def open_backend(request: EngineRequest, model: Model) -> TorchTensorRtEngine:
    """Open the engine; see `ctflow.engines.registry.open_engine`."""
    device, precision = request.device, request.chosen_precision
    check_settings(device, precision)
    path = find_plan(_NAME, program_key(request, model), request.cache)
    load_torch_tensorrt()
    shape = (request.batch_range[1], model.spec.in_channels, *request.roi)
    try:
        # A stream: torch warns of a path without the suffix .pt2.
        with memory_for("the program", device), torch.cuda.device(device), path.open("rb") as stream:
            exported = torch.export.load(stream)
            program = exported.module()
    except RuntimeError as error:
        raise BackendUnavailable(
            f"{_NAME} cannot run this program here: {first_line(error)}", reason="not-loadable"
        ) from error
    channels = _out_channels(exported, shape)
    versions = {**_versions(), "driver": driver_version()}
    info = info_of(request, model, channels, versions, fewest_computed=shape[0])
    return TorchTensorRtEngine(program, info, shape)


def _out_channels(exported: Any, shape: tuple[int, ...]) -> int:
    """Channels of a program's logits.

    Raises:
        EngineMismatch: Its output is not one tensor for windows of this shape.
        BundleInvalid: The logits have another size than the windows.
    """
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    found = [tuple(given.meta["val"].shape) for given in output.args[0]]
    if len(found) != 1 or len(found[0]) != len(shape) or found[0][0] != shape[0]:
        raise EngineMismatch(f"the stored program gives {found}, not the logits of {shape}", reason="other-tensors")
    if found[0][2:] != shape[2:]:
        raise not_taken(shape[2:], f"its logits are {found[0][2:]}")
    return int(found[0][1])


def _versions() -> dict[str, str]:
    """Versions of the software that computes."""
    runtime = load_tensorrt()
    return {"torch": str(torch.__version__), _NAME: _version(_NAME), "tensorrt": str(runtime.__version__)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
